//! Guests through broker and engine.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use common::{Broker, boot, read_hello, runs, until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::{Guest, GuestConfig};
use testkit::processes::Holdings;
use testkit::skip::require_that;
use virtiofs_config::{Access, Sandbox};
use virtiofs_contract::control::SessionState;
use virtiofs_contract::preflight::Reason;

#[test]
fn guest_works_on_a_share() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    let made = guest.fuse().create(1, "new", libc::O_WRONLY, 0o644).unwrap();
    guest.fuse().write(made.entry.nodeid, made.open.fh, 0, b"from the guest", libc::O_WRONLY).unwrap();
    assert_eq!(fs::read_to_string(endpoint.source.join("new")).unwrap(), "from the guest");
    let session = broker.until_state("data", SessionState::Serving);
    assert_eq!(session.vmm_pid, std::process::id() as i32);
    assert_eq!(session.guest_memory, 64 << 20);
    assert_eq!(session.engines, 1);
    assert!(session.open_files > 0 && session.finding.is_none() && session.preflight.is_some());
    assert_eq!(session.totals.bytes_written, 14);
    assert_eq!(guest.violations(), []);
}

#[test]
fn guest_whose_memory_is_a_file_on_a_disk_is_served_and_recovered() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("nvdimm");
    let file = fs::File::options().read(true).write(true).create_new(true).open(path).unwrap();
    // Files on tmpfs have seals, and were always accepted.
    let on_disk = rustix::fs::fcntl_get_seals(&file).is_err();
    if !require_that("a directory for temporary files on a disk", on_disk) {
        return;
    }
    let config = GuestConfig::new(&endpoint.socket.path).small();
    let guest = Guest::boot(GuestConfig { memory_file: Some(Arc::new(file)), ..config }).unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
    let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
    kill(Pid::from_raw(engine as i32), Signal::SIGKILL).unwrap();
    // The position of the ring is read from the file.
    assert_eq!(read_hello(&guest), "from the host\n");
    until("another engine serves", || broker.session_of("data").engine_pid.is_some_and(|pid| pid != engine));
    assert_eq!(broker.status_of("data").rejected_memory, 0);
    assert_eq!(guest.violations(), []);
}

#[test]
fn each_guest_has_its_own_engine() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let before = Holdings::of_tree(broker.pid() as i32).unwrap();
    for round in 1..=3 {
        let guests: Vec<Guest> = (0..3).map(|_| boot(&endpoint)).collect();
        for guest in &guests {
            assert_eq!(read_hello(guest), "from the host\n");
        }
        until("all are known to be served", || {
            broker.status_of("data").sessions.iter().all(|session| session.state == SessionState::Serving)
        });
        let sessions = broker.status_of("data").sessions;
        let mut engines: Vec<u32> = sessions.iter().filter_map(|session| session.engine_pid).collect();
        engines.sort_unstable();
        engines.dedup();
        assert_eq!(engines.len(), 3);
        drop(guests);
        until("the sessions are over", || broker.status_of("data").sessions.is_empty());
        until("the engines are gone", || !engines.iter().any(|pid| runs(*pid)));
        let status = broker.status_of("data");
        assert_eq!(status.sessions_started, 3 * round);
        assert!(status.engines_started >= 3 * round);
    }
    until("nothing is left of them", || {
        Holdings::of_tree(broker.pid() as i32).unwrap().leaked_since(&before).is_empty()
    });
}

#[test]
fn engine_inherits_no_foreign_descriptors() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let first = boot(&endpoint);
    let second = boot(&endpoint);
    until("both are known to be served", || {
        broker.status_of("data").sessions.iter().all(|session| session.state == SessionState::Serving)
    });
    for session in broker.status_of("data").sessions {
        let pid = session.engine_pid.unwrap();
        let targets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
            .map(|target| target.display().to_string())
            .collect();
        let memory = targets.iter().filter(|target| target.contains("memfd:guest")).count();
        assert!(memory <= 1, "{targets:?}");
        assert!(!targets.iter().any(|target| target.contains("virtiofs-session")), "{targets:?}");
        assert!(!targets.iter().any(|target| target.contains("broker.lock")), "{targets:?}");
    }
    drop((first, second));
}

#[test]
fn totals_never_decrease() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let mut last = 0;
    for _ in 0..4 {
        let guest = boot(&endpoint);
        read_hello(&guest);
        let during = broker.status_of("data").totals.requests();
        assert!(during > last);
        drop(guest);
        until("the session is over", || broker.status_of("data").sessions.is_empty());
        last = broker.status_of("data").totals.requests();
        assert!(last >= during);
    }
}

#[test]
fn paused_guest_continues() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let entry = guest.fuse().lookup(1, "hello").unwrap();
    for _ in 0..20 {
        let bases = guest.pause().unwrap();
        assert_eq!(broker.session_of("data").state, SessionState::Stopped);
        let used = guest.queues()[1].ring_state().unwrap().used;
        assert_eq!(bases[1], used);
        guest.resume(bases).unwrap();
        guest.fuse().getattr(entry.nodeid, None).unwrap();
    }
    assert_eq!(broker.session_of("data").engines, 1);
    assert_eq!(guest.violations(), []);
}

#[test]
fn rebooted_guest_starts_fresh() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    for _ in 0..5 {
        assert_eq!(read_hello(&guest), "from the host\n");
        guest.reboot().unwrap();
    }
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(guest.violations(), []);
}

