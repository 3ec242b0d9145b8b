//! A source that is released while guests have files open, unmounted on the host, and resumed.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use common::fuse::{HangingMount, Hangs};
use common::{Broker, boot, read_hello, until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::Guest;
use testkit::skip::{require, require_that};
use virtiofs_config::InodeFileHandles;
use virtiofs_contract::control::{Endpoint, Request, Response, SessionState};
use virtiofs_contract::preflight::{Finding, Reason};

/// The file system at the source, mounted or not.
enum Medium {
    /// A tmpfs that is mounted elsewhere.
    Bind { store: tempfile::TempDir },
    /// An ext4 image, another file that takes its loop device every other time, and the number of mounts.
    Ext4 { image: tempfile::NamedTempFile, other: tempfile::NamedTempFile, mounts: Cell<u32> },
}

/// A source on a file system of its own.
struct Volume {
    medium: Medium,
    source: PathBuf,
}

impl Volume {
    /// None if mounting is not permitted.
    fn bind(source: &Path) -> Option<Self> {
        let store = tempfile::tempdir().unwrap();
        mount(Some("store"), store.path(), Some("tmpfs"), MsFlags::empty(), None::<&str>).ok()?;
        Self::with(Medium::Bind { store }, source)
    }

    /// None if there is no loop device.
    fn ext4(source: &Path) -> Option<Self> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(16 << 20).unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image.path()).status();
        made.is_ok_and(|status| status.success()).then_some(())?;
        let other = tempfile::NamedTempFile::new().unwrap();
        other.as_file().set_len(1 << 20).unwrap();
        Self::with(Medium::Ext4 { image, other, mounts: Cell::new(0) }, source)
    }

    fn with(medium: Medium, source: &Path) -> Option<Self> {
        let volume = Volume { medium, source: source.into() };
        if !require_that("the right to mount", volume.mount()) {
            return None;
        }
        std::fs::write(source.join("hello"), "from the host\n").unwrap();
        Some(volume)
    }

    fn mount(&self) -> bool {
        match &self.medium {
            Medium::Bind { store } => {
                mount(Some(store.path()), &self.source, None::<&str>, MsFlags::MS_BIND, None::<&str>).is_ok()
            }
            Medium::Ext4 { image, other, mounts } => {
                mounts.set(mounts.get() + 1);
                let _elsewhere = (mounts.get() % 2 == 0).then(|| Looped::of(other.path()));
                let mut command = Command::new("mount");
                command.args(["-o", "loop"]).arg(image.path()).arg(&self.source);
                command.status().is_ok_and(|status| status.success())
            }
        }
    }

    /// Unmounts as an administrator does. The loop device is free once nothing of the file system is open.
    fn umount(&self) {
        umount2(&self.source, MntFlags::empty()).unwrap();
        if let Medium::Ext4 { image, .. } = &self.medium {
            until("the file system is gone", || !is_looped(image.path()));
        }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = umount2(&self.source, MntFlags::MNT_DETACH);
        if let Medium::Bind { store } = &self.medium {
            let _ = umount2(store.path(), MntFlags::MNT_DETACH);
        }
    }
}

/// A file attached to the first free loop device.
struct Looped(String);

impl Looped {
    fn of(file: &Path) -> Self {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().unwrap();
        Looped(String::from_utf8(output.stdout).unwrap().trim().into())
    }
}

