//! What the host mounts and unmounts at and below a source while a guest uses it: in each sandbox, on a host whose
//! mounts are shared, as systemd makes them, and on one whose mounts are private.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Broker, boot, read_hello, until};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use testkit::guest::Guest;
use virtiofs_config::Sandbox;
use virtiofs_contract::control::{Request, Response, SessionState};

const ORDINARY_USER: u32 = 65_534;

/// Gives this thread, and what it starts, a mount namespace of its own with mounts of this propagation.
fn own_mounts(propagation: MsFlags) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    for propagation in [MsFlags::MS_PRIVATE, propagation] {
        mount(None::<&str>, "/", None::<&str>, propagation | MsFlags::MS_REC, None::<&str>).unwrap();
    }
}

/// Mounts a file system with files in it.
fn mount_at(place: &Path, contents: &str) {
    fs::create_dir_all(place).unwrap();
    mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
    fs::write(place.join("hello"), "from the host\n").unwrap();
    fs::write(place.join("file"), contents).unwrap();
}

fn unmount(place: &Path) -> nix::Result<()> {
    umount2(place, MntFlags::empty())
}

/// A guest on a share. The source is a mount, and `below` is one below it.
struct Stage {
    guest: Guest,
    broker: Broker,
    source: PathBuf,
    below: PathBuf,
}

impl Stage {
    fn set(broker: Broker, sandbox: Sandbox) -> Self {
        let mut endpoint = broker.endpoint("data");
        let source = endpoint.source.clone();
        let below = source.join("below");
        mount_at(&source, "");
        mount_at(&below, "mounted before\n");
        endpoint.engine.sandbox = sandbox;
        broker.control().apply(&endpoint).unwrap();
        let guest = boot(&endpoint);
        assert_eq!(read_hello(&guest), "from the host\n");
        let found = broker.until_state("data", SessionState::Serving).preflight.unwrap();
        assert_eq!(found.sandbox, sandbox);
        Stage { guest, broker, source, below }
    }

    /// What the guest reads in the file of a directory of the share, if there is one. It remembers nothing afterwards.
    fn read(&self, directory: &str) -> Option<String> {
        let fuse = self.guest.fuse();
        let directory = fuse.lookup(1, directory).ok()?.nodeid;
        let file = fuse.lookup(directory, "file").ok().map(|entry| entry.nodeid);
        let text = file.map(|file| {
            let open = fuse.open(file, libc::O_RDONLY).unwrap();
            let text = fuse.read(file, open.fh, 0, 4096).unwrap();
            fuse.release(file, open.fh, libc::O_RDONLY).unwrap();
            fuse.forget(file, 1).unwrap();
            String::from_utf8(text).unwrap()
        });
        fuse.forget(directory, 1).unwrap();
        text
    }

    fn until_read(&self, directory: &str, text: Option<&str>) {
        until(&format!("{text:?} in {directory}"), || self.read(directory).as_deref() == text);
    }

    /// Has the guest remember the file of the lower mount, as a guest's cache does. Returns its node.
    fn hold_below(&self) -> u64 {
        let fuse = self.guest.fuse();
        let directory = fuse.lookup(1, "below").unwrap().nodeid;
        fuse.lookup(directory, "file").unwrap().nodeid
    }

    fn release(&self) {
        let request = Request::Release { name: "data".into(), deadline_ms: 600_000, force: false };
        let reply = self.broker.control().request(&request);
        assert!(matches!(reply, Response::Released { .. }), "{reply:?}");
    }

    fn resume(&self) {
        assert_eq!(self.broker.control().request(&Request::Resume { name: "data".into() }), Response::Done);
    }
}

fn mounts_below_the_source_come_and_go(broker: Broker, sandbox: Sandbox) {
    let stage = Stage::set(broker, sandbox);
    stage.until_read("below", Some("mounted before\n"));
    let later = stage.source.join("later");
    mount_at(&later, "mounted later\n");
    stage.until_read("later", Some("mounted later\n"));
    for (place, name) in [(&later, "later"), (&stage.below, "below")] {
        umount2(place, MntFlags::MNT_DETACH).unwrap();
        assert_eq!(stage.read(name), None);
    }
    assert_eq!(stage.guest.violations(), []);
}

