//! The broker ends, by SIGKILL or SIGTERM, while a keeper holds its sessions: guests continue.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Broker, boot, read_hello, runs, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::{Guest, GuestConfig};
use testkit::tmpfs::Tmpfs;
use testkit::workload::{Config, Limit, Workload};
use virtiofs_contract::control::{Endpoint, HolderState, Request, Response, SessionState, SessionStatus};

fn signal(pid: u32, signal: Signal) {
    // It may have ended by itself.
    let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
}

/// Runs random work that verifies every byte, with a disturbance meanwhile. The guest must see no error.
fn work_through<T: Send>(
    broker: &mut Broker,
    endpoint: &Endpoint,
    guest: &Guest,
    disturb: impl FnOnce(&mut Broker) -> T + Send,
) -> T {
    let mut workload = Workload::start(Config::new(7).lanes(2).host(&endpoint.source), &[guest.fuse()]);
    let stop = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        let disturbed = scope.spawn(|| {
            let result = disturb(broker);
            stop.store(true, Ordering::Relaxed);
            result
        });
        workload.run(Limit::until(&stop));
        disturbed.join().unwrap()
    });
    let report = workload.finish();
    assert!(report.is_clean(), "{report}");
    assert_eq!(guest.violations(), []);
    result
}

fn share(broker: &Broker) -> Endpoint {
    let mut endpoint = broker.endpoint("data");
    endpoint.engine.xattr = true;
    broker.control().apply(&endpoint).unwrap();
    endpoint
}

fn set_up() -> (Broker, Endpoint, Guest, SessionStatus) {
    let broker = Broker::start_with_keeper();
    let endpoint = share(&broker);
    let guest = boot(&endpoint);
    let session = broker.until_state("data", SessionState::Serving);
    (broker, endpoint, guest, session)
}

/// Open memfds of a name in all processes of this user.
fn holders_of(name: &str) -> usize {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let fds = processes.filter_map(|process| fs::read_dir(process.path().join("fd")).ok()).flatten().flatten();
    fds.filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter(|link| link.to_string_lossy().contains(&format!("/memfd:{name}")))
        .count()
}

#[test]
fn engine_serves_on_over_many_broker_crashes() {
    let (mut broker, endpoint, guest, before) = set_up();
    work_through(&mut broker, &endpoint, &guest, |broker| {
        for _ in 0..20 {
            broker.crash();
            thread::sleep(Duration::from_millis(20));
            broker.restart();
            thread::sleep(Duration::from_millis(30));
        }
    });
    let after = broker.until_state("data", SessionState::Serving);
    assert_eq!(after.engine_pid, before.engine_pid, "the engine is the same");
    assert_eq!((after.id, after.vmm_pid, after.connected_at), (before.id, before.vmm_pid, before.connected_at));
    assert_eq!(after.totals.replacements, before.totals.replacements);
    assert!(after.totals.requests() > before.totals.requests(), "counts continue");
    let status = broker.status_of("data");
    assert_eq!((status.sessions_lost, status.sessions_started), (0, 1));
}

#[test]
fn session_is_recovered_when_broker_and_engines_are_killed_together() {
    let (mut broker, endpoint, guest, before) = set_up();
    work_through(&mut broker, &endpoint, &guest, |broker| {
        for _ in 0..8 {
            let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
            broker.crash();
            signal(engine, Signal::SIGKILL);
            broker.restart();
            let another = || broker.session_of("data").engine_pid.is_some_and(|pid| pid != engine);
            until("another engine serves", another);
        }
    });
    let after = broker.until_state("data", SessionState::Serving);
    assert_eq!(after.id, before.id);
    assert!(after.totals.replacements.recoveries.count >= 8, "{:?}", after.totals.replacements);
    assert_eq!(broker.status_of("data").sessions_lost, 0);
}

#[test]
fn engine_that_served_a_crashed_broker_is_handed_over_and_recovered() {
    let (mut broker, endpoint, guest, before) = set_up();
    work_through(&mut broker, &endpoint, &guest, |broker| {
        broker.crash();
        broker.restart();
        let generation = broker.control().hand_over("data")[0].generation;
        until("it is handed over", || broker.session_of("data").active_generation >= generation);
        broker.crash();
        broker.restart();
        let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
        signal(engine, Signal::SIGKILL);
        until("it is recovered", || broker.session_of("data").totals.replacements.recoveries.count == 1);
    });
    let after = broker.until_state("data", SessionState::Serving);
    assert_ne!(after.engine_pid, before.engine_pid);
    assert_eq!(after.totals.replacements.hand_overs.count, 1);
}

