//! A FUSE file system that responds on request, like a network file system whose server is down.

use std::collections::BTreeMap;
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
const SETATTR: u32 = 4;
const MKNOD: u32 = 8;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
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
const RENAME2: u32 = 45;

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

/// The mounted file system; its root has the file `hello`, and what is created with mknod. Dropping it fails all hanging requests.
pub(crate) struct HangingMount {
    path: PathBuf,
    gate: Arc<Gate>,
}

struct Gate {
    hangs: Mutex<(Hangs, usize)>,
    changed: Condvar,
    nodes: Mutex<Nodes>,
}

/// The files of the root by name, and their modes by number. A number is not used twice.
struct Nodes {
    names: BTreeMap<Vec<u8>, u64>,
    modes: BTreeMap<u64, u32>,
}

impl HangingMount {
    /// None if mounting is not permitted.
    pub(crate) fn at(path: &Path, hangs: Hangs) -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        mount(Some("hanging"), path, Some("fuse.hanging"), MsFlags::empty(), Some(options.as_str())).ok()?;
        let gate =
            Arc::new(Gate { hangs: Mutex::new((hangs, 0)), changed: Condvar::new(), nodes: Mutex::new(Nodes::new()) });
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
            if let Some(reply) = answer(&request, &mut gate.nodes.lock().unwrap()) {
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

/// The names at the end of a request, each with a zero byte behind it.
fn names(body: &[u8]) -> Vec<Vec<u8>> {
    body.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect()
}

impl Nodes {
    fn new() -> Self {
        let mut nodes = Nodes { names: BTreeMap::new(), modes: BTreeMap::from([(ROOT, 0o040_755)]) };
        nodes.create(b"hello".to_vec(), 0o100_644);
        nodes
    }

    fn create(&mut self, name: Vec<u8>, mode: u32) -> u64 {
        let node = self.modes.last_key_value().unwrap().0 + 1;
        self.names.insert(name, node);
        self.modes.insert(node, mode);
        node
    }

    fn rename(&mut self, names: &[Vec<u8>]) -> i32 {
        let Some(node) = self.names.remove(&names[0]) else { return -libc::ENOENT };
        self.names.insert(names[1].clone(), node);
        0
    }

    fn entry(&self, node: u64) -> Vec<u8> {
        let mut body = node.to_le_bytes().to_vec();
        body.resize(40, 0);
        [body, self.attributes(node)].concat()
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, size) = (self.modes[&node], if node == HELLO { TEXT.len() as u64 } else { 0 });
        let mut body = Vec::new();
        for field in [node, size, 1, 0, 0, 0] {
            body.extend_from_slice(&field.to_le_bytes());
        }
        for field in [0u32, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
            body.extend_from_slice(&field.to_le_bytes());
        }
        body
    }
}

fn answer(request: &[u8], nodes: &mut Nodes) -> Option<Vec<u8>> {
    let (unique, node, body) = (word(request, 8), word(request, 16), &request[40..]);
    let attributes = |nodes: &Nodes| (0, [vec![0; 16], nodes.attributes(node)].concat());
    let (error, body) = match opcode(request) {
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        INIT => (0, init()),
        LOOKUP => match nodes.names.get(&names(body)[0]) {
            Some(found) => (0, nodes.entry(*found)),
            None => (-libc::ENOENT, vec![]),
        },
        GETATTR => attributes(nodes),
        SETATTR => {
            let field = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
            // FATTR_MODE
            if field(0) & 1 != 0 {
                let mode = nodes.modes.get_mut(&node).unwrap();
                *mode = *mode & !0o7777 | field(68) & 0o7777;
            }
            attributes(nodes)
        }
        MKNOD => {
            let mode = u32::from_le_bytes(body[..4].try_into().unwrap());
            let node = nodes.create(names(&body[16..]).remove(0), mode);
            (0, nodes.entry(node))
        }
        UNLINK => (nodes.names.remove(&names(body)[0]).map_or(-libc::ENOENT, |_| 0), vec![]),
        RENAME => (nodes.rename(&names(&body[8..])), vec![]),
        RENAME2 => (nodes.rename(&names(&body[16..])), vec![]),
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
