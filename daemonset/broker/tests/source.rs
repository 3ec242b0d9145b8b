//! A source that is unmounted, mounted over or replaced under a running guest.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Broker, boot, until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use testkit::guest::Guest;
use virtiofs_contract::control::{SessionState, SessionStatus};
use virtiofs_contract::preflight::Reason;
use virtiofs_contract::staleness::Cause;

/// File systems mounted at one path, unmounted at the end.
struct Mounts(PathBuf);

impl Mounts {
    fn push(&self, contents: &str) {
        mount(Some("tmpfs"), &self.0, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(self.0.join("hello"), contents).unwrap();
    }

    fn pop(&self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        while umount2(&self.0, MntFlags::MNT_DETACH).is_ok() {}
    }
}

fn read(guest: &Guest) -> String {
    let fuse = guest.fuse();
    let node = fuse.lookup(1, "hello").unwrap().nodeid;
    let open = fuse.open(node, libc::O_RDONLY).unwrap();
    let contents = fuse.read(node, open.fh, 0, 4096).unwrap();
    fuse.release(node, open.fh, 0).unwrap();
    String::from_utf8(contents).unwrap()
}

/// Number of SourceGone events of the only session, if no other cause was counted.
fn gone(session: &SessionStatus) -> u64 {
    assert!(session.totals.stale.iter().all(|total| total.cause == Cause::SourceGone), "{:?}", session.totals.stale);
    session.totals.stale(Cause::SourceGone)
}

fn until_gone(broker: &Broker, name: &str, words: &str, times: u64) {
    until(&format!("{words}, noticed {times} times"), || {
        let session = broker.session_of(name);
        session.source_gone.as_ref().is_some_and(|how| how.contains(words)) && gone(&session) == times
    });
}

fn hand_over(broker: &Broker, name: &str) {
    let engines = broker.session_of(name).engines;
    assert_eq!(broker.control().hand_over(name).len(), 1);
    until("another engine serves", || broker.session_of(name).engines > engines);
}

#[test]
fn other_file_system_is_detected_and_served_after_a_hand_over() {
    let broker = Broker::start();
    let mounts = Mounts(broker.source("moving"));
    mounts.push("first\n");
    let endpoint = broker.share("moving");
    fs::write(mounts.0.join("hello"), "first\n").unwrap();
    let guest = boot(&endpoint);
    assert_eq!(read(&guest), "first\n");
    let before = guest.fuse().lookup(1, "hello").unwrap().nodeid;
    broker.until_state("moving", SessionState::Serving);
    assert_eq!(broker.session_of("moving").source_gone, None);

    mounts.pop();
    mounts.push("second\n");
    until_gone(&broker, "moving", "another file system", 1);
    assert_eq!(read(&guest), "first\n", "the engine holds on to what it serves");
    let event = broker.session_of("moving").stale_events.pop().unwrap();
    assert_eq!((event.cause, event.path.as_str()), (Cause::SourceGone, "."));

    hand_over(&broker, "moving");
    assert_eq!(read(&guest), "second\n");
    let errno = guest.fuse().getattr(before, None).unwrap_err().errno().unwrap();
    assert_eq!(errno as i32, libc::ESTALE, "what was sent of the first file system is nothing of the second");
    until("it is the source again", || broker.session_of("moving").source_gone.is_none());
    assert_eq!(gone(&broker.session_of("moving")), 1);

    // Unmounted and not mounted again: the mount point is not a valid source, and the guest keeps its files.
    mounts.pop();
    until_gone(&broker, "moving", "another file system", 2);
    broker.control().hand_over("moving");
    until("it is said", || {
        broker.session_of("moving").finding.is_some_and(|finding| finding.reason == Reason::SourceMissing)
    });
    assert_eq!(read(&guest), "second\n");
    mounts.push("third\n");
    hand_over(&broker, "moving");
    assert_eq!(read(&guest), "third\n");
    until("it is the source again", || broker.session_of("moving").source_gone.is_none());
    mounts.pop();
    assert_eq!(guest.violations(), []);
}

#[test]
fn replaced_directory_is_detected() {
    let broker = Broker::start();
    let endpoint = broker.share("replaced");
    let guest = boot(&endpoint);
    assert_eq!(read(&guest), "from the host\n");
    let aside = broker.source("replaced").with_file_name("aside");
    let source: &Path = &endpoint.source;
    fs::rename(source, &aside).unwrap();
    until_gone(&broker, "replaced", "nothing is there", 1);
    fs::create_dir(source).unwrap();
    fs::write(source.join("hello"), "another\n").unwrap();
    until_gone(&broker, "replaced", "another directory", 1);
    // Restored without a hand-over: the source matches again.
    fs::remove_dir_all(source).unwrap();
    fs::rename(&aside, source).unwrap();
    until("it is the source again", || broker.session_of("replaced").source_gone.is_none());
    assert_eq!(read(&guest), "from the host\n");
    fs::remove_dir_all(source).unwrap();
    until_gone(&broker, "replaced", "nothing is there", 2);
}
