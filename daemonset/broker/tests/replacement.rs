//! Engines are replaced while a guest has files open.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{Broker, boot, read_hello, runs, threads_stand_still, until};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::Guest;
use testkit::skip::require;
use virtiofs_config::{Access, CachePolicy};
use virtiofs_contract::control::{Endpoint, ReplacementOutcome, Request, Response, SessionState};
use virtiofs_contract::preflight::Reason;

/// A guest with an open file, an unlinked open file and a held inode.
struct Holding {
    guest: Guest,
    node: u64,
    open: u64,
    unlinked: (u64, u64),
    appended: u64,
}

impl Holding {
    fn on(endpoint: &Endpoint) -> Self {
        let guest = boot(endpoint);
        let fuse = guest.fuse();
        let node = fuse.lookup(1, "hello").unwrap().nodeid;
        let open = fuse.open(node, libc::O_RDONLY).unwrap().fh;
        let made = fuse.create(1, "gone", libc::O_RDWR, 0o600).unwrap();
        fuse.unlink(1, "gone").unwrap();
        let unlinked = (made.entry.nodeid, made.open.fh);
        Holding { guest, node, open, unlinked, appended: 0 }
    }

    /// Uses all of it.
    fn use_all(&mut self) {
        let fuse = self.guest.fuse();
        assert_eq!(fuse.read(self.node, self.open, 0, 4096).unwrap(), b"from the host\n");
        let (node, fh) = self.unlinked;
        let line = format!("{:08}\n", self.appended);
        let at = self.appended * line.len() as u64;
        assert_eq!(fuse.write(node, fh, at, line.as_bytes(), libc::O_RDWR).unwrap() as usize, line.len());
        self.appended += 1;
        let all: String = (0..self.appended).map(|number| format!("{number:08}\n")).collect();
        assert_eq!(fuse.read(node, fh, 0, 1 << 20).unwrap(), all.as_bytes());
        let name = format!("made-{}", self.appended);
        let made = fuse.mkdir(1, &name, 0o755).unwrap();
        fuse.forget(made.nodeid, 1).unwrap();
        fuse.rmdir(1, &name).unwrap();
        assert_eq!(read_hello(&self.guest), "from the host\n");
        assert_eq!(self.guest.violations(), []);
    }
}

fn engine_of(broker: &Broker) -> u32 {
    broker.until_state("data", SessionState::Serving).engine_pid.unwrap()
}

fn kill_engine(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

fn hand_over(broker: &Broker) {
    assert_eq!(broker.control().hand_over("data").len(), 1);
}

#[test]
fn guest_survives_a_killed_engine() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    for _ in 0..20 {
        guest.use_all();
        let engine = engine_of(&broker);
        kill_engine(engine, Signal::SIGKILL);
        guest.use_all();
        until("the engine is gone", || !runs(engine));
    }
    assert_eq!(broker.status_of("data").totals.replacements.recoveries.count, 20);
}

#[test]
fn guest_survives_kills_without_a_standby() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    for _ in 0..5 {
        for _ in 0..3 {
            kill_engine(engine_of(&broker), Signal::SIGKILL);
            sleep(Duration::from_millis(3));
        }
        guest.use_all();
    }
}

#[test]
fn guest_survives_a_hand_over() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    for _ in 0..20 {
        guest.use_all();
        let engine = engine_of(&broker);
        hand_over(&broker);
        until("another engine serves", || engine_of(&broker) != engine);
        guest.use_all();
        until("the old one is gone", || !runs(engine));
    }
    assert_eq!(broker.status_of("data").totals.replacements.hand_overs.count, 20);
}

#[test]
fn new_config_reaches_running_sessions() {
    let broker = Broker::start();
    let mut endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    guest.use_all();
    endpoint.engine.cache = CachePolicy::Never;
    broker.control().apply(&endpoint).unwrap();
    until("the session has it", || broker.session_of("data").engine.cache == CachePolicy::Never);
    guest.use_all();
}