#[test]
fn hand_overs_during_crashes_leave_one_engine() {
    let (mut broker, endpoint, guest, _) = set_up();
    work_through(&mut broker, &endpoint, &guest, |broker| {
        for round in 0..12 {
            broker.control().hand_over("data");
            // From before the standby is ready until after it serves.
            thread::sleep(Duration::from_millis(10 * round));
            broker.crash();
            broker.restart();
            broker.until_state("data", SessionState::Serving);
        }
    });
    assert_eq!(broker.status_of("data").sessions_lost, 0);
}

#[test]
fn sigterm_leaves_sessions_to_the_next_broker() {
    let (mut broker, endpoint, guest, before) = set_up();
    work_through(&mut broker, &endpoint, &guest, |broker| {
        for _ in 0..5 {
            broker.signal(Signal::SIGTERM);
            assert!(broker.wait().success());
            broker.restart();
        }
    });
    let after = broker.until_state("data", SessionState::Serving);
    assert_eq!(after.engine_pid, before.engine_pid);
    assert!(broker.log().contains("sessions continue"));
}

/// The kernel gives a signal to any thread that does not block it, and would end the broker while the first thread is not
/// waiting for signals yet.
#[test]
fn no_thread_but_the_first_takes_sigterm() {
    let broker = Broker::start();
    let mut others = 0;
    for thread in fs::read_dir(format!("/proc/{}/task", broker.pid())).unwrap() {
        let thread = thread.unwrap();
        if thread.file_name().to_str() == Some(&broker.pid().to_string()) {
            continue;
        }
        // A thread that prepares a session may end after the directory was read.
        let Ok(status) = fs::read_to_string(thread.path().join("status")) else { continue };
        let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        let blocked = u64::from_str_radix(line.trim(), 16).unwrap();
        assert!(blocked & 1 << (Signal::SIGTERM as u32 - 1) != 0, "{status}");
        others += 1;
    }
    assert!(others > 1);
}

#[test]
fn drain_ends_sessions_and_serves_nothing_more() {
    let (mut broker, endpoint, guest, session) = set_up();
    assert_eq!(broker.control().request(&Request::Drain), Response::Drained { sessions: 1 });
    assert!(!runs(session.engine_pid.unwrap()));
    assert!(broker.control().apply(&endpoint).is_err());
    broker.signal(Signal::SIGTERM);
    assert!(broker.wait().success());
    broker.restart();
    assert!(broker.control().status().endpoints.is_empty());
    drop(guest);
}

#[test]
fn vmm_that_connects_while_no_broker_runs_is_served_afterwards() {
    let (mut broker, endpoint, _guest, _) = set_up();
    broker.crash();
    let connecting = thread::spawn({
        let endpoint = endpoint.clone();
        move || boot(&endpoint)
    });
    thread::sleep(Duration::from_millis(200));
    assert!(!connecting.is_finished(), "it waits");
    broker.restart();
    let second = connecting.join().unwrap();
    assert_eq!(read_hello(&second), "from the host\n");
    assert_eq!(broker.status_of("data").sessions.len(), 2);
}

#[test]
fn dead_vm_is_freed_while_no_broker_runs() {
    let (mut broker, _, guest, session) = set_up();
    let (memory, ledger) = (holders_of("testkit-guest-ram"), holders_of("virtiofs-ledger"));
    assert!(memory > 0 && ledger > 0);
    broker.crash();
    drop(guest);
    let keeper = broker.keeper_pid();
    let held = || {
        let fds = fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().flatten();
        let links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        links
            .filter(|link| {
                ["testkit-guest-ram", "virtiofs-ledger"].iter().any(|name| link.to_string_lossy().contains(name))
            })
            .count()
    };
    until("the keeper has dropped the dead VM", || held() == 0);
    until("the engine has ended", || !runs(session.engine_pid.unwrap()));
    broker.restart();
    let status = broker.status_of("data");
    assert_eq!((status.sessions.len(), status.sessions_lost), (0, 0), "it ended by itself");
    assert!(UnixStream::connect(&status.endpoint.socket.path).is_ok(), "it listens");
}

/// Time within which the memory of a dead VM is free, on a machine that is busy with other tests. A quiet one needs
/// milliseconds.
const FREED_WITHIN: Duration = Duration::from_secs(10);

