//! Files that the host removes or replaces while the guest still has a name for them: a write must not be lost.

use std::fs;
use std::io::Read;

use testkit::fuse::client::{Caller, SetAttr};
use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::staleness::Cause;

use crate::bench::{Bench, ROOT, config, errno};

fn descriptors() -> EngineConfig {
    EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }
}

/// Descriptors and file handles. Where a process of the host has the file open, a handle finds it too.
fn modes() -> [EngineConfig; 3] {
    let mandatory = EngineConfig { inode_file_handles: InodeFileHandles::Mandatory, ..config() };
    [config(), descriptors(), mandatory]
}

fn lookup(bench: &Bench, name: &str) -> u64 {
    bench.guest.fuse().lookup(ROOT, name).unwrap().nodeid
}

fn replace(bench: &Bench, name: &str) {
    bench.write("beside", "new");
    fs::rename(bench.path().join("beside"), bench.path().join(name)).unwrap();
}

#[test]
fn a_file_that_the_host_removed_is_neither_opened_nor_changed() {
    for config in modes() {
        let bench = Bench::new(config);
        for name in ["removed", "replaced"] {
            bench.write(name, "old");
            let node = lookup(&bench, name);
            // By this the file stays reachable for a file handle.
            let mut held = fs::File::open(bench.path().join(name)).unwrap();
            match name {
                "removed" => fs::remove_file(bench.path().join(name)).unwrap(),
                _ => replace(&bench, name),
            }
            let fuse = bench.guest.fuse();
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
            assert!(!bench.path().join("link").exists());
        }
        // What the guest's kernel does upon that.
        let fuse = bench.guest.fuse();
        assert_eq!(errno(fuse.lookup(ROOT, "removed")), Some(libc::ENOENT));
        let made = fuse.create(ROOT, "removed", libc::O_WRONLY, 0o600).unwrap();
        fuse.write(made.entry.nodeid, made.open.fh, 0, b"kept", 0).unwrap();
        let node = lookup(&bench, "replaced");
        let fh = fuse.open(node, libc::O_WRONLY | libc::O_TRUNC).unwrap().fh;
        fuse.write(node, fh, 0, b"kept", 0).unwrap();
        for name in ["removed", "replaced"] {
            assert_eq!(fs::read(bench.path().join(name)).unwrap(), b"kept", "{name}");
        }
        assert_eq!(bench.stale(), [(Cause::SourceReplaced, 1), (Cause::SourceRemoved, 1)]);
    }
}

#[test]
fn a_file_that_the_guest_removed_and_has_open_is_used_on() {
    for config in modes() {
        for replaced in [false, true] {
            let bench = Bench::new(config.clone());
            let fuse = bench.guest.fuse();
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
            assert_eq!(bench.stale(), []);
        }
    }
}

#[test]
fn an_open_file_that_the_host_removed_is_used_on_but_not_opened_by_its_name() {
    for config in modes() {
        let bench = Bench::new(config);
        bench.write("f", "old");
        let node = lookup(&bench, "f");
        let fuse = bench.guest.fuse();
        let fh = fuse.open(node, libc::O_RDWR).unwrap().fh;
        replace(&bench, "f");
        fuse.write(node, fh, 0, b"own", 0).unwrap();
        fuse.setattr(node, &SetAttr { mode: Some(0o640), ..SetAttr::default() }).unwrap();
        fuse.setxattr(node, "user.a", b"b", 0).unwrap();
        // A process that comes by the name asks once, and then for the name. One that comes by /proc/self/fd asks
        // for this node again (do_filp_open).
        let another = fuse.as_caller(Caller { pid: 4711, ..Caller::default() });
        assert_eq!(errno(fuse.open(node, libc::O_WRONLY | libc::O_TRUNC)), Some(libc::ESTALE));
        assert_eq!(errno(another.open(node, libc::O_WRONLY | libc::O_TRUNC)), Some(libc::ESTALE));
        let again = another.open(node, libc::O_RDWR).unwrap().fh;
        assert_eq!(fuse.read(node, again, 0, 100).unwrap(), b"own");
        assert_eq!(fs::read(bench.path().join("f")).unwrap(), b"new");
        for fh in [fh, again] {
            fuse.release(node, fh, 0).unwrap();
        }
        assert_eq!(errno(another.open(node, libc::O_RDWR)), Some(libc::ESTALE), "nobody has it open any more");
    }
}

#[test]
fn a_file_with_another_name_left_is_opened() {
    for config in modes() {
        let bench = Bench::new(config);
        bench.write("one", "contents");
        fs::hard_link(bench.path().join("one"), bench.path().join("two")).unwrap();
        let node = lookup(&bench, "one");
        fs::remove_file(bench.path().join("one")).unwrap();
        let fh = bench.guest.fuse().open(node, libc::O_RDWR).unwrap().fh;
        assert_eq!(bench.guest.fuse().read(node, fh, 0, 100).unwrap(), b"contents");
    }
}
