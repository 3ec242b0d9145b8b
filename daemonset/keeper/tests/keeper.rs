//! A real keeper: what it holds, hands out and drops.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

use std::fs;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};

const KEEPER: &str = env!("CARGO_BIN_EXE_virtiofs-keeper");

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < end, "still not so: {what}");
        sleep(Duration::from_millis(5));
    }
}

struct Keeper {
    process: Child,
    directory: PathBuf,
    _scratch: tempfile::TempDir,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn socket(path: &Path, kind: SocketType) -> Option<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(path).unwrap()).ok().map(|()| socket)
}

impl Keeper {
    fn start(options: &[&str]) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("keeper");
        let process = Command::new(KEEPER).arg("--directory").arg(&directory).args(options).spawn().unwrap();
        let keeper = Keeper { process, directory, _scratch: scratch };
        until("the keeper listens", || socket(&keeper.directory.join("fetch"), SocketType::SEQPACKET).is_some());
        keeper
    }

    fn send(&self, text: &str, fds: &[BorrowedFd<'_>]) {
        let store = socket(&self.directory.join("store"), SocketType::DGRAM).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        sendmsg(&store, &[IoSlice::new(text.as_bytes())], &mut ancillary, SendFlags::empty()).unwrap();
    }

    fn store(&self, name: &str, fd: impl AsFd) {
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), &[fd.as_fd()]);
    }

    /// Names with descriptors, and groups that hung up.
    fn fetch(&self) -> (Vec<(String, OwnedFd)>, Vec<String>) {
        self.request("FETCH")
    }

    fn request(&self, request: &str) -> (Vec<(String, OwnedFd)>, Vec<String>) {
        let client = socket(&self.directory.join("fetch"), SocketType::SEQPACKET).unwrap();
        rustix::net::send(&client, request.as_bytes(), SendFlags::empty()).unwrap();
        let (mut held, mut hung_up) = (Vec::new(), Vec::new());
        loop {
            let mut buffer = vec![0; 1 << 16];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received =
                recvmsg(&client, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, RecvFlags::empty()).unwrap();
            let mut fds = Vec::new();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
            let text = String::from_utf8(buffer[..received.bytes].to_vec()).unwrap();
            let mut lines = text.lines().map(str::to_owned);
            match lines.next().as_deref() {
                Some("FDS") => {
                    let names: Vec<String> = lines.collect();
                    assert_eq!(names.len(), fds.len());
                    held.extend(names.into_iter().zip(fds));
                }
                Some("HUNGUP") => hung_up.extend(lines),
                Some("END") => return (held, hung_up),
                other => panic!("{other:?}"),
            }
        }
    }

    fn names(&self) -> Vec<String> {
        self.fetch().0.into_iter().map(|(name, _)| name).collect()
    }

    /// Open files of the keeper that are memfds of this name.
    fn memfds(&self, name: &str) -> usize {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap();
        let links = fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok());
        links.filter(|link| link.to_string_lossy().contains(&format!("memfd:{name}"))).count()
    }
}

fn memory(name: &str) -> OwnedFd {
    memfd_create(name, MemfdFlags::CLOEXEC).unwrap()
}

#[test]
fn descriptors_are_handed_out_by_name_as_often_as_asked() {
    let keeper = Keeper::start(&[]);
    let (mut reader, writer) = std::io::pipe().unwrap();
    keeper.store("g.pipe", &writer);
    drop(writer);
    for number in 0..250 {
        keeper.store(&format!("many.{number}"), memory("many"));
    }
    for _ in 0..2 {
        assert_eq!(keeper.names().len(), 251);
    }
    let (held, _) = keeper.fetch();
    let pipe = held.into_iter().find(|(name, _)| name == "g.pipe").unwrap().1;
    fs::File::from(pipe).write_all(b"through").unwrap();
    let mut text = [0; 7];
    reader.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"through");
    keeper.send("FDSTOREREMOVE=1\nFDNAME=g.pipe", &[]);
    assert_eq!(keeper.names().len(), 250);
    assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0, "the last writer is closed");
}

#[test]
fn prefix_restricts_what_is_handed_out() {
    let keeper = Keeper::start(&[]);
    for name in ["endpoint-1.state", "endpoint-2.state", "session-1.memory"] {
        keeper.store(name, memory("x"));
    }
    let names = |request| -> Vec<String> { keeper.request(request).0.into_iter().map(|(name, _)| name).collect() };
    assert_eq!(names("FETCH endpoint-"), ["endpoint-1.state", "endpoint-2.state"]);
    assert_eq!(names("FETCH nothing"), [""; 0]);
    assert_eq!(names("FETCH").len(), 3);
}