/// Boots a guest with RAM of its own file system, prepares the processes, ends the VM, and waits until the kernel has all of
/// its memory back.
fn memory_is_freed_after(what: &str, prepare: impl FnOnce(&mut Broker, &SessionStatus)) {
    const RAM: u64 = 64 << 20;
    let mut broker = Broker::start_with_keeper();
    let endpoint = share(&broker);
    let Some(tmpfs) = testkit::skip::require("CAP_SYS_ADMIN", Tmpfs::new(2 * RAM).ok()) else { return };
    let ram = Arc::new(tmpfs.file().unwrap());
    let config =
        GuestConfig { memory_file: Some(ram), touch_memory: true, ..GuestConfig::new(&endpoint.socket.path).small() };
    let guest = Guest::boot(config).unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
    let session = broker.until_state("data", SessionState::Serving);
    assert_eq!(tmpfs.used().unwrap(), RAM);
    prepare(&mut broker, &session);
    let begin = Instant::now();
    drop(guest);
    until(&format!("the memory is free: {what}"), || tmpfs.used().unwrap() == 0);
    let elapsed = begin.elapsed();
    println!("{what}: {elapsed:?}");
    assert!(elapsed < FREED_WITHIN, "{what}: freed after {elapsed:?}");
}

#[test]
fn memory_of_a_dead_vm_is_freed_whichever_process_is_dead() {
    let kill_engine = |session: &SessionStatus| signal(session.engine_pid.unwrap(), Signal::SIGKILL);
    memory_is_freed_after("all are alive", |_, _| {});
    memory_is_freed_after("engine dead", |_, session| kill_engine(session));
    memory_is_freed_after("broker dead", |broker, _| broker.crash());
    memory_is_freed_after("keeper dead", |broker, _| broker.kill_keeper());
    memory_is_freed_after("broker and engine dead", |broker, session| {
        broker.crash();
        kill_engine(session);
    });
    memory_is_freed_after("keeper and engine dead", |broker, session| {
        broker.kill_keeper();
        kill_engine(session);
    });
    memory_is_freed_after("broker and keeper dead", |broker, _| {
        broker.crash();
        broker.kill_keeper();
    });
}

#[test]
fn requests_of_a_vm_that_ends_while_no_broker_runs_are_counted_once() {
    let (mut broker, endpoint, guest, _) = set_up();
    let other = boot(&endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    let before = broker.status_of("data");
    let left = before.sessions.iter().map(|session| session.totals.requests()).sum::<u64>();
    assert_eq!(before.totals.requests(), left);
    broker.crash();
    let engine = before.sessions[0].engine_pid.unwrap();
    drop(guest);
    until("the engine has ended", || !runs(engine));
    broker.restart();
    for _ in 0..3 {
        let after = broker.status_of("data");
        assert_eq!((after.sessions.len(), after.sessions_started, after.sessions_lost), (1, 2, 0));
        assert_eq!(after.totals.operations, before.totals.operations);
        assert_eq!(after.engines_started, before.engines_started);
        broker.crash();
        broker.restart();
    }
    drop(other);
}

#[test]
fn keeper_that_is_killed_gets_everything_again() {
    let (mut broker, endpoint, guest, before) = set_up();
    work_through(&mut broker, &endpoint, &guest, |broker| {
        for _ in 0..3 {
            broker.kill_keeper();
            until("the broker notices", || broker.control().status().holder == HolderState::Missing);
            broker.start_keeper();
            until("the keeper has everything", || broker.control().status().holder == HolderState::Connected);
            broker.crash();
            broker.restart();
        }
    });
    assert_eq!(broker.until_state("data", SessionState::Serving).engine_pid, before.engine_pid);
}

#[test]
fn vm_that_dies_while_the_keeper_is_dead_is_freed() {
    let (mut broker, _, guest, session) = set_up();
    broker.kill_keeper();
    drop(guest);
    until("the session has ended", || broker.status_of("data").sessions.is_empty());
    until("the engine has ended", || !runs(session.engine_pid.unwrap()));
    broker.start_keeper();
    until("the keeper has everything", || broker.control().status().holder == HolderState::Connected);
    broker.crash();
    broker.restart();
    let status = broker.status_of("data");
    assert_eq!((status.sessions.len(), status.sessions_lost, status.sessions_started), (0, 0, 1));
}

#[test]
fn session_that_is_lost_is_counted() {
    let (mut broker, endpoint, guest, session) = set_up();
    broker.crash();
    broker.kill_keeper();
    until("the engine has ended", || !runs(session.engine_pid.unwrap()));
    broker.start_keeper();
    broker.restart();
    assert!(broker.control().status().endpoints.is_empty());
    assert!(broker.log().contains("sessions lost"), "{}", broker.log());
    // The next broker reports it too: no endpoint has counted it yet.
    broker.crash();
    broker.restart();
    broker.control().apply(&endpoint).unwrap();
    let lost = |broker: &Broker| {
        let status = broker.status_of("data");
        (status.sessions_lost, status.lost.into_iter().map(|it| it.session).collect::<Vec<_>>())
    };
    assert_eq!(lost(&broker), (1, vec![session.id.clone()]));
    broker.crash();
    broker.restart();
    assert_eq!(lost(&broker), (1, vec![session.id]), "it is counted once");
    drop(guest);
}

#[test]
fn session_that_is_lost_again_is_listed() {
    let (mut broker, endpoint, guest, first) = set_up();
    let lose = |broker: &mut Broker, session: &SessionStatus| {
        broker.crash();
        broker.kill_keeper();
        until("the engine has ended", || !runs(session.engine_pid.unwrap()));
        broker.start_keeper();
        broker.restart();
        broker.control().apply(&endpoint).unwrap();
        let status = broker.status_of("data");
        assert_eq!(status.sessions_lost, 1, "counts begin with this broker");
        (broker.control().status().instance, status.lost)
    };
    let before = lose(&mut broker, &first);
    drop(guest);
    let guest = boot(&endpoint);
    let second = broker.until_state("data", SessionState::Serving);
    let after = lose(&mut broker, &second);
    assert_ne!(before, after, "an agent sees a loss, whatever it has seen before");
    assert_eq!((&before.1[0].session, &after.1[0].session), (&first.id, &second.id));
    assert_ne!(first.id, second.id);
    drop(guest);
}

#[test]
fn second_broker_is_refused_and_takes_nothing() {
    let (broker, endpoint, guest, before) = set_up();
    let (status, text) = broker.rival();
    assert!(!status.success() && text.contains("belongs to a broker"), "{text}");
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(broker.session_of("data").engine_pid, before.engine_pid);
    assert!(endpoint.socket.path.exists());
}

#[test]
fn agents_values_survive_the_broker() {
    let mut broker = Broker::start_with_keeper();
    let put = Request::Put { key: "shares/a".into(), value: Some("kept".into()) };
    assert_eq!(broker.control().request(&put), Response::Done);
    let instance = broker.control().status().instance;
    broker.crash();
    broker.restart();
    let value = broker.control().request(&Request::Get { key: "shares/a".into() });
    assert_eq!(value, Response::Value { value: Some("kept".into()) });
    assert_eq!(broker.control().status().instance, instance);
}

/// Longest times of requests, in order: a guest asks for the same attributes again and again meanwhile.
fn latencies(guest: &Guest, meanwhile: impl FnOnce() + Send) -> Vec<Duration> {
    let done = AtomicBool::new(false);
    let fuse = guest.fuse();
    thread::scope(|scope| {
        scope.spawn(|| {
            meanwhile();
            done.store(true, Ordering::Relaxed);
        });
        let mut all = Vec::new();
        while !done.load(Ordering::Relaxed) {
            let begin = Instant::now();
            fuse.getattr(1, None).unwrap();
            all.push(begin.elapsed());
        }
        all.sort();
        all
    })
}

fn print_latencies(what: &str, all: &[Duration]) {
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize];
    let worst: Vec<_> = all.iter().rev().take(20).collect();
    println!("{what}: {} requests, median {:?}, p99.9 {:?}, worst {worst:?}", all.len(), at(0.5), at(0.999));
}

