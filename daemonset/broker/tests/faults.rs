//! Engines that are slow, silent or die, and VMMs that violate the protocol: only their own session is affected.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{Broker, boot, read_hello, runs, threads_stand_still, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::{Guest, GuestConfig};
use testkit::memory::GuestMemory;
use testkit::vhost::connection::Connection;
use vhost::vhost_user::message::FrontendReq;
use virtiofs_contract::control::SessionState;
use virtiofs_contract::preflight::Reason;

const VERSION: u32 = 1;
const SHORT: Duration = Duration::from_secs(20);

#[test]
fn engine_that_cannot_start_is_a_finding() {
    let broker = Broker::start_with_script("echo no luck today >&2; exit 3");
    let finding = broker.control().apply(&broker.endpoint("data")).unwrap_err();
    assert_eq!(finding.reason, Reason::EngineFailed);
    assert!(finding.message.contains("exit status 3") && finding.message.contains("no luck today"), "{finding}");
}

#[test]
fn missing_engine_is_a_finding() {
    let broker = Broker::start_with_script("exit 0");
    let endpoint = broker.endpoint("data");
    fs::remove_file(broker.runtime_dir().with_file_name("engine.sh")).unwrap();
    let finding = broker.control().apply(&endpoint).unwrap_err();
    assert_eq!(finding.reason, Reason::EngineFailed);
    assert!(finding.remedy.contains("--engine"), "{finding}");
}

/// A broker whose engines fail to serve sessions, but pass preflights, while a file exists beside the engine.
fn broken_while(file: &str, hindrance: &str) -> Broker {
    let script = format!("if [ -e \"$(dirname $0)/{file}\" ]; then {hindrance}; fi; exec ENGINE");
    Broker::start_with_script(&script)
}

#[test]
fn vmm_is_answered_without_an_engine() {
    let broker = broken_while("slow", "while [ -e \"$(dirname $0)/slow\" ]; do sleep 0.1; done");
    let endpoint = broker.share("slow");
    let other = broker.share("other");
    let beside = broker.runtime_dir().with_file_name("slow");
    let waiting = boot(&other);
    fs::write(&beside, "").unwrap();
    // This fails if the VMM or others wait for the engine.
    let guest = Guest::power_on(GuestConfig::new(&endpoint.socket.path).small()).unwrap();
    assert_eq!(read_hello(&waiting), "from the host\n");
    assert_ne!(broker.session_of("slow").state, SessionState::Serving);
    fs::remove_file(&beside).unwrap();
    guest.mount().unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
}

#[test]
fn session_recovers_after_failed_starts() {
    let broker = broken_while("broken", "exit 1");
    let endpoint = broker.share("data");
    let beside = broker.runtime_dir().with_file_name("broken");
    fs::write(&beside, "").unwrap();
    let guest = Guest::power_on(GuestConfig::new(&endpoint.socket.path).small()).unwrap();
    let session = broker.until_state("data", SessionState::Failed);
    assert_eq!(session.finding.unwrap().reason, Reason::EngineFailed);
    fs::remove_file(&beside).unwrap();
    guest.mount().unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
    assert!(broker.until_state("data", SessionState::Serving).finding.is_none());
}

#[test]
fn recovery_is_abandoned_when_the_session_ends() {
    let broker = broken_while("broken", "exit 1");
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    fs::write(broker.runtime_dir().with_file_name("broken"), "").unwrap();
    until("neither engine nor standby is left", || {
        let session = broker.session_of("data");
        if let Some(engine) = session.engine_pid {
            kill(Pid::from_raw(engine as i32), Signal::SIGKILL).ok();
        }
        session.state == SessionState::Failed
    });
    drop(guest);
    until("it is counted", || broker.status_of("data").totals.replacements.abandoned == 1);
    assert!(broker.log().contains("recovery abandoned"));
}

#[test]
fn engine_that_does_not_quiesce_is_killed_and_the_vmm_answered() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    read_hello(&guest);
    let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
    kill(Pid::from_raw(engine as i32), Signal::SIGSTOP).unwrap();
    until("all its threads stand still", || threads_stand_still(engine));
    let used = guest.queues()[1].ring_state().unwrap().used;
    let bases = guest.pause().unwrap();
    assert_eq!(bases[1], used);
    until("the engine is gone", || !runs(engine));
    guest.resume(bases).unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
}

fn connect(broker: &Broker) -> Connection {
    let endpoint = broker.endpoint("data");
    Connection::connect(&endpoint.socket.path, SHORT).unwrap()
}

