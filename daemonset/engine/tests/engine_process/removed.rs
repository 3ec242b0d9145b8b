//! Files that the host removes or replaces while the guest still has a name for them: a write must not be lost.

use std::fs;
use std::io::Read;

use testkit::fuse::client::{Caller, SetAttr};
use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::staleness::Cause;

use crate::fixture::{Fixture, ROOT, config, errno};

fn descriptors() -> EngineConfig {
    EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }
}

/// Descriptors and file handles. Where a process of the host has the file open, a handle finds it too.
fn modes() -> [EngineConfig; 3] {
    let mandatory = EngineConfig { inode_file_handles: InodeFileHandles::Mandatory, ..config() };
    [config(), descriptors(), mandatory]
}

/// Looks a name up, as a thread of the guest that is not the one to open it: that one comes by the cached name.
fn lookup(fixture: &Fixture, name: &str) -> u64 {
    let other = Caller { pid: 99, ..Caller::default() };
    fixture.guest.fuse().as_caller(other).lookup(ROOT, name).unwrap().nodeid
}

fn replace(fixture: &Fixture, name: &str) {
    fixture.write("beside", "new");
    fs::rename(fixture.path().join("beside"), fixture.path().join(name)).unwrap();
}

#[test]
fn files_that_the_host_removed_are_neither_opened_nor_changed() {
    for config in modes() {
        let fixture = Fixture::new(config);
        for name in ["removed", "replaced"] {
            fixture.write(name, "old");
            let node = lookup(&fixture, name);
            // By this the file stays reachable for a file handle.
            let mut held = fs::File::open(fixture.path().join(name)).unwrap();
            match name {
                "removed" => fs::remove_file(fixture.path().join(name)).unwrap(),
                _ => replace(&fixture, name),
            }
            let fuse = fixture.guest.fuse();
            for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
                assert_eq!(errno(fuse.open(node, flags)), Some(libc::ESTALE), "{name}, open {flags:o}");
            }
            let set = SetAttr { size: Some(0), ..SetAttr::default() };
            assert_eq!(errno(fuse.setattr(node, &set)), Some(libc::ESTALE), "{name}");
            let set = SetAttr { mode: Some(0o600), ..SetAttr::default() };
            assert_eq!(errno(fuse.setattr(node, &set)), Some(libc::ESTALE), "{name}");
            assert_eq!(errno(fuse.setxattr(node, "user.a", b"b", 0)), Some(libc::ESTALE), "{name}");
            assert_eq!(errno(fuse.removexattr(node, "user.a")), Some(libc::ESTALE), "{name}");
            assert_eq!(errno(fuse.link(node, ROOT, "link")), Some(libc::ESTALE), "{name}");
            let mut contents = String::new();
            held.read_to_string(&mut contents).unwrap();
            assert_eq!(contents, "old", "nothing was cut off under a process of the host");
            assert!(!fixture.path().join("link").exists());
        }
        // What the guest's kernel does upon that.
        let fuse = fixture.guest.fuse();
        assert_eq!(errno(fuse.lookup(ROOT, "removed")), Some(libc::ENOENT));
        let made = fuse.create(ROOT, "removed", libc::O_WRONLY, 0o600).unwrap();
        fuse.write(made.entry.nodeid, made.open.fh, 0, b"kept", 0).unwrap();
        let node = lookup(&fixture, "replaced");
        let fh = fuse.open(node, libc::O_WRONLY | libc::O_TRUNC).unwrap().fh;
        fuse.write(node, fh, 0, b"kept", 0).unwrap();
        for name in ["removed", "replaced"] {
            assert_eq!(fs::read(fixture.path().join(name)).unwrap(), b"kept", "{name}");
        }
        assert_eq!(fixture.stale(), [(Cause::SourceReplaced, 1), (Cause::SourceRemoved, 1)]);
    }
}

#[test]
fn open_files_that_the_guest_removed_stay_usable() {
    for config in modes() {
        for replaced in [false, true] {
            let fixture = Fixture::new(config.clone());
            let fuse = fixture.guest.fuse();
            let made = fuse.create(ROOT, "f", libc::O_RDWR, 0o600).unwrap();
            let (node, fh) = (made.entry.nodeid, made.open.fh);
            if replaced {
                fuse.mknod(ROOT, "other", libc::S_IFREG | 0o600, 0).unwrap();
                fuse.rename(ROOT, "other", ROOT, "f", 0).unwrap();
            } else {
                fuse.unlink(ROOT, "f").unwrap();
            }
            fuse.write(node, fh, 0, b"contents", 0).unwrap();
            // fchmod and fsetxattr come without the handle, open of /proc/self/fd as a plain OPEN.
            fuse.setattr(node, &SetAttr { mode: Some(0o640), ..SetAttr::default() }).unwrap();
            fuse.setxattr(node, "user.a", b"b", 0).unwrap();
            let again = fuse.open(node, libc::O_RDWR).unwrap().fh;
            assert_eq!(fuse.read(node, again, 0, 100).unwrap(), b"contents");
            assert_eq!(fixture.stale(), []);
        }
    }
}