#[test]
fn hang_up_frees_the_memory_of_its_group_only() {
    let keeper = Keeper::start(&[]);
    let (vmm, broker) = UnixStream::pair().unwrap();
    let (_other_vmm, other) = UnixStream::pair().unwrap();
    keeper.store("session-1.memory", memory("dead-vm"));
    keeper.send("FDSTORE=1\nFDNAME=session-1.vmm", &[broker.as_fd()]);
    keeper.store("session-2.memory", memory("live-vm"));
    keeper.send("FDSTORE=1\nFDNAME=session-2.vmm", &[other.as_fd()]);
    until("both are held", || keeper.memfds("dead-vm") + keeper.memfds("live-vm") == 2);
    drop(broker);
    drop(vmm);
    until("the memory is freed", || keeper.memfds("dead-vm") == 0);
    assert_eq!(keeper.memfds("live-vm"), 1);
    assert_eq!(keeper.fetch().1, ["session-1"]);
    keeper.send("FDSTOREREMOVE=1\nFDNAME=session-1.vmm", &[]);
    assert_eq!(keeper.fetch().1, Vec::<String>::new());
    assert_eq!(keeper.names(), ["session-2.memory", "session-2.vmm"]);
}

/// Sends a descriptor to a peer that does not read it.
fn leave_unread(socket: &UnixStream, fd: impl AsFd) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(socket, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::empty()).unwrap();
}

/// A socket whose close blocks for ten minutes: it lingers for data that its peer does not read.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let peer = listener.accept().unwrap().0;
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 1 << 16]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(600))).unwrap();
    (socket, peer)
}

#[test]
fn socket_that_lingers_pins_neither_its_session_nor_others() {
    let keeper = Keeper::start(&[]);
    let (vmm, broker) = UnixStream::pair().unwrap();
    let (other_vmm, other) = UnixStream::pair().unwrap();
    // It is closed with the connection in whose queue it is, and by whoever closes that.
    let (socket, _peer) = lingering();
    leave_unread(&vmm, &socket);
    drop(socket);
    keeper.send("FDSTORE=1\nFDNAME=session-1.vmm", &[broker.as_fd()]);
    keeper.store("session-1.memory", memory("hostile-vm"));
    keeper.send("FDSTORE=1\nFDNAME=session-2.vmm", &[other.as_fd()]);
    keeper.store("session-2.memory", memory("dead-vm"));
    until("both are held", || keeper.memfds("hostile-vm") + keeper.memfds("dead-vm") == 2);
    drop(broker);
    drop(vmm);
    until("the memory is freed", || keeper.memfds("hostile-vm") == 0);
    drop(other);
    drop(other_vmm);
    until("so is that of another session", || keeper.memfds("dead-vm") == 0);
    assert_eq!(keeper.fetch().1, ["session-1", "session-2"]);
}

#[test]
fn descriptor_that_is_not_polled_stays_after_a_hang_up() {
    let keeper = Keeper::start(&[]);
    let (near, far) = UnixStream::pair().unwrap();
    keeper.store("g.socket", &far);
    drop((near, far));
    assert_eq!(keeper.names(), ["g.socket"]);
}

#[test]
fn same_open_file_is_stored_once_under_a_name() {
    let keeper = Keeper::start(&[]);
    let file = memory("twice");
    keeper.store("g.a", &file);
    keeper.store("g.a", &file);
    keeper.store("g.b", &file);
    keeper.store("g.a", memory("other"));
    assert_eq!(keeper.names(), ["g.a", "g.b", "g.a"]);
}

#[test]
fn limits_and_invalid_messages_leave_the_rest() {
    let keeper = Keeper::start(&["--max-descriptors", "2"]);
    keeper.store("g.1", memory("x"));
    keeper.store("g:2", memory("x"));
    keeper.send("FDSTORE=1", &[memory("x").as_fd()]);
    keeper.send(&"x".repeat(5000), &[memory("x").as_fd()]);
    keeper.store("g.3", memory("x"));
    keeper.store("g.4", memory("x"));
    assert_eq!(keeper.names(), ["g.1", "g.3"]);
    assert_eq!(keeper.memfds("x"), 2, "refused descriptors are closed");
}

#[test]
fn keeper_has_no_capability_and_no_rival() {
    let keeper = Keeper::start(&[]);
    let status = fs::read_to_string(format!("/proc/{}/status", keeper.process.id())).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let line = status.lines().find(|line| line.starts_with(set)).unwrap();
        assert!(line.ends_with("\t0000000000000000"), "{line}");
    }
    assert!(status.contains("NoNewPrivs:\t1"));
    let mut rival = Command::new(KEEPER);
    let rival = rival.arg("--directory").arg(&keeper.directory).stderr(Stdio::piped()).output().unwrap();
    let text = String::from_utf8(rival.stderr).unwrap();
    assert!(!rival.status.success() && text.contains("another keeper"), "{text}");
    keeper.store("g.1", memory("x"));
    assert_eq!(keeper.names(), ["g.1"], "the rival took nothing away");
}
