//! A FUSE file system that responds on request, like a network file system whose server is down.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const ROOT: u64 = 1;
const HELLO: u64 = 2;
const TEXT: &[u8] = b"from the host\n";

/// Requests that hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hangs {
    Nothing,
    Reads,
    Everything,
}

/// The mounted file system; its root has the file `hello`. Dropping it fails all hanging requests.
pub(crate) struct HangingMount {
    path: PathBuf,
    gate: Arc<Gate>,
}

struct Gate {
    hangs: Mutex<(Hangs, usize)>,
    changed: Condvar,
}

impl HangingMount {
    /// None if mounting is not permitted.
    pub(crate) fn at(path: &Path, hangs: Hangs) -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        mount(Some("hanging"), path, Some("fuse.hanging"), MsFlags::empty(), Some(options.as_str())).ok()?;
        let gate = Arc::new(Gate { hangs: Mutex::new((hangs, 0)), changed: Condvar::new() });
        let device = Arc::new(device);
        let serving = gate.clone();
        thread::spawn(move || serve(&device, &serving));
        Some(HangingMount { path: path.into(), gate })
    }

    /// Sets which requests hang, and answers the others that hung before.
    pub(crate) fn set(&self, hangs: Hangs) {
        self.gate.hangs.lock().unwrap().0 = hangs;
        self.gate.changed.notify_all();
    }

    /// Number of hanging requests.
    pub(crate) fn hanging(&self) -> usize {
        self.gate.hangs.lock().unwrap().1
    }
}

impl Drop for HangingMount {
    fn drop(&mut self) {
        self.set(Hangs::Nothing);
        let _ = umount2(&self.path, MntFlags::MNT_FORCE);
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

/// Serves requests until it is unmounted; a hanging request waits in a thread of its own.
fn serve(device: &Arc<File>, gate: &Arc<Gate>) {
    let mut buffer = vec![0u8; 1 << 17];
    while let Ok(length) = (&**device).read(&mut buffer) {
        let request = buffer[..length].to_vec();
        let (device, gate) = (device.clone(), gate.clone());
        thread::spawn(move || {
            gate.pass(opcode(&request));
            if let Some(reply) = answer(&request) {
                let _ = (&*device).write(&reply);
            }
        });
    }
}

impl Gate {
    fn pass(&self, opcode: u32) {
        let closed = |hangs: Hangs| match hangs {
            Hangs::Nothing => false,
            Hangs::Reads => opcode == READ,
            Hangs::Everything => true,
        };
        let mut state = self.hangs.lock().unwrap();
        if closed(state.0) {
            state.1 += 1;
            state = self.changed.wait_while(state, |state| closed(state.0)).unwrap();
            state.1 -= 1;
        }
    }
}

fn opcode(request: &[u8]) -> u32 {
    u32::from_le_bytes(request[4..8].try_into().unwrap())
}

fn word(request: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(request[at..at + 8].try_into().unwrap())
}

fn answer(request: &[u8]) -> Option<Vec<u8>> {
    let (unique, node, body) = (word(request, 8), word(request, 16), &request[40..]);
    let (error, body) = match opcode(request) {
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        INIT => (0, init()),
        LOOKUP if node == ROOT && body.starts_with(b"hello\0") => (0, entry()),
        LOOKUP => (-libc::ENOENT, vec![]),
        GETATTR => (0, [vec![0; 16], attributes(node)].concat()),
        OPEN | OPENDIR => (0, vec![0; 16]),
        READ if word(body, 8) == 0 => (0, TEXT.to_vec()),
        READ | READDIR => (0, vec![]),
        RELEASE | RELEASEDIR | FLUSH => (0, vec![]),
        STATFS => (0, vec![0; 80]),
        _ => (-libc::ENOSYS, vec![]),
    };
    let mut reply = Vec::new();
    reply.extend_from_slice(&(16 + body.len() as u32).to_le_bytes());
    reply.extend_from_slice(&error.to_le_bytes());
    reply.extend_from_slice(&unique.to_le_bytes());
    reply.extend_from_slice(&body);
    Some(reply)
}

/// A minimal reply for FUSE 7.31.
fn init() -> Vec<u8> {
    let mut body = Vec::new();
    for field in [7u32, 31, 0, 0] {
        body.extend_from_slice(&field.to_le_bytes());
    }
    body.extend_from_slice(&[12, 0, 9, 0]);
    body.extend_from_slice(&(64u32 << 10).to_le_bytes());
    body.resize(64, 0);
    body
}

fn entry() -> Vec<u8> {
    let mut body = HELLO.to_le_bytes().to_vec();
    body.resize(40, 0);
    [body, attributes(HELLO)].concat()
}

fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = if node == ROOT { (0o040_755u32, 0) } else { (0o100_644, TEXT.len() as u64) };
    let mut body = Vec::new();
    for field in [node, size, 1, 0, 0, 0] {
        body.extend_from_slice(&field.to_le_bytes());
    }
    for field in [0u32, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
        body.extend_from_slice(&field.to_le_bytes());
    }
    body
}
