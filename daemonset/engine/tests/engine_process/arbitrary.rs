//! Arbitrary requests on a real engine: each is answered, and none ends the engine or leaves the source.

use std::fs;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use testkit::fuse::call::{Call, CallError};
use testkit::fuse::wire::Opcode;

use crate::fixture::{Fixture, ROOT, config};

/// Requests per seed; the seeds that found faults are kept.
const REQUESTS: u32 = 4000;
const SEEDS: [u64; 4] = [1, 2, 3, 4];

/// Requests after which the engine is replaced.
const REPLACED_AFTER: u32 = 500;

const OPCODES: [Opcode; 34] = [
    Opcode::Lookup,
    Opcode::Getattr,
    Opcode::Setattr,
    Opcode::Readlink,
    Opcode::Symlink,
    Opcode::Mknod,
    Opcode::Mkdir,
    Opcode::Unlink,
    Opcode::Rmdir,
    Opcode::Rename,
    Opcode::Link,
    Opcode::Open,
    Opcode::Read,
    Opcode::Write,
    Opcode::Statfs,
    Opcode::Release,
    Opcode::Fsync,
    Opcode::Setxattr,
    Opcode::Getxattr,
    Opcode::Listxattr,
    Opcode::Removexattr,
    Opcode::Flush,
    Opcode::Opendir,
    Opcode::Readdir,
    Opcode::Releasedir,
    Opcode::Fsyncdir,
    Opcode::Access,
    Opcode::Create,
    Opcode::Fallocate,
    Opcode::Readdirplus,
    Opcode::Rename2,
    Opcode::Lseek,
    Opcode::CopyFileRange,
    Opcode::Tmpfile,
];

/// What the requests are made of: ids that exist, and the limits of numbers.
struct Material {
    rng: StdRng,
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Material {
    fn node(&mut self) -> u64 {
        if self.rng.random_range(0..10) == 0 { self.number() } else { *self.nodes.choose(&mut self.rng).unwrap() }
    }

    /// Small, or beyond what a file can be long: nothing in between fills a disk.
    fn number(&mut self) -> u64 {
        let limits = [0, 1, 1 << 31, 1 << 32, (1 << 62) + 1, i64::MAX as u64, 1 << 63, u64::MAX];
        match self.rng.random_range(0..4) {
            0 => *limits.choose(&mut self.rng).unwrap(),
            1 => *self.handles.choose(&mut self.rng).unwrap(),
            2 => *self.nodes.choose(&mut self.rng).unwrap(),
            _ => self.rng.random_range(0..70_000),
        }
    }

    /// A structure of arbitrary words, and names behind it; sometimes cut off.
    fn body(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        for _ in 0..self.rng.random_range(0..8) {
            let number = self.number();
            if self.rng.random_range(0..3) == 0 {
                body.extend((number as u32).to_le_bytes());
            } else {
                body.extend(number.to_le_bytes());
            }
        }
        for _ in 0..self.rng.random_range(0..3) {
            let names: [&[u8]; 12] =
                [b"a", b"b", b"c", b"hello", b"sub", b"..", b".", b"", b"/", b"../outside", b"user.x", &[b'n'; 300]];
            body.extend(*names.choose(&mut self.rng).unwrap());
            body.push(0);
        }
        if self.rng.random_range(0..10) == 0 {
            let cut = self.rng.random_range(0..=body.len());
            body.truncate(cut);
        }
        body
    }
}

/// True if the request succeeded.
///
/// # Errors
/// If it was not answered.
fn is_success(result: Result<(), CallError>) -> Result<bool, CallError> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.is_hung() || error.is_disconnected() || error.is_lost_wakeup() => Err(error),
        // Whatever the answer is: the testkit also checks its length, and does not know what was asked for here.
        _ => Ok(false),
    }
}

fn arbitrary_requests(seed: u64) {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    fs::create_dir_all(source.join("sub")).unwrap();
    fs::write(source.join("hello"), "from the host").unwrap();
    fs::write(directory.path().join("outside"), "outside").unwrap();
    let outside = directory.path().join("outside");
    let mut fixture = Fixture::on(directory, source, config());
    let mut material = Material { rng: StdRng::seed_from_u64(seed), nodes: vec![ROOT], handles: vec![0] };
    for name in ["hello", "sub"] {
        material.nodes.push(fixture.guest.fuse().lookup(ROOT, name).unwrap().nodeid);
    }
    material.handles.push(fixture.guest.fuse().open(material.nodes[1], libc::O_RDWR).unwrap().fh);
    material.handles.push(fixture.guest.fuse().opendir(ROOT).unwrap().fh);
    let mut succeeded = 0;
    for number in 1..=REQUESTS {
        let op = *OPCODES.choose(&mut material.rng).unwrap();
        let (node, body) = (material.node(), material.body());
        let room = *[0, 16, 64, 128, 4096, 70_000].choose(&mut material.rng).unwrap();
        let parts = [body.as_slice()];
        let mut call = Call::new(op, node, &parts).receiving(room);
        if material.rng.random_range(0..20) == 0 {
            call = call.unanswered();
        }
        let answered = fixture.guest.fuse().call(&call).map(drop);
        let success =
            is_success(answered).unwrap_or_else(|error| panic!("seed {seed}, request {number}: {error}; {body:?}"));
        succeeded += u32::from(success);
        if number % REPLACED_AFTER == 0 {
            if material.rng.random_range(0..2) == 0 { fixture.kill() } else { fixture.hand_over() }
        }
    }
    assert_eq!(fs::read_to_string(outside).unwrap(), "outside");
    let beside: Vec<_> = fs::read_dir(fixture.path().parent().unwrap()).unwrap().collect();
    assert_eq!(beside.len(), 2, "{beside:?}");
    fixture.guest.fuse().getattr(ROOT, None).unwrap();
    assert!(succeeded > REQUESTS / 20, "only {succeeded} reached the file system");
}

#[test]
fn arbitrary_requests_are_answered() {
    for seed in SEEDS {
        arbitrary_requests(seed);
    }
}

/// `ARBITRARY_SEED=N cargo test -p virtiofs-engine --test engine_process -- --ignored arbitrary` continues from that seed.
#[test]
#[ignore = "runs until it is stopped or finds a fault"]
fn arbitrary_requests_for_ever() {
    let first = std::env::var("ARBITRARY_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    for seed in first.. {
        arbitrary_requests(seed);
    }
}