/// Prints figures: `cargo test -p virtiofs-broker --test restart -- --ignored --show-output`.
#[test]
#[ignore = "prints figures and shows nothing that the other tests do not show"]
fn figures_of_pauses_and_restoration() {
    const ROUNDS: usize = 20;
    let (mut broker, endpoint, guest, _) = set_up();
    print_latencies("undisturbed", &latencies(&guest, || thread::sleep(Duration::from_secs(4))));
    let crash = || {
        for _ in 0..ROUNDS {
            broker.crash();
            thread::sleep(Duration::from_millis(50));
            broker.restart();
            broker.until_state("data", SessionState::Serving);
        }
    };
    print_latencies("broker killed 20 times, engines alive", &latencies(&guest, crash));
    let crash_with_engine = || {
        for _ in 0..ROUNDS {
            let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
            broker.crash();
            signal(engine, Signal::SIGKILL);
            broker.restart();
            until("another", || broker.session_of("data").engine_pid.is_some_and(|pid| pid != engine));
        }
    };
    print_latencies("broker and engine killed together 20 times", &latencies(&guest, crash_with_engine));
    let kill_keeper = || {
        for _ in 0..5 {
            broker.kill_keeper();
            until("the broker notices", || broker.control().status().holder == HolderState::Missing);
            broker.start_keeper();
            until("it is back", || broker.control().status().holder == HolderState::Connected);
        }
    };
    print_latencies("keeper killed 5 times", &latencies(&guest, kill_keeper));
    let guests: Vec<Guest> = (0..49).map(|_| boot(&endpoint)).collect();
    broker.crash();
    broker.restart();
    let log = broker.log();
    println!("{}", log.lines().rfind(|line| line.contains("restored sessions=")).unwrap());
    drop(guests);
}