impl Drop for Looped {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

fn is_looped(image: &Path) -> bool {
    let devices = std::fs::read_dir("/sys/block").unwrap().flatten();
    devices.into_iter().any(|device| {
        let file = std::fs::read_to_string(device.path().join("loop/backing_file"));
        file.is_ok_and(|file| Path::new(file.trim()) == image)
    })
}

fn volume_and_share(broker: &Broker, make: fn(&Path) -> Option<Volume>) -> Option<(Volume, Endpoint)> {
    let endpoint = broker.endpoint("data");
    let volume = make(&endpoint.source)?;
    broker.control().apply(&endpoint).unwrap();
    Some((volume, endpoint))
}

fn release(broker: &Broker, deadline_ms: u64, force: bool) -> Result<Vec<String>, Finding> {
    match broker.control().request(&Request::Release { name: "data".into(), deadline_ms, force }) {
        Response::Released { sessions, .. } => Ok(sessions),
        Response::Refused { finding } => Err(finding),
        other => panic!("{other:?}"),
    }
}

fn resume(broker: &Broker) -> Response {
    broker.control().request(&Request::Resume { name: "data".into() })
}

const LONG: u64 = 600_000;

/// Uses the share in a loop and counts.
fn work(guest: &Guest, stop: &AtomicBool, done: &AtomicU64) {
    let fuse = guest.fuse();
    let made = fuse.create(1, "log", libc::O_RDWR, 0o600).unwrap();
    let (node, fh) = (made.entry.nodeid, made.open.fh);
    while !stop.load(Relaxed) {
        let count = done.load(Relaxed);
        fuse.write(node, fh, count * 8, &count.to_le_bytes(), libc::O_RDWR).unwrap();
        assert_eq!(fuse.read(node, fh, count * 8, 8).unwrap(), count.to_le_bytes());
        let name = format!("made-{count}");
        let dir = fuse.mkdir(1, &name, 0o755).unwrap();
        fuse.forget(dir.nodeid, 1).unwrap();
        fuse.rmdir(1, &name).unwrap();
        assert_eq!(read_hello(guest), "from the host\n");
        done.fetch_add(1, Relaxed);
    }
    let all = fuse.read(node, fh, 0, 1 << 20).unwrap();
    assert_eq!(all.len() as u64, done.load(Relaxed) * 8, "a write was lost");
}

/// Releases, unmounts, mounts and resumes repeatedly while two guests work.
fn survives(make: fn(&Path) -> Option<Volume>, handles: InodeFileHandles, kills: bool) {
    let broker = Broker::start();
    let Some((volume, mut endpoint)) = volume_and_share(&broker, make) else { return };
    endpoint.engine.inode_file_handles = handles;
    broker.control().apply(&endpoint).unwrap();
    let guests = [boot(&endpoint), boot(&endpoint)];
    std::fs::create_dir(endpoint.source.join("second")).unwrap();
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let working = scope.spawn(|| work(&guests[0], &stop, &done));
        for _ in 0..5 {
            let before = done.load(Relaxed);
            until("the guest works", || done.load(Relaxed) > before + 5 || working.is_finished());
            if kills {
                kill_engines(&broker);
            }
            assert_eq!(release(&broker, LONG, false).unwrap().len(), 2);
            volume.umount();
            let waiting = done.load(Relaxed);
            let status = broker.status_of("data");
            assert!(status.released.is_some());
            assert!(status.sessions.iter().all(|session| session.state == SessionState::Released));
            assert!(volume.mount());
            assert!(done.load(Relaxed) <= waiting + 1, "somebody served the guest without a source");
            assert_eq!(resume(&broker), Response::Done);
            if kills {
                kill_engines(&broker);
            }
        }
        let before = done.load(Relaxed);
        until("the guest works", || done.load(Relaxed) > before + 5 || working.is_finished());
        stop.store(true, Relaxed);
        working.join().unwrap();
    });
    assert_eq!(read_hello(&guests[1]), "from the host\n");
    assert!(broker.status_of("data").released.is_none());
    for guest in &guests {
        assert_eq!(guest.violations(), []);
    }
}

fn kill_engines(broker: &Broker) {
    for engine in broker.status_of("data").sessions.iter().filter_map(|session| session.engine_pid) {
        let _ = kill(Pid::from_raw(engine as i32), Signal::SIGKILL);
    }
}

#[test]
fn guests_survive_an_unmount_of_the_source() {
    survives(Volume::ext4, InodeFileHandles::Prefer, false);
}

#[test]
fn guests_survive_an_unmount_without_file_handles() {
    survives(Volume::bind, InodeFileHandles::Never, false);
}

#[test]
fn guests_survive_an_unmount_while_engines_die() {
    survives(Volume::bind, InodeFileHandles::Prefer, true);
}

#[test]
fn orphaned_files_prevent_a_release_without_force() {
    let broker = Broker::start();
    let Some((volume, endpoint)) = volume_and_share(&broker, Volume::bind) else { return };
    let (guest, other) = (boot(&endpoint), boot(&endpoint));
    let made = guest.fuse().create(1, "gone", libc::O_RDWR, 0o600).unwrap();
    let (node, fh) = (made.entry.nodeid, made.open.fh);
    guest.fuse().write(node, fh, 0, b"kept", libc::O_RDWR).unwrap();
    guest.fuse().unlink(1, "gone").unwrap();
    let refused = release(&broker, LONG, false).unwrap_err();
    assert_eq!(refused.reason, Reason::OrphanedFilesOpen);
    assert!(refused.message.contains("1 open files"), "{refused}");
    assert_eq!(guest.fuse().read(node, fh, 0, 10).unwrap(), b"kept");
    assert_eq!(read_hello(&other), "from the host\n");
    release(&broker, LONG, true).unwrap();
    volume.umount();
    assert!(volume.mount());
    resume(&broker);
    assert!(guest.fuse().read(node, fh, 0, 10).is_err());
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(guest.violations(), []);
}

