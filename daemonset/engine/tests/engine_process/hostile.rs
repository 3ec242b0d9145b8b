//! A guest that changes a request or its reply while the engine serves it.

use std::time::{Duration, Instant};

use testkit::fuse::wire::Opcode;
use testkit::guest::Guest;
use testkit::virtio::ring::Descriptor;
use virtiofs_config::EngineConfig;

use crate::fixture::{Fixture, ROOT, config};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Bytes of a request's header (`struct fuse_in_header`); the opcode is its second word.
const HEADER: usize = 40;

/// Offsets of a request and its reply in unused memory.
struct ByHand<'a> {
    guest: &'a Guest,
    sent: u64,
    replied: u64,
}

impl<'a> ByHand<'a> {
    fn new(guest: &'a Guest) -> Self {
        ByHand { guest, sent: guest.scratch(), replied: guest.scratch() + 4096 }
    }

    /// Queues a request with this much room for a reply, and calls `meanwhile` until it is done.
    fn request(&self, opcode: Opcode, unique: u64, body: &[u8], room: u32, meanwhile: impl Fn()) {
        let mut bytes = vec![0; HEADER];
        bytes[0..4].copy_from_slice(&((HEADER + body.len()) as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&(opcode as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&unique.to_le_bytes());
        bytes[16..24].copy_from_slice(&ROOT.to_le_bytes());
        bytes.extend(body);
        self.guest.memory().write(self.sent, &bytes).unwrap();
        let queue = &self.guest.queues()[1];
        let before = queue.with_ring(|ring, _| {
            let out = Descriptor { address: self.sent, len: bytes.len() as u32, flags: NEXT, next: 1 };
            ring.write_descriptor(0, out).unwrap();
            ring.write_descriptor(1, Descriptor { address: self.replied, len: room, flags: WRITE, next: 0 }).unwrap();
            let before = ring.used_index().unwrap();
            ring.publish(0).unwrap();
            before
        });
        queue.kick().unwrap();
        let patience = Instant::now() + Duration::from_secs(20);
        while queue.with_ring(|ring, _| ring.used_index().unwrap()) == before {
            assert!(Instant::now() < patience, "request {unique} is not answered");
            meanwhile();
        }
    }
}

#[test]
fn a_request_that_changes_while_it_is_read_is_harmless() {
    let mut fixture = Fixture::new(config());
    let engine = fixture.take_engine();
    let by_hand = ByHand::new(&fixture.guest);
    // As long as the arguments of READ, without room for the reply of READ.
    for begins_as in [Opcode::Lookup, Opcode::Forget] {
        let change = || {
            for kind in [Opcode::Read, begins_as] {
                fixture.guest.memory().store(by_hand.sent + 4, kind as u32).unwrap();
            }
        };
        (0..4000).for_each(|unique| by_hand.request(begins_as, unique, &[0; 40], 8, change));
    }
    assert!(engine.counters.totals().malformed > 0);
    by_hand.request(Opcode::Statfs, 1 << 40, &[], 96, std::thread::yield_now);
    let mut error = [0; 4];
    fixture.guest.memory().read(by_hand.replied + 4, &mut error).unwrap();
    assert_eq!(i32::from_le_bytes(error), 0, "served as before");
}

#[test]
fn a_guest_cannot_alter_the_recorded_init() {
    let mut fixture = Fixture::new(config());
    let engine = fixture.take_engine();
    let by_hand = ByHand::new(&fixture.guest);
    // struct fuse_init_in: major, minor, max_readahead, flags (INIT_EXT), flags2 and what is unused.
    let mut init = [0; 64];
    init[0..4].copy_from_slice(&7u32.to_le_bytes());
    init[4..8].copy_from_slice(&38u32.to_le_bytes());
    init[12..16].copy_from_slice(&(1u32 << 30).to_le_bytes());
    // The guest keeps changing the flags of the reply, and the request.
    let scribble = || {
        fixture.guest.memory().store(by_hand.replied + 28, u32::MAX).unwrap();
        fixture.guest.memory().store(by_hand.sent + 4, Opcode::Statfs as u32).unwrap();
        fixture.guest.memory().store(by_hand.sent + 4, Opcode::Init as u32).unwrap();
    };
    for round in 0..10 {
        (0..50).for_each(|n| by_hand.request(Opcode::Init, 1000 * round + n, &init, 256, scribble));
        let source = fixture.path().to_owned();
        let next = engine.standby(&source, config());
        assert!(next.is_ok(), "round {round}: {:?}", next.err());
    }
}

#[test]
fn an_engine_with_another_init_reply_ends() {
    let mut fixture = Fixture::unmounted(config());
    // Prepared before the guest mounts, with a configuration that cannot serve the mount.
    let source = fixture.path().to_owned();
    let mut spare = fixture.engine().standby(&source, EngineConfig { killpriv: true, ..config() }).unwrap();
    fixture.guest.mount().unwrap();
    fixture.guest.queues().iter().for_each(|queue| queue.watch(None));
    drop(fixture.take_engine());
    fixture.guest.reconnect_to(&spare.socket()).unwrap();
    let waiting = fixture.guest.fuse().start(&testkit::fuse::call::Call::new(Opcode::Statfs, ROOT, &[]).receiving(80));
    assert!(spare.ends());
    let engine = crate::engine::Engine::killed(spare, &source, config()).unwrap();
    fixture.guest.reconnect_to(&engine.socket()).unwrap();
    waiting.unwrap().wait().expect("the next one serves it");
}
