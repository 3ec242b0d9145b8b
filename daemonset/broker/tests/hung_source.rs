//! Hung sources and socket directories: only their users wait, and there are never two engines of a session.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

use common::fuse::{HangingMount, Hangs};
use common::{Broker, boot, read_hello, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use testkit::skip::require;
use virtiofs_contract::control::{Endpoint, OldestRequest, SessionState};
use virtiofs_contract::counters::OPERATION_NAMES;
use virtiofs_contract::preflight::Reason;

/// An endpoint on a mount that hangs on request; none if mounting is not permitted.
fn hanging_endpoint(broker: &Broker, hangs: Hangs) -> Option<(Endpoint, HangingMount)> {
    let endpoint = broker.endpoint("hung");
    let mount = HangingMount::at(&endpoint.source, hangs);
    let mount = require("the right to mount a FUSE file system", mount)?;
    Some((endpoint, mount))
}

/// True if the process has a thread that is not a zombie.
fn has_threads(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
    })
}

fn engine_of(broker: &Broker) -> u32 {
    broker.until_state("hung", SessionState::Serving).engine_pid.unwrap()
}

#[test]
fn hung_source_does_not_affect_other_endpoints() {
    let broker = Broker::start();
    let other = broker.share("other");
    let Some((endpoint, mount)) = hanging_endpoint(&broker, Hangs::Everything) else { return };
    thread::scope(|scope| {
        let applying = scope.spawn(|| broker.control().apply(&endpoint));
        until("it hangs", || mount.hanging() > 0);
        assert_eq!(read_hello(&boot(&other)), "from the host\n");
        broker.control().apply(&other).unwrap();
        assert!(broker.control().apply(&endpoint).is_err(), "a second trial does not wait for as long");
        assert!(mount.hanging() > 0, "it still hangs");
        let finding = applying.join().unwrap().unwrap_err();
        assert_eq!(finding.reason, Reason::SourceUnreadable);
    });
    mount.set(Hangs::Nothing);
    until("it heals", || broker.control().apply(&endpoint).is_ok());
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn stuck_request_aborts_the_hand_over() {
    let broker = Broker::start();
    let other = broker.share("other");
    let Some((endpoint, mount)) = hanging_endpoint(&broker, Hangs::Nothing) else { return };
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    let engine = engine_of(&broker);
    until("there is a standby engine", || broker.status_of("hung").engines_started == 2);
    mount.set(Hangs::Reads);
    thread::scope(|scope| {
        let reading = scope.spawn(|| read_hello(&guest));
        until("the guest's read hangs", || mount.hanging() > 0);
        until("it is named, with its age", || {
            let oldest = broker.session_of("hung").oldest_request;
            let named = |it: &OldestRequest| OPERATION_NAMES[it.opcode as usize] == "read" && it.age_ms > 1000;
            oldest.is_some_and(|it| named(&it) && it.path.as_deref() == Some("/hello"))
        });
        assert_eq!(broker.control().hand_over("hung").len(), 1);
        until("it is said", || {
            broker.session_of("hung").finding.is_some_and(|finding| finding.reason == Reason::EngineStuck)
        });
        let session = broker.session_of("hung");
        assert_eq!((session.state, session.engine_pid), (SessionState::Serving, Some(engine)));
        assert_eq!(read_hello(&boot(&other)), "from the host\n");
        mount.set(Hangs::Nothing);
        assert_eq!(reading.join().unwrap(), "from the host\n");
    });
    until("nothing is in progress", || broker.session_of("hung").oldest_request.is_none());
    assert_eq!(guest.violations(), []);
}

/// The lowest number that the broker's next descriptor can get.
fn next_descriptor(broker: &Broker) -> u64 {
    (0..).find(|number| fs::symlink_metadata(format!("/proc/{}/fd/{number}", broker.pid())).is_err()).unwrap()
}

/// Limits the numbers of the broker's descriptors, or resets the limit.
fn limit_descriptors(broker: &Broker, limit: Option<u64>) {
    // The broker has the hard limit of this process and has raised its soft limit to it.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = limit.or(maximum);
    prlimit(rustix::process::Pid::from_raw(broker.pid() as i32), Resource::Nofile, Rlimit { current, maximum })
        .unwrap();
}

fn terminating_engine_has_no_successor(limited: bool) {
    let broker = Broker::start();
    let Some((endpoint, mount)) = hanging_endpoint(&broker, Hangs::Nothing) else { return };
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    let engine = engine_of(&broker);
    until("there is a standby engine", || broker.status_of("hung").engines_started == 2);
    let mut control = broker.control();
    let mut session = || control.status().endpoints.remove(0).sessions.remove(0);
    mount.set(Hangs::Reads);
    thread::scope(|scope| {
        let reading = scope.spawn(|| read_hello(&guest));
        until("the guest's read hangs", || mount.hanging() > 0);
        limit_descriptors(&broker, limited.then(|| next_descriptor(&broker)));
        kill(Pid::from_raw(engine as i32), Signal::SIGKILL).unwrap();
        until("it is said", || session().finding.is_some_and(|finding| finding.reason == Reason::EngineStuck));
        assert!(has_threads(engine), "the kernel lets it wait");
        assert_eq!(session().engine_pid, None);
        limit_descriptors(&broker, None);
        mount.set(Hangs::Nothing);
        assert_eq!(reading.join().unwrap(), "from the host\n");
    });
    assert_ne!(engine_of(&broker), engine);
    assert_eq!(guest.violations(), []);
}

#[test]
fn no_successor_while_an_engine_is_terminating() {
    terminating_engine_has_no_successor(false);
}

#[test]
fn broker_without_descriptors_waits_for_a_terminating_engine() {
    terminating_engine_has_no_successor(true);
}

/// An endpoint whose socket is on a mount that hangs on request; none if mounting is not permitted.
fn endpoint_in_hanging_directory(broker: &Broker) -> Option<(Endpoint, HangingMount)> {
    let mut endpoint = broker.endpoint("hung");
    let directory: PathBuf = endpoint.socket.path.with_file_name("hanging");
    fs::create_dir(&directory).unwrap();
    let mount = HangingMount::at(&directory, Hangs::Nothing);
    let mount = require("the right to mount a FUSE file system", mount)?;
    endpoint.socket.path = directory.join("hung.sock");
    Some((endpoint, mount))
}

/// What a request to the broker returns, or a panic if it waits for the mount.
fn in_time<T: Send>(mount: &HangingMount, what: &str, request: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let (reply, replied) = mpsc::channel();
        scope.spawn(move || _ = reply.send(request()));
        replied.recv_timeout(common::PATIENCE).unwrap_or_else(|_| {
            // Else the scope would wait for the request.
            mount.set(Hangs::Nothing);
            panic!("{what} waits for the hung directory")
        })
    })
}