#[test]
fn rings_set_up_again_start_at_the_vmm_base() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let config = GuestConfig { queue_size: 16, in_flight: 4, ..GuestConfig::new(&endpoint.socket.path).small() };
    let guest = Guest::boot(config).unwrap();
    // Beyond the length of the ring, so that a used index of 0 cannot belong to the running ring.
    while guest.queues()[1].ring_state().unwrap().used <= 16 {
        assert_eq!(read_hello(&guest), "from the host\n");
    }
    guest.reboot_on_running_rings().unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(guest.violations(), []);
}

#[test]
fn replugged_memory_is_handed_over() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let config = GuestConfig { split_memory: Some(32 << 20), ..GuestConfig::new(&endpoint.socket.path).small() };
    let guest = Guest::boot(config).unwrap();
    let lower = guest.memory().regions()[0];
    let bases = guest.pause().unwrap();
    guest.front_end().unplug(&lower).unwrap();
    guest.front_end().plug(guest.memory(), &lower).unwrap();
    guest.resume(bases).unwrap();
    let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
    kill(Pid::from_raw(engine as i32), Signal::SIGKILL).unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(guest.violations(), []);
}

#[test]
fn front_ends_of_all_kinds_are_served() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let base = GuestConfig::new(&endpoint.socket.path).small();
    let kinds = [
        GuestConfig { acknowledge_all: true, ..base.clone() },
        GuestConfig { protocol: 0, ..base.clone() },
        GuestConfig { features: 1 << 32, ..base.clone() },
        GuestConfig { split_memory: Some(32 << 20), ..base.clone() },
        GuestConfig { split_memory: Some(32 << 20), protocol: 0, ..base },
    ];
    for kind in kinds {
        let guest = Guest::boot(kind.clone()).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        assert_eq!(read_hello(&guest), "from the host\n");
        guest.reboot().unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        assert_eq!(read_hello(&guest), "from the host\n");
    }
}

#[test]
fn read_only_share_is_not_writable() {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    endpoint.engine.access = Access::ReadOnly;
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    let refused = guest.fuse().create(1, "new", libc::O_WRONLY, 0o644).unwrap_err();
    assert_eq!(refused.errno(), Some(nix::errno::Errno::EROFS));
}

/// A file system mounted at a directory until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// None if mounting is not permitted.
    fn at(directory: PathBuf, kind: &str) -> Option<Self> {
        fs::create_dir_all(&directory).unwrap();
        mount(Some(kind), &directory, Some(kind), MsFlags::empty(), None::<&str>).ok()?;
        Some(Mounted(directory))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn kernel_file_systems_are_not_shared() {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    let places = ["a dir/proc", "tmp", "tmp/sys"].map(|place| endpoint.source.join(place));
    let [proc, tmp, sys] = places.each_ref();
    let mounts = [(proc, "proc"), (tmp, "tmpfs"), (sys, "sysfs")].map(|(at, kind)| Mounted::at(at.clone(), kind));
    if !require_that("the right to mount", mounts.iter().all(Option::is_some)) {
        return;
    }
    fs::write(tmp.join("kept"), "").unwrap();
    let sent = broker.control().apply(&endpoint).unwrap().findings;
    let sent: Vec<_> = sent.iter().filter(|finding| finding.reason == Reason::SourceForbidden).collect();
    assert!(matches!(&sent[..], [one] if one.message.contains("a dir/proc, tmp/sys")), "{sent:?}");
    let guest = boot(&endpoint);
    let inside = |parent: u64, name: &str| guest.fuse().lookup(parent, name).map(|entry| entry.nodeid);
    let proc = inside(inside(1, "a dir").unwrap(), "proc").unwrap();
    let tmp = inside(1, "tmp").unwrap();
    assert!(inside(proc, "version").is_err() && inside(inside(tmp, "sys").unwrap(), "kernel").is_err());
    inside(tmp, "kept").unwrap();

    endpoint.engine.sandbox = Sandbox::Chroot;
    let found = broker.control().apply(&endpoint).unwrap();
    assert!(found.findings.iter().all(|finding| finding.reason == Reason::SourceForbidden), "{found:?}");
    assert_eq!(found.mounts.iter().map(|mount| mount.path.as_str()).collect::<Vec<_>>(), [".", "tmp"]);
}

#[test]
fn exclusive_endpoint_has_one_session() {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    endpoint.exclusive = true;
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    assert!(Guest::boot(GuestConfig::new(&endpoint.socket.path).small()).is_err());
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(broker.status_of("data").rejected_connections, 1);
    drop(guest);
    until("the session is over", || broker.status_of("data").sessions.is_empty());
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn broker_ends_cleanly() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut broker = Broker::start();
        let endpoint = broker.share("data");
        let guest = boot(&endpoint);
        let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
        broker.signal(signal);
        assert_eq!(broker.wait().code(), Some(0));
        assert!(!runs(engine) && !endpoint.socket.path.exists() && !broker.control_path().exists());
        drop(guest);
    }
}

#[test]
fn engines_die_with_a_crashed_broker() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
    let broker = broker.crash_and_restart();
    until("the engine is gone", || !runs(engine));
    drop(guest);
    broker.control().apply(&endpoint).unwrap();
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
    assert_eq!(fs::metadata(&endpoint.socket.path).unwrap().mode() & 0o777, 0o600);
}
