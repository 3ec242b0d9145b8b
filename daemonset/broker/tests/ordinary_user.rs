//! A broker of an ordinary user: what guests can do with that user's rights alone.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use common::{Broker, boot, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::fuse::call::CallError;
use testkit::fuse::client::{Caller, SetAttr};
use testkit::guest::Guest;
use virtiofs_config::{IdTranslation, IdTranslationKind, Sandbox};
use virtiofs_contract::control::{Endpoint, SessionState};
use virtiofs_contract::preflight::Reason;

const USER: u32 = 4712;

const SANDBOXES: [Sandbox; 2] = [Sandbox::Namespace, Sandbox::None];

fn writable_share(broker: &Broker, sandbox: Sandbox) -> Endpoint {
    let mut endpoint = broker.endpoint("data");
    endpoint.engine.sandbox = sandbox;
    chown(&endpoint.source, Some(USER), Some(USER)).unwrap();
    endpoint
}

fn kill_engine(broker: &Broker) {
    let before = broker.session_of("data").engine_pid.unwrap();
    kill(Pid::from_raw(before as i32), Signal::SIGKILL).unwrap();
    until("another engine serves", || broker.session_of("data").engine_pid.is_some_and(|pid| pid != before));
    broker.until_state("data", SessionState::Serving);
}

fn errno<T>(result: Result<T, CallError>) -> Option<i32> {
    result.err().map(|error| error.errno().unwrap() as i32)
}

#[test]
fn an_open_file_keeps_its_rights_across_engines() {
    for sandbox in SANDBOXES {
        let broker = Broker::start_as_user(USER);
        let endpoint = writable_share(&broker, sandbox);
        broker.control().apply(&endpoint).unwrap();
        let guest = boot(&endpoint);
        let fuse = guest.fuse();
        // As git makes its objects.
        let made = fuse.create(1, "object", libc::O_RDWR | libc::O_EXCL, 0o444).unwrap();
        let (node, fh) = (made.entry.nodeid, made.open.fh);
        fuse.write(node, fh, 0, b"before ", 0).unwrap();
        kill_engine(&broker);
        let fuse = guest.fuse();
        assert_eq!(fuse.write(node, fh, 7, b"after", 0).unwrap(), 5, "{sandbox:?}");
        assert_eq!(fuse.read(node, fh, 0, 100).unwrap(), b"before after");
        fuse.fsync(node, fh, false).unwrap();
        fuse.setattr(node, &SetAttr { size: Some(6), fh: Some(fh), ..SetAttr::default() }).unwrap();
        assert_eq!(fs::read(endpoint.source.join("object")).unwrap(), b"before", "{sandbox:?}");
        fuse.release(node, fh, 0).unwrap();
        if sandbox == Sandbox::None {
            assert_eq!(errno(fuse.open(node, libc::O_WRONLY)), Some(libc::EACCES), "a new open is checked");
        }
    }
}

fn create_as(guest: &Guest, uid: u32, name: &str) -> Result<(), CallError> {
    let fuse = guest.fuse();
    let fuse = fuse.as_caller(Caller { uid, gid: uid, ..Caller::default() });
    let made = fuse.create(1, name, libc::O_RDWR, 0o644)?;
    fuse.release(made.entry.nodeid, made.open.fh, 0)
}

#[test]
fn other_users_of_a_guest_get_eperm_and_the_share_says_so() {
    for sandbox in SANDBOXES {
        let broker = Broker::start_as_user(USER);
        let endpoint = writable_share(&broker, sandbox);
        let preflight = broker.control().apply(&endpoint).unwrap();
        let notice = preflight.findings.iter().find(|finding| finding.reason == Reason::GuestUsersRestricted);
        let notice = notice.unwrap_or_else(|| panic!("{sandbox:?}: {:?}", preflight.findings));
        assert!(notice.message.contains("4712") && notice.remedy.contains("uidTranslation"), "{notice:?}");
        let guest = boot(&endpoint);
        let fuse = guest.fuse();
        for uid in [0, USER] {
            create_as(&guest, uid, &format!("of-{uid}")).unwrap();
        }
        assert_eq!(errno(create_as(&guest, 1000, "other")), Some(libc::EPERM), "{sandbox:?}");
        let other = fuse.as_caller(Caller { uid: 1000, gid: 1000, ..Caller::default() });
        assert_eq!(errno(other.mkdir(1, "other", 0o755)), Some(libc::EPERM), "{sandbox:?}");
        assert_eq!(errno(other.mknod(1, "other", libc::S_IFREG | 0o644, 0)), Some(libc::EPERM), "{sandbox:?}");
        assert_eq!(errno(other.symlink(1, "other", "target")), Some(libc::EPERM), "{sandbox:?}");
        let node = fuse.lookup(1, "of-0").unwrap().nodeid;
        for (uid, gid) in [(Some(1000), None), (None, Some(1000)), (Some(1000), Some(1000))] {
            let set = SetAttr { uid, gid, ..SetAttr::default() };
            assert_eq!(errno(fuse.setattr(node, &set)), Some(libc::EPERM), "{sandbox:?}, {set:?}");
        }
        assert!(!endpoint.source.join("other").exists());
    }
}

#[test]
fn squashed_users_of_a_guest_create_files() {
    for sandbox in SANDBOXES {
        let broker = Broker::start_as_user(USER);
        let mut endpoint = writable_share(&broker, sandbox);
        let squash = IdTranslation { kind: IdTranslationKind::SquashGuest, from: 0, to: USER, count: u32::MAX };
        endpoint.engine.uid_translation = vec![squash.clone()];
        endpoint.engine.gid_translation = vec![squash];
        let preflight = broker.control().apply(&endpoint).unwrap();
        assert!(!preflight.findings.iter().any(|finding| finding.reason == Reason::GuestUsersRestricted));
        let guest = boot(&endpoint);
        for uid in [0, 1000, 65_534] {
            let name = format!("of-{uid}");
            create_as(&guest, uid, &name).unwrap();
            let made = endpoint.source.join(&name).metadata().unwrap();
            assert_eq!((made.uid(), made.gid(), made.permissions().mode() & 0o777), (USER, USER, 0o644));
        }
    }
}