#[test]
fn hung_socket_directory_does_not_affect_other_endpoints() {
    let broker = Broker::start();
    let other = broker.share("other");
    let Some((mut endpoint, mount)) = endpoint_in_hanging_directory(&broker) else { return };
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    mount.set(Hangs::Everything);
    let status = in_time(&mount, "status", || broker.status_of("hung"));
    assert!(status.listening, "as before: it may only be slow");
    endpoint.engine.max_inodes += 1;
    thread::scope(|scope| {
        let applying = scope.spawn(|| broker.control().apply(&endpoint));
        until("it hangs", || mount.hanging() > 1);
        in_time(&mount, "status", || broker.control().status());
        assert_eq!(in_time(&mount, "a new session", || read_hello(&boot(&other))), "from the host\n");
        in_time(&mount, "another endpoint", || broker.share("third"));
        assert_eq!(in_time(&mount, "a session of the same endpoint", || read_hello(&guest)), "from the host\n");
        let finding = in_time(&mount, "apply", || applying.join().unwrap()).unwrap_err();
        assert_eq!(finding.reason, Reason::SocketUnavailable);
        assert!(finding.message.contains("does not respond"), "{finding}");
    });
    until("nobody can connect, and it is said", || !in_time(&mount, "status", || broker.status_of("hung")).listening);
    in_time(&mount, "remove", || broker.control().remove("hung", true));
    until("its session has ended", || broker.control().status().endpoints.iter().all(|it| it.endpoint.name != "hung"));
    let socket = endpoint.socket.path.clone();
    mount.set(Hangs::Nothing);
    until("the socket is removed", || !socket.exists());
    until("it listens again", || broker.control().apply(&endpoint).is_ok());
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn restart_does_not_wait_for_a_hung_socket_directory() {
    let mut broker = Broker::start_with_keeper();
    let other = broker.share("other");
    let Some((endpoint, mount)) = endpoint_in_hanging_directory(&broker) else { return };
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    mount.set(Hangs::Everything);
    broker.crash();
    broker.restart();
    assert_eq!(in_time(&mount, "a new session", || read_hello(&boot(&other))), "from the host\n");
    assert_eq!(in_time(&mount, "its session", || read_hello(&guest)), "from the host\n");
    mount.set(Hangs::Nothing);
    until("it listens", || broker.status_of("hung").listening);
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}