#[test]
fn sessions_resume_at_the_deadline_and_wait_for_the_source() {
    let broker = Broker::start();
    let Some((volume, endpoint)) = volume_and_share(&broker, Volume::bind) else { return };
    let guest = boot(&endpoint);
    read_hello(&guest);
    release(&broker, 2000, false).unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
    assert!(broker.status_of("data").released.is_none());
    release(&broker, 3000, false).unwrap();
    volume.umount();
    match resume(&broker) {
        Response::Refused { finding } => assert_eq!(finding.reason, Reason::SourceMissing),
        other => panic!("{other:?}"),
    }
    let session = broker.until_state("data", SessionState::Failed);
    assert_eq!(session.finding.unwrap().reason, Reason::SourceMissing);
    thread::scope(|scope| {
        let reading = scope.spawn(|| read_hello(&guest));
        assert!(volume.mount());
        assert_eq!(reading.join().unwrap(), "from the host\n");
    });
    until("nothing is wrong any more", || broker.session_of("data").finding.is_none());
    assert!(broker.status_of("data").engines_started < 10, "engines were started in a loop");
}

#[test]
fn new_sessions_wait_while_released() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    assert_eq!(release(&broker, LONG, false).unwrap(), Vec::<String>::new());
    let finding = broker.control().apply(&endpoint).unwrap_err();
    assert_eq!(finding.reason, Reason::SourceReleased);
    thread::scope(|scope| {
        let booting = scope.spawn(|| read_hello(&boot(&endpoint)));
        broker.until_state("data", SessionState::Released);
        assert_eq!(broker.session_of("data").engine_pid, None);
        assert_eq!(resume(&broker), Response::Done);
        assert_eq!(booting.join().unwrap(), "from the host\n");
    });
    broker.control().apply(&endpoint).unwrap();
}

#[test]
fn one_session_that_does_not_quiesce_aborts_the_release() {
    let broker = Broker::start();
    let endpoint = broker.endpoint("data");
    let mount = HangingMount::at(&endpoint.source, Hangs::Nothing);
    let Some(mount) = require("the right to mount a FUSE file system", mount) else { return };
    broker.control().apply(&endpoint).unwrap();
    let (stuck, other) = (boot(&endpoint), boot(&endpoint));
    read_hello(&other);
    mount.set(Hangs::Reads);
    thread::scope(|scope| {
        let reading = scope.spawn(|| read_hello(&stuck));
        until("the guest's read hangs", || mount.hanging() > 0);
        assert_eq!(release(&broker, LONG, false).unwrap_err().reason, Reason::EngineStuck);
        assert!(broker.status_of("data").released.is_none());
        assert!(other.fuse().lookup(1, "hello").is_ok());
        mount.set(Hangs::Nothing);
        assert_eq!(reading.join().unwrap(), "from the host\n");
    });
    assert_eq!(release(&broker, LONG, false).unwrap().len(), 2);
    assert_eq!(resume(&broker), Response::Done);
    assert_eq!(read_hello(&stuck), "from the host\n");
    assert_eq!((stuck.violations(), other.violations()), (vec![], vec![]));
}

#[test]
fn invalid_release_requests_are_refused() {
    let broker = Broker::start();
    broker.share("data");
    for (request, word) in [
        (Request::Release { name: "other".into(), deadline_ms: 1, force: false }, "other"),
        (Request::Release { name: "data".into(), deadline_ms: 0, force: false }, "deadlineMs"),
        (Request::Release { name: "data".into(), deadline_ms: u64::MAX, force: false }, "deadlineMs"),
        (Request::Resume { name: "other".into() }, "other"),
        (Request::Close { name: "data".into(), session: Some("data-7".into()) }, "data-7"),
        (Request::HandOver { name: "data".into(), session: Some("x".repeat(1 << 20)) }, "no session"),
        (Request::Trace { session: "data-7".into(), duration_ms: 1, rate: 1 }, "data-7"),
        (Request::ReadTrace { session: "data-7".into(), after: u64::MAX }, "data-7"),
        (Request::Put { key: String::new(), value: None }, "key"),
        (Request::Put { key: "k".into(), value: Some("x".repeat((1 << 20) + 1)) }, "value"),
    ] {
        match broker.control().request(&request) {
            Response::InvalidRequest { message } => assert!(message.contains(word), "{message}"),
            other => panic!("{request:?}: {other:?}"),
        }
    }
    assert!(broker.status_of("data").listening);
}
