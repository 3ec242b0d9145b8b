//! VMMs that send what blocks whoever writes, reads or closes it: their sessions end at once, and others notice nothing.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use common::fuse::{HangingMount, Hangs};
use common::{Broker, boot, read_hello, runs, threads_stand_still, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::{EventfdFlags, eventfd};
use testkit::guest::REQUESTS;
use testkit::memory::GuestMemory;
use testkit::skip::require;
use testkit::vhost::connection::{Connection, Request, VERSION};
use virtiofs_contract::control::{Request as Control, Response, SessionState};

/// Far below the time for which the hostile descriptors block.
const PROMPT: Duration = Duration::from_secs(20);

/// A socket whose close blocks for an hour, or until its peer is gone.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let peer = listener.accept().unwrap().0;
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 1 << 16]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::from_secs(3600))).unwrap();
    (socket.into(), peer)
}

fn connect(broker: &Broker, name: &str) -> Connection {
    Connection::connect(&broker.endpoint(name).socket.path, PROMPT).unwrap()
}

/// Sends a message with a lingering socket while the broker stands still, so that the broker has the last copy of the socket.
/// Returns the peer of the socket.
fn send_last_copy(broker: &Broker, connection: &mut Connection, request: Request, body: &[u8]) -> TcpStream {
    send_last_copies(broker, connection, request, body, 1).remove(0)
}

fn send_last_copies(
    broker: &Broker,
    connection: &mut Connection,
    request: Request,
    body: &[u8],
    count: usize,
) -> Vec<TcpStream> {
    let (sockets, peers): (Vec<OwnedFd>, Vec<TcpStream>) = (0..count).map(|_| lingering()).unzip();
    let process = Pid::from_raw(broker.pid() as i32);
    kill(process, Signal::SIGSTOP).unwrap();
    until("the broker stands still", || threads_stand_still(broker.pid()));
    let fds: Vec<_> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    connection.send(request, VERSION, body, &fds).unwrap();
    drop(sockets);
    kill(process, Signal::SIGCONT).unwrap();
    peers
}

/// A connection that has begun a session, with guest memory.
fn session_with_memory(broker: &Broker, name: &str) -> (Connection, GuestMemory) {
    let mut connection = connect(broker, name);
    let memory = GuestMemory::create(8 << 20, None).unwrap();
    connection.send(Request::SET_PROTOCOL_FEATURES, VERSION, &(1u64 << 15).to_le_bytes(), &[]).unwrap();
    let region = memory.regions().remove(0);
    let words = [0, region.guest, region.size, region.user, region.offset];
    let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    connection.send(Request::ADD_MEM_REG, VERSION, &body, &[memory.fd()]).unwrap();
    until("the broker has the memory", || broker.status_of(name).sessions.iter().any(|it| it.guest_memory > 0));
    (connection, memory)
}

#[test]
fn rejected_guest_memory_is_counted_with_its_reason() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let (mut connection, _memory) = session_with_memory(&broker, "data");
    // A file that is not open for writing, for instance: it is not shared memory.
    let file = File::open("/proc/self/exe").unwrap();
    let words = [0u64, 1 << 32, 4096, 1 << 40, 0];
    let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    connection.send(Request::ADD_MEM_REG, VERSION, &body, &[file.as_raw_fd()]).unwrap();
    until("it is rejected", || broker.status_of("data").rejected_memory == 1);
    let status = broker.status_of("data");
    let message = status.last_rejection.unwrap().message;
    assert!(message.contains("memfd") && status.sessions.is_empty(), "{message}");
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
    assert_eq!(broker.status_of("data").rejected_memory, 1);
}

/// Number of descriptors of this file that a process holds.
fn holds(pid: u32, file: &impl AsRawFd) -> usize {
    let identity = |path: &str| fs::metadata(path).map(|it| (std::os::unix::fs::MetadataExt::ino(&it), it.len())).ok();
    let own = identity(&format!("/proc/self/fd/{}", file.as_raw_fd()));
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    entries.filter(|entry| identity(entry.path().to_str().unwrap()) == own).count()
}

struct RawFd(i32);

impl AsRawFd for RawFd {
    fn as_raw_fd(&self) -> i32 {
        self.0
    }
}

