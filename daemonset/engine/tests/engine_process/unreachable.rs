//! A guest that puts requests into memory which its VMM does not share with the engine.

use std::time::{Duration, Instant};

use testkit::fuse::client::read_in;
use testkit::fuse::wire::Opcode;
use testkit::guest::{Guest, GuestConfig, HIPRIO, REQUESTS};
use testkit::memory::Region;
use testkit::virtio::ring::Descriptor;
use virtiofs_contract::counters::UnreachableMemory;
use zerocopy::IntoBytes;

use crate::fixture::{Fixture, ROOT, config};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Bytes of `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: u32 = 40;
const OUT_HEADER: u32 = 16;

const UNIQUE: u64 = 4711;
const CONTENTS: &[u8] = b"what the host has";

/// A mounted guest whose second region of memory the engine has lost, and an open file.
struct Host {
    fixture: Fixture,
    missing: Region,
    node: u64,
    fh: u64,
}

/// Where the parts of a request are, each with memory of its own.
struct Places {
    header: u64,
    arguments: u64,
    reply: u64,
    data: u64,
}

impl Host {
    fn new() -> Self {
        let fixture = Fixture::with_guest(config(), |guest| GuestConfig { split_memory: Some(60 << 20), ..guest });
        fixture.write("f", std::str::from_utf8(CONTENTS).unwrap());
        let node = fixture.guest.fuse().lookup(ROOT, "f").unwrap().nodeid;
        let fh = fixture.guest.fuse().open(node, libc::O_RDWR).unwrap().fh;
        let [_, missing] = fixture.guest.memory().regions()[..] else { panic!("two regions") };
        fixture.guest.front_end().unplug(&missing).unwrap();
        Host { fixture, missing, node, fh }
    }

    fn guest(&self) -> &Guest {
        &self.fixture.guest
    }

    /// All of a request in memory that the engine has.
    fn within_reach(&self) -> Places {
        let at = self.guest().scratch();
        Places { header: at, arguments: at + 4096, reply: at + 8192, data: at + 12288 }
    }

    /// Queues a READ of the file with its parts at `places`, behind an indirect table at `table` if there is one.
    /// Returns the used index from before.
    fn queue_read(&self, places: &Places, table: Option<u64>) -> u16 {
        let arguments = read_in(self.fh, 0, 4096);
        self.put_header(places.header, Opcode::Read, self.node, arguments.as_bytes().len() as u32);
        self.guest().memory().write(places.arguments, arguments.as_bytes()).unwrap();
        self.guest().memory().write(places.reply, &[0; OUT_HEADER as usize]).unwrap();
        let parts = [
            (places.header, IN_HEADER, 0),
            (places.arguments, arguments.as_bytes().len() as u32, 0),
            (places.reply, OUT_HEADER, WRITE),
            (places.data, 4096, WRITE),
        ];
        self.queue(REQUESTS, &parts, table)
    }

    fn put_header(&self, at: u64, opcode: Opcode, node: u64, arguments: u32) {
        let mut header = [0; IN_HEADER as usize];
        header[0..4].copy_from_slice(&(IN_HEADER + arguments).to_le_bytes());
        header[4..8].copy_from_slice(&(opcode as u32).to_le_bytes());
        header[8..16].copy_from_slice(&UNIQUE.to_le_bytes());
        header[16..24].copy_from_slice(&node.to_le_bytes());
        self.guest().memory().write(at, &header).unwrap();
    }

    fn queue(&self, ring: u32, parts: &[(u64, u32, u16)], table: Option<u64>) -> u16 {
        let last = parts.len() - 1;
        let chain = parts.iter().enumerate().map(|(index, (address, len, flags))| {
            let (next, more) = if index == last { (0, 0) } else { (index as u16 + 1, NEXT) };
            Descriptor { address: *address, len: *len, flags: flags | more, next }
        });
        let queue = &self.guest().queues()[ring as usize];
        let before = queue.with_ring(|ring, memory| {
            match table {
                None => (0..).zip(chain).for_each(|(index, it)| ring.write_descriptor(index, it).unwrap()),
                Some(table) => {
                    let chain: Vec<_> = chain.collect();
                    memory.write(table, chain.as_bytes()).unwrap();
                    let len = chain.as_bytes().len() as u32;
                    ring.write_descriptor(0, Descriptor { address: table, len, flags: INDIRECT, next: 0 }).unwrap();
                }
            }
            let before = ring.used_index().unwrap();
            ring.publish(0).unwrap();
            before
        });
        queue.kick().unwrap();
        before
    }

    fn used_index(&self, ring: u32) -> u16 {
        self.guest().queues()[ring as usize].with_ring(|ring, _| ring.used_index().unwrap())
    }

    /// Waits until the request that was queued at `before` is done; returns the bytes it says it wrote.
    fn finished(&self, ring: u32, before: u16) -> u32 {
        until("the request is done", || self.used_index(ring) == before.wrapping_add(1));
        self.guest().queues()[ring as usize].with_ring(|ring, memory| {
            let layout = ring.layout();
            let mut length = [0; 4];
            memory.read(layout.used + 4 + 8 * u64::from(before % layout.size) + 4, &mut length).unwrap();
            u32::from_le_bytes(length)
        })
    }

    /// The reply's error, positive, and the request that it says it answers.
    fn replied(&self, at: u64) -> (i32, u64) {
        let mut header = [0; OUT_HEADER as usize];
        self.guest().memory().read(at, &mut header).unwrap();
        let error = i32::from_le_bytes(header[4..8].try_into().unwrap());
        (-error, u64::from_le_bytes(header[8..16].try_into().unwrap()))
    }

    fn data(&self, at: u64) -> Vec<u8> {
        let mut data = vec![0; CONTENTS.len()];
        self.guest().memory().read(at, &mut data).unwrap();
        data
    }

    /// What the engine found out of reach.
    fn reported(&mut self) -> Option<UnreachableMemory> {
        self.fixture.engine().counters.unreachable_memory()
    }

    fn expect_waiting(&mut self, before: u16, from: u64) {
        until("the ring waits", || self.reported().is_some_and(|memory| memory.waiting));
        assert_eq!(self.used_index(REQUESTS), before, "an answer without a header is a success to the guest");
        assert_eq!(self.reported().unwrap().start, from);
    }

    fn expect_served(&self, places: &Places, before: u16) {
        assert_eq!(self.finished(REQUESTS, before), OUT_HEADER + CONTENTS.len() as u32);
        assert_eq!(self.replied(places.reply), (0, UNIQUE));
        assert_eq!(self.data(places.data), CONTENTS);
    }
}

fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(20);
    while !reached() {
        assert!(Instant::now() < patience, "{what}: not within 20 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn unshared_buffers_fail_with_eio_and_are_reported_once() {
    let mut host = Host::new();
    let missing = host.missing.guest;
    for _ in 0..100 {
        let places = Places { data: missing + 4096, ..host.within_reach() };
        let before = host.queue_read(&places, None);
        assert_eq!(host.finished(REQUESTS, before), OUT_HEADER);
        assert_eq!(host.replied(places.reply), (libc::EIO, UNIQUE));
    }
    let memory = UnreachableMemory { start: missing + 4096, end: missing + 8192, requests: 100, waiting: false };
    assert_eq!(host.reported(), Some(memory));
    for lost in [
        Places { header: missing, ..host.within_reach() },
        Places { arguments: missing, ..host.within_reach() },
        Places { header: missing, arguments: missing + 64, ..host.within_reach() },
    ] {
        let before = host.queue_read(&lost, None);
        assert_eq!(host.finished(REQUESTS, before), OUT_HEADER);
        assert_eq!(host.replied(lost.reply).0, libc::EIO);
    }
    assert_eq!(host.fixture.engine().counters.totals().malformed, 0);
    let places = host.within_reach();
    let before = host.queue_read(&places, None);
    host.expect_served(&places, before);
}

#[test]
fn an_unshared_reply_header_is_waited_for() {
    let mut host = Host::new();
    let missing = host.missing;
    for shared_again in [false, true] {
        let places = Places { reply: missing.guest, ..host.within_reach() };
        let before = host.queue_read(&places, None);
        host.expect_waiting(before, missing.guest);
        if shared_again {
            host.guest().front_end().plug(host.guest().memory(), &missing).unwrap();
        } else {
            // It quiesces at once, and the VMM shares all memory with the next one.
            host.fixture.hand_over();
        }
        host.expect_served(&places, before);
        until("the report is over", || host.reported().is_some_and(|memory| !memory.waiting));
        if !shared_again {
            host.guest().front_end().unplug(&missing).unwrap();
        }
    }
}

#[test]
fn an_unshared_descriptor_table_is_waited_for() {
    let mut host = Host::new();
    let (places, missing) = (host.within_reach(), host.missing);
    let before = host.queue_read(&places, Some(missing.guest));
    host.expect_waiting(before, missing.guest);
    host.guest().front_end().plug(host.guest().memory(), &missing).unwrap();
    host.expect_served(&places, before);
}

#[test]
fn an_unshared_forget_is_completed() {
    let mut host = Host::new();
    let missing = host.missing.guest;
    host.put_header(missing, Opcode::Forget, host.node, 8);
    let before = host.queue(HIPRIO, &[(missing, IN_HEADER + 8, 0)], None);
    assert_eq!(host.finished(HIPRIO, before), 0);
    let memory = UnreachableMemory { start: missing, end: missing + 48, requests: 1, waiting: false };
    assert_eq!(host.reported(), Some(memory));
}
