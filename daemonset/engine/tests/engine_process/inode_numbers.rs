//! Inode numbers of files of several file systems in one source: a guest takes files with equal numbers on one device for
//! the same file.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tempfile::TempDir;
use testkit::fuse::client::SetAttr;
use testkit::fuse::init::InitFlags;
use testkit::guest::{Guest, GuestConfig};
use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::staleness::Cause;

use crate::engine::Engine;
use crate::fixture::{Fixture, ROOT, config, walk};
use crate::mounted::Mounted;

fn modes() -> [EngineConfig; 2] {
    [config(), EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }]
}

fn ino(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

/// The numbers of a node by every operation that returns one.
fn numbers(guest: &Guest, parent: u64, name: &str) -> Vec<u64> {
    let fuse = guest.fuse();
    let found = fuse.lookup(parent, name).unwrap();
    let set = SetAttr { mode: Some(0o640), ..SetAttr::default() };
    let stream = fuse.opendir(parent).unwrap().fh;
    let listed = fuse.readdirplus(parent, stream, 0, 1 << 16).unwrap();
    let listed = listed.into_iter().find(|entry| entry.name == name.as_bytes()).unwrap();
    fuse.releasedir(parent, stream).unwrap();
    vec![
        found.attr.ino,
        fuse.getattr(found.nodeid, None).unwrap().ino,
        fuse.setattr(found.nodeid, &set).unwrap().ino,
        listed.found.unwrap().attr.ino,
    ]
}

/// The number of a node; all operations must agree.
fn number(guest: &Guest, parent: u64, name: &str) -> u64 {
    let numbers = numbers(guest, parent, name);
    assert!(numbers.iter().all(|number| *number == numbers[0]), "{name}: {numbers:?}");
    numbers[0]
}

/// A tmpfs `source` and another one `beside`: `own` of the first has the number and the links of `other` of the second.
fn two_file_systems() -> (TempDir, Mounted, Mounted) {
    let directory = tempfile::tempdir().unwrap();
    let [source, beside] = ["source", "beside"].map(|name| Mounted::tmpfs(&directory.path().join(name)).shared());
    for (mount, name) in [(&source, "own"), (&beside, "other")] {
        fs::write(mount.0.join(name), name).unwrap();
        fs::hard_link(mount.0.join(name), mount.0.join("link")).unwrap();
    }
    assert_eq!(ino(&source.0.join("own")), ino(&beside.0.join("other")), "the test needs equal numbers");
    (directory, source, beside)
}

#[test]
fn files_that_are_mounted_one_by_one_have_numbers_of_their_own() {
    for config in modes() {
        let (directory, source, beside) = two_file_systems();
        let at = |name: &str| source.0.join(name);
        for name in ["early", "late"] {
            fs::write(at(name), "").unwrap();
        }
        let _early = Mounted::bind(&beside.0.join("other"), &at("early"));
        let mut fixture = Fixture::on(directory, source.0.clone(), config.clone());
        let own = number(&fixture.guest, ROOT, "own");
        assert_eq!(own, ino(&at("own")), "a file of the source's file system keeps its number");
        let early = number(&fixture.guest, ROOT, "early");
        // A file that is mounted while the engine serves, and was seen before.
        number(&fixture.guest, ROOT, "late");
        let _late = Mounted::bind(&beside.0.join("link"), &at("late"));
        let late = number(&fixture.guest, ROOT, "late");
        assert_eq!(early, late, "two names of one file");
        assert_ne!(early, own);
        assert_eq!(number(&fixture.guest, ROOT, "link"), own, "a hard link is one");
        for hand_over in [false, true] {
            let before = ["own", "early"].map(|name| walk(&fixture.guest, name));
            if hand_over {
                fixture.hand_over()
            } else {
                fixture.kill_and_use(config.clone())
            }
            let attributes = before.map(|node| fixture.guest.fuse().getattr(node, None).unwrap().ino);
            assert_eq!(attributes, [own, early], "nodes keep their numbers");
            assert_eq!(["own", "early"].map(|name| walk(&fixture.guest, name)), before);
            for (name, expected) in [("own", own), ("early", early), ("late", late)] {
                assert_eq!(number(&fixture.guest, ROOT, name), expected, "{name}");
            }
        }
        assert_eq!(fixture.stale(), [(Cause::SourceReplaced, 1)], "the mount over a file that the guest held");
    }
}

#[test]
fn files_below_mount_points_that_are_not_announced_have_numbers_of_their_own() {
    let ignorant = InitFlags::linux_6_12().difference(InitFlags::SUBMOUNTS);
    for (announce_submounts, flags) in [(false, InitFlags::linux_6_12()), (true, ignorant)] {
        let config = || EngineConfig { announce_submounts, ..config() };
        let source = tempfile::tempdir().unwrap();
        let mounts = ["one", "two"].map(|name| Mounted::tmpfs(&source.path().join(name)));
        mounts.iter().for_each(|mount| fs::write(mount.0.join("file"), "").unwrap());
        assert_eq!(ino(&mounts[0].0.join("file")), ino(&mounts[1].0.join("file")));
        let engine = Engine::start(source.path(), config()).unwrap();
        let mut boot = GuestConfig { busy_poll: true, ..engine.guest_config() };
        boot.init.flags = flags;
        let guest = Guest::boot(boot).unwrap();
        let all = |guest: &Guest| {
            ["one", "two"].map(|name| {
                let directory = walk(guest, name);
                let number = number(guest, directory, "file");
                let fuse = guest.fuse();
                let stream = fuse.opendir(directory).unwrap().fh;
                let listed = fuse.readdir(directory, stream, 0, 1 << 16).unwrap();
                let file = listed.iter().find(|entry| entry.name == b"file").unwrap();
                assert_eq!(file.ino, number, "READDIR");
                [number, fuse.getattr(directory, None).unwrap().ino]
            })
        };
        let before = all(&guest);
        assert!(before[0].iter().all(|number| !before[1].contains(number)), "{before:?}");
        let engine = engine.killed(source.path(), config()).unwrap();
        guest.reconnect_to(&engine.socket()).unwrap();
        assert_eq!(all(&guest), before, "stable over engines");
    }
}

#[test]
fn announced_mount_points_leave_the_hosts_numbers() {
    let source = tempfile::tempdir().unwrap();
    let mount = Mounted::tmpfs(&source.path().join("one"));
    fs::write(mount.0.join("file"), "").unwrap();
    let engine = Engine::start(source.path(), config()).unwrap();
    let guest = engine.boot();
    assert_eq!(number(&guest, walk(&guest, "one"), "file"), ino(&mount.0.join("file")));
}

#[test]
fn files_of_overlay_layers_on_several_file_systems_have_numbers_of_their_own() {
    for config in modes() {
        let (directory, lower, upper) = two_file_systems();
        let at = directory.path().join("merged");
        let _overlay = Mounted::overlay(&lower.0, &upper.0.join("upper"), &upper.0.join("work"), &at);
        // Both layers' numbers begin where they do on every tmpfs.
        let wanted = ino(&at.join("own"));
        let found = (0..64).map(|n| format!("made-{n}")).find(|name| {
            fs::write(at.join(name), "").unwrap();
            ino(&at.join(name)) == wanted
        });
        // The upper file system has used the number for `other`: its directory's name leads there.
        let name = found.unwrap_or_else(|| {
            fs::rename(upper.0.join("other"), upper.0.join("upper/made")).unwrap();
            "made".into()
        });
        let host = ["own", &name].map(|name| fs::metadata(at.join(name)).unwrap());
        assert_eq!(host[0].ino(), host[1].ino(), "the test needs equal numbers");
        assert_ne!(host[0].dev(), host[1].dev());
        let mut fixture = Fixture::on(directory, at, config.clone());
        // A change would copy a file of the lower layer up, which gives it another number on the host.
        let number = |guest: &Guest, name: &str| {
            let found = guest.fuse().lookup(ROOT, name).unwrap();
            assert_eq!(guest.fuse().getattr(found.nodeid, None).unwrap().ino, found.attr.ino);
            found.attr.ino
        };
        let before = ["own", &name].map(|name| number(&fixture.guest, name));
        assert_ne!(before[0], before[1]);
        fixture.kill_and_use(config);
        assert_eq!(["own", &name].map(|name| number(&fixture.guest, name)), before, "stable over engines");
        fixture.guest.fuse().rename(ROOT, &name, ROOT, "renamed", 0).unwrap();
        assert_eq!(number(&fixture.guest, "renamed"), before[1], "a rename keeps the number");
    }
}