#[test]
fn read_only_change_applies_to_open_files() {
    let broker = Broker::start();
    let mut endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let fuse = guest.fuse();
    let node = fuse.lookup(1, "hello").unwrap().nodeid;
    let reading = fuse.open(node, libc::O_RDONLY).unwrap().fh;
    let writing = fuse.open(node, libc::O_RDWR).unwrap().fh;
    endpoint.engine.access = Access::ReadOnly;
    broker.control().apply(&endpoint).unwrap();
    until("the session has it", || broker.session_of("data").engine.access == Access::ReadOnly);
    assert_eq!(fuse.read(node, reading, 0, 4096).unwrap(), b"from the host\n");
    let refused = fuse.write(node, writing, 0, b"x", libc::O_RDWR).unwrap_err();
    assert_eq!(refused.errno(), Some(Errno::EROFS));
    fuse.release(node, writing, 0).unwrap();
    assert_eq!(fuse.mkdir(1, "made", 0o755).unwrap_err().errno(), Some(Errno::EROFS));
}

#[test]
fn config_that_needs_a_remount_is_deferred_and_reported() {
    let broker = Broker::start();
    let mut endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    endpoint.engine.writeback = true;
    broker.control().apply(&endpoint).unwrap();
    until("it is said", || {
        broker.session_of("data").finding.is_some_and(|finding| finding.reason == Reason::RemountRequired)
    });
    assert_eq!(broker.session_of("data").state, SessionState::Serving);
    guest.use_all();
    let engine = engine_of(&broker);
    kill_engine(engine, Signal::SIGKILL);
    guest.use_all();
    let session = broker.until_state("data", SessionState::Serving);
    assert!(!session.engine.writeback, "recovered with what the guest had agreed on");
}

#[test]
fn deferred_config_becomes_active_after_an_unmount() {
    let broker = Broker::start();
    let mut endpoint = broker.share("data");
    let guest = boot(&endpoint);
    endpoint.engine.writeback = true;
    broker.control().apply(&endpoint).unwrap();
    until("it waits", || {
        broker.session_of("data").finding.is_some_and(|finding| finding.reason == Reason::RemountRequired)
    });
    guest.fuse().destroy().unwrap();
    let unmounted = Instant::now();
    until("it is in force", || broker.session_of("data").engine.writeback);
    assert!(unmounted.elapsed() < Duration::from_secs(20), "only the clock helped");
    assert_eq!(broker.session_of("data").finding, None);
    guest.mount().unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
}

#[test]
fn remounting_guest_gets_a_matching_engine() {
    let broker = Broker::start();
    let mut endpoint = broker.share("data");
    let guest = boot(&endpoint);
    for writeback in (0..20).map(|turn| turn % 2 == 0) {
        endpoint.engine.writeback = writeback;
        broker.control().apply(&endpoint).unwrap();
        guest.fuse().destroy().unwrap();
        guest.mount().unwrap();
        assert_eq!(read_hello(&guest), "from the host\n");
    }
    assert!(!broker.log().contains("cannot be taken over as it was agreed"));
}

#[test]
fn hand_over_starts_the_new_binary() {
    let broker = Broker::start_with_script("exec ENGINE");
    let endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    guest.use_all();
    let script = broker.runtime_dir().with_file_name("engine.sh");
    let new = script.with_extension("new");
    let text = fs::read_to_string(&script).unwrap().replace("exec", "touch $(dirname $0)/was-here; exec");
    fs::write(&new, text).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&new, &script).unwrap();
    hand_over(&broker);
    until("the new binary ran", || script.with_file_name("was-here").exists());
    guest.use_all();
}

#[test]
fn stopped_engine_keeps_its_guest_and_resumes() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    guest.use_all();
    let engine = engine_of(&broker);
    until("there is a standby engine", || broker.status_of("data").engines_started == 2);
    kill_engine(engine, Signal::SIGSTOP);
    until("all its threads stand still", || threads_stand_still(engine));
    hand_over(&broker);
    until("it is said", || {
        broker.session_of("data").finding.is_some_and(|finding| finding.reason == Reason::EngineStuck)
    });
    kill_engine(engine, Signal::SIGCONT);
    guest.use_all();
    assert_eq!(engine_of(&broker), engine);
    assert_eq!(broker.status_of("data").totals.replacements.aborted, 1);
    kill_engine(engine, Signal::SIGKILL);
    guest.use_all();
}