/// Every message that can carry a descriptor which the broker does not use, so that the kernel closes it.
const CARRIERS: [(Request, usize); 4] =
    [(Request::SET_FEATURES, 8), (Request::SET_OWNER, 0), (Request::GET_FEATURES, 0), (Request::SET_VRING_NUM, 8)];

#[test]
fn session_whose_vmm_sends_lingering_sockets_ends_on_request() {
    let broker = Broker::start();
    let other = boot(&broker.share("other"));
    for (request, body) in CARRIERS {
        broker.share("data");
        let (mut connection, memory) = session_with_memory(&broker, "data");
        let mut body = vec![0; body];
        if request == Request::SET_VRING_NUM {
            body[4] = 128;
        }
        let _peer = send_last_copy(&broker, &mut connection, request, &body);
        assert_eq!(read_hello(&other), "from the host\n");
        let begin = Instant::now();
        broker.control().remove("data", true);
        assert!(broker.control().status().endpoints.iter().all(|it| it.endpoint.name != "data"), "{request:?}");
        assert!(begin.elapsed() < PROMPT, "{request:?}: {:?}", begin.elapsed());
        until("its memory is released", || holds(broker.pid(), &RawFd(memory.fd())) == 0);
    }
}

#[test]
fn session_ends_with_its_vmm_whatever_the_vmm_sent() {
    let broker = Broker::start();
    broker.share("data");
    let (mut connection, memory) = session_with_memory(&broker, "data");
    let _peer = send_last_copy(&broker, &mut connection, Request::SET_OWNER, &[]);
    drop(connection);
    until("the session is over", || broker.status_of("data").sessions.is_empty());
    until("its memory is released", || holds(broker.pid(), &RawFd(memory.fd())) == 0);
    assert_eq!(read_hello(&boot(&broker.endpoint("data"))), "from the host\n");
}

#[test]
fn rejected_descriptors_are_closed_by_nobody_who_is_waited_for() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut peers = Vec::new();
    for (request, body) in [(Request::SET_VRING_KICK, vec![0; 8]), (Request::SET_VRING_CALL, vec![0; 8])] {
        let mut connection = connect(&broker, "data");
        peers.extend(send_last_copies(&broker, &mut connection, request, &body, 8));
    }
    until("both are rejected", || broker.status_of("data").rejected_connections == 2);
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn connection_that_wedges_before_it_is_a_session_is_given_up() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut open = Vec::new();
    for _ in 0..12 {
        let mut connection = Connection::connect(&endpoint.socket.path, PROMPT).unwrap();
        let peer = send_last_copy(&broker, &mut connection, Request::SET_OWNER, &[]);
        open.push((connection, peer));
    }
    until("nothing is left of them", || {
        broker.control().request(&Control::Close { name: "data".into(), session: None });
        broker.status_of("data").sessions.is_empty()
    });
    drop(open);
    until("VMs can connect", || {
        Connection::connect(&endpoint.socket.path, PROMPT).is_ok_and(|mut it| it.request(Request::GET_FEATURES).is_ok())
    });
}

#[test]
fn full_blocking_eventfd_does_not_hold_the_session() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
    let full = || {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event
    };
    let (call, kick) = (full(), full());
    {
        let mut front_end = guest.front_end();
        front_end.ring_fd(Request::SET_VRING_CALL, REQUESTS, call.as_fd()).unwrap();
        front_end.ring_fd(Request::SET_VRING_KICK, REQUESTS, kick.as_fd()).unwrap();
    }
    // The broker makes them non-blocking; a hostile VMM undoes that.
    std::thread::sleep(Duration::from_millis(300));
    for event in [&call, &kick] {
        rustix::io::ioctl_fionbio(event, false).unwrap();
        let _ = rustix::io::write(event, &0u64.to_ne_bytes());
    }
    kill(Pid::from_raw(engine as i32), Signal::SIGKILL).unwrap();
    until("its engine is gone", || !runs(engine));
    let begin = Instant::now();
    broker.control().remove("data", true);
    assert!(broker.control().status().endpoints.is_empty());
    assert!(begin.elapsed() < PROMPT, "{:?}", begin.elapsed());
    until("the memory is released", || holds(broker.pid(), &RawFd(guest.memory().fd())) == 0);
}