#[test]
fn mounts_reach_a_namespace() {
    own_mounts(MsFlags::MS_SHARED);
    mounts_below_the_source_come_and_go(Broker::start(), Sandbox::Namespace);
}

#[test]
fn mounts_reach_a_user_namespace() {
    own_mounts(MsFlags::MS_SHARED);
    mounts_below_the_source_come_and_go(Broker::start_as_user(ORDINARY_USER), Sandbox::Namespace);
}

#[test]
fn mounts_reach_a_chroot() {
    own_mounts(MsFlags::MS_SHARED);
    mounts_below_the_source_come_and_go(Broker::start(), Sandbox::Chroot);
}

/// What a guest remembers keeps a mount busy, and so does an engine that opens files by their handles.
fn a_mount_in_use_is_busy_until_released(broker: Broker, sandbox: Sandbox) {
    let stage = Stage::set(broker, sandbox);
    let file = stage.hold_below();
    assert_eq!(unmount(&stage.below), Err(Errno::EBUSY));
    stage.release();
    unmount(&stage.below).unwrap();
    stage.resume();
    let errno = stage.guest.fuse().getattr(file, None).unwrap_err().errno().unwrap();
    assert_eq!(errno as i32, libc::ESTALE);
    stage.until_read("below", None);
    assert_eq!(read_hello(&stage.guest), "from the host\n");
}

#[test]
fn a_shared_mount_in_use_is_busy_in_a_namespace() {
    own_mounts(MsFlags::MS_SHARED);
    a_mount_in_use_is_busy_until_released(Broker::start(), Sandbox::Namespace);
}

#[test]
fn a_shared_mount_in_use_is_busy_in_a_user_namespace() {
    own_mounts(MsFlags::MS_SHARED);
    a_mount_in_use_is_busy_until_released(Broker::start_as_user(ORDINARY_USER), Sandbox::Namespace);
}

#[test]
fn a_mount_in_use_is_busy_in_a_chroot() {
    own_mounts(MsFlags::MS_SHARED);
    a_mount_in_use_is_busy_until_released(Broker::start(), Sandbox::Chroot);
}

#[test]
fn without_file_handles_a_mount_is_busy_while_a_guest_remembers_it() {
    own_mounts(MsFlags::MS_SHARED);
    let stage = Stage::set(Broker::start_as_user(ORDINARY_USER), Sandbox::Namespace);
    stage.until_read("below", Some("mounted before\n"));
    // A FORGET has no reply: the engine may just be about to close what it had open for the guest.
    until("what no guest remembers is unmounted", || unmount(&stage.below).is_ok());
    stage.until_read("below", None);
}

#[test]
fn private_mounts_neither_come_to_nor_go_from_an_engine() {
    let root = Broker::start as fn() -> Broker;
    let user = || Broker::start_as_user(ORDINARY_USER);
    for (broker, sandbox) in [(root, Sandbox::Namespace), (user, Sandbox::Namespace), (root, Sandbox::Chroot)] {
        own_mounts(MsFlags::MS_PRIVATE);
        let stage = Stage::set(broker(), sandbox);
        stage.hold_below();
        unmount(&stage.below).unwrap();
        assert_eq!(stage.read("below").as_deref(), Some("mounted before\n"));
        mount_at(&stage.source.join("later"), "mounted later\n");
        assert_eq!(stage.read("later"), None);
        stage.release();
        stage.resume();
        stage.until_read("below", None);
        stage.until_read("later", Some("mounted later\n"));
    }
}

/// The root of a share is a mount of the engine's own.
#[test]
fn the_source_itself_can_be_unmounted() {
    for sandbox in [Sandbox::Namespace, Sandbox::Chroot] {
        for propagation in [MsFlags::MS_SHARED, MsFlags::MS_PRIVATE] {
            own_mounts(propagation);
            let stage = Stage::set(Broker::start(), sandbox);
            umount2(&stage.below, MntFlags::MNT_DETACH).unwrap();
            unmount(&stage.source).unwrap();
            assert_eq!(read_hello(&stage.guest), "from the host\n");
            until("it is noticed", || stage.broker.session_of("data").source_gone.is_some());
            assert_eq!(read_hello(&stage.guest), "from the host\n");
        }
    }
}