#[test]
fn read_only_share_is_handed_over() {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    endpoint.engine.access = Access::ReadOnly;
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    let node = guest.fuse().lookup(1, "hello").unwrap().nodeid;
    let open = guest.fuse().open(node, libc::O_RDONLY).unwrap().fh;
    let engine = engine_of(&broker);
    kill_engine(engine, Signal::SIGKILL);
    assert_eq!(guest.fuse().read(node, open, 0, 4096).unwrap(), b"from the host\n");
    hand_over(&broker);
    until("another engine serves", || broker.session_of("data").engine_pid.is_some_and(|pid| pid != engine));
    assert_eq!(guest.fuse().read(node, open, 0, 4096).unwrap(), b"from the host\n");
}

#[test]
fn paused_guest_is_handed_over_and_recovered() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    guest.use_all();
    for _ in 0..5 {
        let bases = guest.guest.pause().unwrap();
        kill_engine(broker.session_of("data").engine_pid.unwrap(), Signal::SIGKILL);
        guest.guest.resume(bases).unwrap();
        guest.use_all();
        let bases = guest.guest.pause().unwrap();
        hand_over(&broker);
        guest.guest.resume(bases).unwrap();
        guest.use_all();
    }
}

/// Stops one thread of a process until it is killed. Returns its number; none if that is not permitted.
fn stop_thread(pid: u32, name: &str) -> Option<libc::pid_t> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|thread| thread.unwrap().path());
    let named = |path: &PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name);
    let thread = threads.into_iter().find(named).unwrap();
    let number: libc::pid_t = thread.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let stopped = [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT].into_iter().all(|request| {
        // SAFETY: these two requests access no memory of either process.
        unsafe { libc::ptrace(request, number, 0, 0) == 0 }
    });
    let stands_still = || {
        let stat = fs::read_to_string(thread.join("stat")).unwrap();
        stat.rsplit_once(')').unwrap().1.trim_start().starts_with('t')
    };
    if stopped {
        until("the thread stands still", stands_still);
    }
    stopped.then_some(number)
}

/// Reaps a thread that this process has stopped: the first process of a PID namespace ends last of all.
fn reap(thread: libc::pid_t) {
    // SAFETY: no status is written.
    unsafe { libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
}

#[test]
fn engine_without_ring_positions_is_killed() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut guest = Holding::on(&endpoint);
    let engine = engine_of(&broker);
    until("there is a standby engine", || broker.status_of("data").engines_started == 2);
    let stopped = stop_thread(engine, "vhost-user");
    let Some(stopped) = require("the right to stop a thread of another process", stopped) else { return };
    hand_over(&broker);
    until("another engine serves", || broker.session_of("data").engine_pid.is_some_and(|pid| pid != engine));
    until("the old one is gone", || {
        reap(stopped);
        !runs(engine)
    });
    guest.use_all();
}

#[test]
fn hand_over_reports_its_sessions_and_completion() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guests = [boot(&endpoint), boot(&endpoint)];
    guests.iter().for_each(|guest| drop(read_hello(guest)));
    let before = broker.status_of("data").sessions;
    let only = before[0].id.clone();
    let request = Request::HandOver { name: "data".into(), session: Some(only.clone()) };
    let Response::HandingOver { sessions } = broker.control().request(&request) else { panic!() };
    assert_eq!(sessions.iter().map(|it| &it.session).collect::<Vec<_>>(), [&only]);
    until("it is done", || broker.status_of("data").sessions[0].active_generation >= sessions[0].generation);
    let after = broker.status_of("data").sessions;
    let last = after[0].last_replacement.clone().unwrap();
    assert_eq!((last.outcome, last.finding), (ReplacementOutcome::HandedOver, None));
    assert!(last.pause_ns > 0 && after[0].engine_binary.is_some());
    assert_eq!(after[0].desired_generation, after[0].active_generation);
    assert_ne!(after[0].engine_pid, before[0].engine_pid);
    assert_eq!(after[1].engine_pid, before[1].engine_pid, "the other session was not meant");
    assert_eq!(after[1].last_replacement, None);
    kill_engine(after[1].engine_pid.unwrap(), Signal::SIGKILL);
    assert_eq!(read_hello(&guests[1]), "from the host\n");
    let recovered = broker.status_of("data").sessions.remove(1).last_replacement.unwrap();
    assert_eq!(recovered.outcome, ReplacementOutcome::Recovered);
}