#[test]
fn memory_on_fuse_is_refused_without_asking_its_server() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let other = boot(&endpoint);
    let scratch = tempfile::tempdir().unwrap();
    // Closed after the unmount, also if the test fails: a close waits for the server.
    let file;
    let Some(mount) =
        require("the right to mount a FUSE file system", HangingMount::at(scratch.path(), Hangs::Nothing))
    else {
        return;
    };
    file = File::options().read(true).write(true).open(scratch.path().join("hello")).unwrap();
    mount.set(Hangs::Everything);
    let mut connection = connect(&broker, "data");
    connection.send(Request::SET_PROTOCOL_FEATURES, VERSION, &(1u64 << 15).to_le_bytes(), &[]).unwrap();
    let body: Vec<u8> = [0, 0, 4096, 1 << 40, 0].iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
    connection.send(Request::ADD_MEM_REG, VERSION, &body, &[file.as_raw_fd()]).unwrap();
    until("its session is over", || broker.status_of("data").sessions.len() == 1);
    until("it is rejected before the server is asked", || broker.log().contains("guest memory must be a memfd"));
    assert_eq!(read_hello(&other), "from the host\n");
    mount.set(Hangs::Nothing);
}

#[test]
fn memory_may_be_a_file_on_tmpfs() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let scratch = tempfile::Builder::new().tempdir_in("/dev/shm").unwrap();
    let file =
        File::options().read(true).write(true).create(true).truncate(true).open(scratch.path().join("m")).unwrap();
    file.set_len(1 << 20).unwrap();
    let mut connection = Connection::connect(&endpoint.socket.path, PROMPT).unwrap();
    connection.send(Request::SET_PROTOCOL_FEATURES, VERSION, &(1u64 << 15).to_le_bytes(), &[]).unwrap();
    let body: Vec<u8> = [0, 0, 1 << 20, 1 << 40, 0].iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
    connection.send(Request::ADD_MEM_REG, VERSION, &body, &[file.as_raw_fd()]).unwrap();
    until("it is accepted", || broker.status_of("data").sessions.iter().any(|it| it.guest_memory == 1 << 20));
}

#[test]
fn close_ends_half_open_connections_and_reports_what_ended() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let mut trickling = connect(&broker, "data");
    trickling.stream().write_all(&[2, 0, 0, 0]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let id = broker.session_of("data").id;
    let closed = broker.control().request(&Control::Close { name: "data".into(), session: None });
    assert_eq!(closed, Response::Closed { sessions: vec![id] });
    assert!(broker.status_of("data").sessions.is_empty());
    trickling.reply(Request::GET_FEATURES).unwrap_err();
    drop(guest);
}

/// Processor time that a process has used, in ticks of 10 ms.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn flood_of_messages_is_slowed_down() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let mut hostile = connect(&broker, "data");
    hostile.stream().set_write_timeout(Some(Duration::from_millis(100))).unwrap();
    let end = Instant::now() + Duration::from_secs(3);
    let mut sent = 0;
    let before = ticks(broker.pid());
    while Instant::now() < end {
        sent += u32::from(hostile.send(Request::SET_OWNER, VERSION, &[], &[]).is_ok());
    }
    let used = ticks(broker.pid()) - before;
    assert_eq!(read_hello(&guest), "from the host\n");
    let answered = |connection: &mut Connection| connection.request(Request::GET_FEATURES).is_ok();
    assert!(answered(&mut connect(&broker, "data")), "another VMM is answered");
    assert!(used < 100, "{used} ticks of the broker for {sent} messages in 3 s");
    until("only the other VMM has left", || broker.status_of("data").sessions.len() == 2);
    assert!(sent > 0 && hostile.stream().take_error().unwrap().is_none(), "it is slowed down, not rejected");
}