fn is_closed(connection: &mut Connection) -> bool {
    let mut byte = [0];
    connection.stream().set_read_timeout(Some(SHORT)).unwrap();
    match connection.stream().read(&mut byte) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn protocol_violation_ends_only_its_session() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let memory = GuestMemory::create(1 << 20, None).unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let region =
        |size: u64| [0, 0, size, 1 << 40, 0].iter().flat_map(|word: &u64| word.to_le_bytes()).collect::<Vec<u8>>();
    let all_slots = (1u64 << 15).to_le_bytes();
    type Message<'a> = (FrontendReq, Vec<u8>, Vec<i32>);
    let table: Vec<(&str, Vec<Message<'_>>)> = vec![
        (
            "a feature that was not offered",
            vec![(FrontendReq::SET_FEATURES, (1u64 << 26).to_le_bytes().into(), vec![])],
        ),
        ("a request that was not offered", vec![(FrontendReq::SET_LOG_BASE, vec![0; 16], vec![])]),
        ("a message that is too short", vec![(FrontendReq::SET_VRING_NUM, vec![0; 4], vec![])]),
        ("a pipe as kick", vec![(FrontendReq::SET_VRING_KICK, vec![0; 8], vec![pipe.as_raw_fd()])]),
        (
            "a pipe as memory",
            vec![
                (FrontendReq::SET_PROTOCOL_FEATURES, all_slots.into(), vec![]),
                (FrontendReq::ADD_MEM_REG, region(4096), vec![pipe.as_raw_fd()]),
            ],
        ),
        (
            "memory longer than its file",
            vec![
                (FrontendReq::SET_PROTOCOL_FEATURES, all_slots.into(), vec![]),
                (FrontendReq::ADD_MEM_REG, region((1 << 20) + 1), vec![memory.fd()]),
            ],
        ),
        (
            "509 regions",
            vec![(
                FrontendReq::SET_MEM_TABLE,
                {
                    let mut body = 509u64.to_le_bytes().to_vec();
                    body.resize(8 + 32 * 32, 0);
                    body
                },
                vec![memory.fd()],
            )],
        ),
        ("33 descriptors", vec![(FrontendReq::SET_VRING_ERR, vec![0; 8], vec![pipe.as_raw_fd(); 33])]),
        ("a ring that does not exist", vec![(FrontendReq::GET_VRING_BASE, vec![9, 0, 0, 0, 0, 0, 0, 0], vec![])]),
    ];
    for (what, messages) in table {
        let mut connection = connect(&broker);
        for (request, body, fds) in messages {
            connection.send(request, VERSION, &body, &fds).unwrap();
        }
        assert!(is_closed(&mut connection), "{what}");
    }
    assert_eq!(read_hello(&guest), "from the host\n");
    until("only the guest's session is left", || broker.status_of("data").sessions.len() == 1);
}

#[test]
fn garbage_and_half_messages_are_refused() {
    let broker = Broker::start();
    broker.share("data");
    for garbage in [&[0xffu8; 64][..], b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", &[0; 12]] {
        let mut connection = connect(&broker);
        connection.stream().write_all(garbage).unwrap();
        assert!(is_closed(&mut connection));
    }
    let half = connect(&broker);
    half.stream().write_all(&[1, 0, 0]).unwrap();
    assert!(broker.status_of("data").sessions.is_empty());
    drop(half);
    until("all of them are counted", || broker.status_of("data").rejected_connections == 4);
}

#[test]
fn truncated_memory_ends_only_its_session() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let other = boot(&endpoint);
    let guest = boot(&endpoint);
    guest.memory().truncate(0).unwrap();
    for queue in guest.queues() {
        queue.kick().unwrap();
    }
    until("its session is over", || broker.status_of("data").sessions.len() == 1);
    assert_eq!(read_hello(&other), "from the host\n");
}

#[test]
fn silent_connections_are_limited_and_closed() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let silent: Vec<UnixStream> = (0..30).map(|_| UnixStream::connect(&endpoint.socket.path).unwrap()).collect();
    until("those beyond the limit are refused", || broker.status_of("data").rejected_connections >= 14);
    assert!(broker.status_of("data").sessions.is_empty());
    until("the others are given up", || broker.status_of("data").rejected_connections == 30);
    drop(silent);
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

/// A guest survives the death of its engine while the broker logs to this output.
fn recovers_while_logging_to(stderr: impl Into<Stdio>) {
    let broker = Broker::start_logging_to(stderr);
    let guest = boot(&broker.share("data"));
    for _ in 0..3 {
        let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
        kill(Pid::from_raw(engine as i32), Signal::SIGKILL).unwrap();
        assert_eq!(read_hello(&guest), "from the host\n");
    }
}

#[test]
fn unwritable_log_does_not_block_recovery() {
    recovers_while_logging_to(File::options().write(true).open("/dev/full").unwrap());
    let (reader, nobody_reads) = std::io::pipe().unwrap();
    drop(reader);
    recovers_while_logging_to(nobody_reads);
}

#[test]
fn unread_log_does_not_block_recovery() {
    let (_reader, mut unread) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&unread, true).unwrap();
    while unread.write(&[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&unread, false).unwrap();
    recovers_while_logging_to(unread);
}

#[test]
fn engine_that_floods_its_log_serves() {
    let script = "( while :; do echo spam spam spam; done ) & exec ENGINE";
    let broker = Broker::start_with_script(script);
    let begin = Instant::now();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    for _ in 0..50 {
        assert_eq!(read_hello(&guest), "from the host\n");
    }
    let spam = || broker.log().lines().filter(|line| line.contains("spam spam")).count();
    until("its lines come through", || spam() > 0);
    let lines = spam();
    // A preflight, an engine and its standby: each may log a burst, and then a number of lines each second.
    let allowed = 3 * (50 + 1 + begin.elapsed().as_millis() / 100);
    assert!(lines as u128 <= allowed, "{lines} lines, {allowed} are allowed");
}