#[test]
fn open_files_that_the_host_removed_stay_usable_but_not_by_name() {
    for config in modes() {
        let fixture = Fixture::new(config);
        fixture.write("f", "old");
        let node = lookup(&fixture, "f");
        let fuse = fixture.guest.fuse();
        let fh = fuse.open(node, libc::O_RDWR).unwrap().fh;
        replace(&fixture, "f");
        fuse.write(node, fh, 0, b"own", 0).unwrap();
        fuse.setattr(node, &SetAttr { mode: Some(0o640), ..SetAttr::default() }).unwrap();
        fuse.setxattr(node, "user.a", b"b", 0).unwrap();
        // A thread that opens by name gets ESTALE once, and then looks the name up. One that opens /proc/self/fd opens
        // this node again (do_filp_open).
        let another = fuse.as_caller(Caller { pid: 4711, ..Caller::default() });
        assert_eq!(errno(fuse.open(node, libc::O_WRONLY | libc::O_TRUNC)), Some(libc::ESTALE));
        assert_eq!(errno(another.open(node, libc::O_WRONLY | libc::O_TRUNC)), Some(libc::ESTALE));
        let again = another.open(node, libc::O_RDWR).unwrap().fh;
        assert_eq!(fuse.read(node, again, 0, 100).unwrap(), b"own");
        assert_eq!(fs::read(fixture.path().join("f")).unwrap(), b"new");
        for fh in [fh, again] {
            fuse.release(node, fh, 0).unwrap();
        }
        assert_eq!(errno(another.open(node, libc::O_RDWR)), Some(libc::ESTALE), "it is not open any more");
    }
}

#[test]
fn open_files_that_the_host_removed_are_not_opened_by_name_in_the_next_engine() {
    for config in modes() {
        for replaced in [false, true] {
            let mut fixture = Fixture::new(config.clone());
            fixture.write("f", "old");
            let node = lookup(&fixture, "f");
            let fh = fixture.guest.fuse().open(node, libc::O_RDWR).unwrap().fh;
            if replaced {
                replace(&fixture, "f")
            } else {
                fs::remove_file(fixture.path().join("f")).unwrap()
            }
            for exchange in 0..2 {
                fixture.hand_over();
                let fuse = fixture.guest.fuse();
                // By a cached name: the write would be lost. The kernel looks the name up after ESTALE.
                let by_name = fuse.as_caller(Caller { pid: 4711 + exchange, ..Caller::default() });
                let refused = errno(by_name.open(node, libc::O_WRONLY | libc::O_TRUNC));
                assert_eq!(refused, Some(libc::ESTALE), "replaced: {replaced}, exchange {exchange}");
                assert_eq!(fuse.read(node, fh, 0, 100).unwrap(), b"old");
                // By /proc/self/fd: the same thread opens the node again.
                let by_fd = fuse.as_caller(Caller { pid: 815 + exchange, ..Caller::default() });
                assert_eq!(errno(by_fd.open(node, libc::O_RDWR)), Some(libc::ESTALE));
                let again = by_fd.open(node, libc::O_RDWR).unwrap().fh;
                assert_eq!(fuse.read(node, again, 0, 100).unwrap(), b"old");
                fuse.release(node, again, 0).unwrap();
            }
            assert_eq!(fixture.path().join("f").exists(), replaced);
        }
    }
}

#[test]
fn a_file_with_another_name_left_is_opened() {
    for config in modes() {
        let fixture = Fixture::new(config);
        fixture.write("one", "contents");
        fs::hard_link(fixture.path().join("one"), fixture.path().join("two")).unwrap();
        let node = lookup(&fixture, "one");
        fs::remove_file(fixture.path().join("one")).unwrap();
        let fh = fixture.guest.fuse().open(node, libc::O_RDWR).unwrap().fh;
        assert_eq!(fixture.guest.fuse().read(node, fh, 0, 100).unwrap(), b"contents");
    }
}

#[test]
fn a_file_that_is_replaced_between_lookup_and_open_is_opened() {
    for config in [descriptors(), config()] {
        let fixture = Fixture::new(config);
        let fuse = fixture.guest.fuse();
        // Lookup and open must not take longer than a path walk, so on a busy machine the first attempt may fail.
        let opened = (0..100).find_map(|_| {
            fixture.write("f", "old");
            // A file handle reaches the file while a process of the host has it open.
            let held = fs::File::open(fixture.path().join("f")).unwrap();
            let node = fuse.lookup(ROOT, "f").unwrap().nodeid;
            replace(&fixture, "f");
            fuse.open(node, libc::O_RDONLY).ok().map(|open| (held, node, open.fh))
        });
        let (_held, node, fh) = opened.expect("no OPEN right after its LOOKUP succeeded");
        assert_eq!(fuse.read(node, fh, 0, 100).unwrap(), b"old");
        fuse.release(node, fh, 0).unwrap();
        assert_eq!(errno(fuse.open(node, libc::O_RDONLY)), Some(libc::ESTALE), "the next OPEN comes by a cached name");
    }
}