/// Time in which a guest mounts a share.
fn mount_time(endpoint: &virtiofs_contract::control::Endpoint) -> Duration {
    let begin = Instant::now();
    let guest = boot(endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    begin.elapsed()
}

#[test]
fn reconnect_storm_does_not_delay_the_mounts_of_others() {
    let broker = Broker::start();
    let (stormy, calm) = (broker.share("stormy"), broker.share("calm"));
    let quiet = (0..5).map(|_| mount_time(&calm)).max().unwrap();
    let path = stormy.socket.path.clone();
    let storm = std::thread::spawn(move || {
        for _ in 0..600 {
            let mut connection = Connection::connect(&path, PROMPT).unwrap();
            let _ = connection.send(Request::SET_OWNER, VERSION, &[], &[]);
            std::thread::sleep(Duration::from_millis(3));
        }
    });
    std::thread::sleep(Duration::from_millis(200));
    let during: Vec<Duration> = (0..10).map(|_| mount_time(&calm)).collect();
    let longest = during.iter().max().unwrap();
    println!("mount alone: {quiet:?}; during the storm: {during:?}");
    assert!(*longest < 10 * quiet + Duration::from_millis(300), "{during:?}, alone {quiet:?}");
    storm.join().unwrap();
    let log = broker.log();
    let lines = log.lines().filter(|line| line.contains("stormy")).count();
    assert!(lines < 600, "{lines} lines about the storm");
    until("the storm is over", || broker.status_of("stormy").sessions.is_empty());
    assert!(mount_time(&stormy) < PROMPT);
}

#[test]
fn pod_with_many_silent_volumes_leaves_room_for_others() {
    let broker = Broker::start();
    let other = broker.share("other");
    let first = broker.endpoint("images");
    broker.control().apply(&first).unwrap();
    let mut silent = Vec::new();
    for number in 0..20 {
        let mut volume = first.clone();
        volume.name = format!("volume-{number}");
        volume.kind = virtiofs_contract::control::EndpointKind::Volume;
        volume.consumer = Some("pod vms/evil".into());
        let directory = broker.runtime_dir().with_file_name(&volume.name);
        fs::create_dir(&directory).unwrap();
        volume.socket.path = directory.join("virtiofs.sock");
        broker.control().apply_in(&volume, &directory).unwrap();
        silent.extend((0..4).map(|_| Connection::connect(&volume.socket.path, PROMPT).unwrap()));
    }
    until("most are rejected, whichever volume they came to", || {
        let rejected = |it: &virtiofs_contract::control::EndpointStatus| it.rejected_connections;
        broker.control().status().endpoints.iter().map(rejected).sum::<u64>() >= 80 - 16
    });
    let message = broker.status_of("volume-19").last_rejection.unwrap().message;
    assert!(message.contains("pod vms/evil"), "{message}");
    assert_eq!(read_hello(&boot(&other)), "from the host\n");
    assert_eq!(read_hello(&boot(&first)), "from the host\n");
}

#[test]
fn long_names_of_guests_leave_the_status_readable() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let directory = "\u{1}".repeat(250);
    let name = |number: usize| format!("{}{number:05}", "\u{2}".repeat(240));
    fs::create_dir(endpoint.source.join(&directory)).unwrap();
    for number in 0..32 {
        fs::write(endpoint.source.join(&directory).join(name(number)), "").unwrap();
    }
    let guests: Vec<_> = (0..30).map(|_| boot(&endpoint)).collect();
    let parents: Vec<u64> = guests
        .iter()
        .map(|guest| {
            let parent = guest.fuse().lookup(1, &directory).unwrap().nodeid;
            (0..32).for_each(|number| assert!(guest.fuse().lookup(parent, name(number)).is_ok()));
            parent
        })
        .collect();
    for number in 0..32 {
        fs::remove_file(endpoint.source.join(&directory).join(name(number))).unwrap();
    }
    for (guest, parent) in guests.iter().zip(parents) {
        (0..32).for_each(|number| assert!(guest.fuse().lookup(parent, name(number)).is_err()));
    }
    let events = |it: &virtiofs_contract::control::SessionStatus| it.stale_events.len();
    until("every session has many stale events", || {
        let sessions = broker.status_of("data").sessions;
        sessions.len() == guests.len() && sessions.iter().all(|session| events(session) >= 32)
    });
    let first = broker.control().request(&Control::Status { after: None });
    let Response::Status(first) = first else { panic!("{first:?}") };
    assert!(first.next.is_some(), "one page has them all");
    assert!(serde_json::to_vec(&first).unwrap().len() < 2 << 20);
    assert_eq!(read_hello(&guests[0]), "from the host\n");
}
