//! Directories that the guest removed and still uses, as a working directory for instance.

use std::fs;

use testkit::fuse::client::SetAttr;
use testkit::fuse::wire::Attr;
use virtiofs_config::{EngineConfig, InodeFileHandles};

use crate::fixture::{Fixture, ROOT, config, errno};

/// How the guest removes the directory `d`.
#[derive(Clone, Copy, Debug)]
enum Remove {
    Rmdir,
    /// Another directory is renamed over it.
    RenameOver,
}

fn remove(fixture: &Fixture, how: Remove) {
    let fuse = fixture.guest.fuse();
    match how {
        Remove::Rmdir => fuse.rmdir(ROOT, "d").unwrap(),
        Remove::RenameOver => {
            fuse.mkdir(ROOT, "other", 0o700).unwrap();
            fuse.rename(ROOT, "other", ROOT, "d", 0).unwrap();
        }
    }
}

/// What a removed directory is to a local program: empty, and without links.
fn expect_empty(fixture: &Fixture, node: u64, before: &Attr) {
    let fuse = fixture.guest.fuse();
    let attr = fuse.getattr(node, None).unwrap();
    assert_eq!((attr.nlink, attr.ino, attr.mode), (0, before.ino, before.mode));
    assert_eq!((attr.uid, attr.gid, attr.mtime), (before.uid, before.gid, before.mtime));
    let stream = fuse.opendir(node).unwrap().fh;
    for _ in 0..2 {
        assert_eq!(fuse.readdir(node, stream, 0, 4096).unwrap(), []);
        assert_eq!(fuse.readdirplus(node, stream, 0, 4096).unwrap(), []);
    }
    fuse.fsyncdir(node, stream, false).unwrap();
    fuse.releasedir(node, stream).unwrap();
    fuse.statfs(node).unwrap();
    fuse.access(node, 4).unwrap();
    assert_eq!(errno(fuse.lookup(node, "name")), Some(libc::ENOENT));
    assert_eq!(errno(fuse.create(node, "name", libc::O_RDWR, 0o600)), Some(libc::ENOENT));
    assert_eq!(errno(fuse.mkdir(node, "name", 0o700)), Some(libc::ENOENT));
    assert_eq!(errno(fuse.rename(node, "name", ROOT, "name", 0)), Some(libc::ENOENT));
    assert_eq!(fuse.listxattr(node).unwrap(), Vec::<Vec<u8>>::new());
    assert_eq!(errno(fuse.getxattr(node, "user.a")), Some(libc::ENODATA));
}

#[test]
fn a_removed_directory_stays_usable_over_engines() {
    let modes = [config(), EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }];
    for (config, how) in modes.iter().flat_map(|config| [(config, Remove::Rmdir), (config, Remove::RenameOver)]) {
        let mut fixture = Fixture::new(config.clone());
        let made = fixture.guest.fuse().mkdir(ROOT, "d", 0o750).unwrap();
        let (node, mut before) = (made.nodeid, made.attr);
        let stream = fixture.guest.fuse().opendir(node).unwrap().fh;
        remove(&fixture, how);
        expect_empty(&fixture, node, &before);
        for exchange in 0..3 {
            if exchange == 1 {
                fixture.hand_over()
            } else {
                fixture.kill_and_use(config.clone())
            }
            expect_empty(&fixture, node, &before);
            let fuse = fixture.guest.fuse();
            assert_eq!(fuse.readdir(node, stream, 0, 4096).unwrap(), [], "{how:?}: opened before it was removed");
            before.mode = libc::S_IFDIR | 0o700 | exchange;
            let set = SetAttr { mode: Some(0o700 | exchange), ..SetAttr::default() };
            fuse.setattr(node, &set).unwrap();
        }
        // A directory that is made at its path is another one.
        let fuse = fixture.guest.fuse();
        let again = match how {
            Remove::Rmdir => fuse.mkdir(ROOT, "d", 0o755).unwrap(),
            Remove::RenameOver => fuse.lookup(ROOT, "d").unwrap(),
        };
        assert_ne!(again.nodeid, node);
        fuse.mknod(again.nodeid, "name", libc::S_IFREG | 0o600, 0).unwrap();
        expect_empty(&fixture, node, &before);
        fuse.releasedir(node, stream).unwrap();
        fuse.forget(node, 1).unwrap();
        assert_eq!(errno(fuse.getattr(node, None)), Some(libc::ESTALE), "nothing is kept of it");
        assert_eq!(fixture.stale().len(), 1, "{:?}: only the forgotten id", fixture.stale());
    }
}

#[test]
fn a_directory_that_could_not_be_removed_stays() {
    let mut fixture = Fixture::new(config());
    let fuse = fixture.guest.fuse();
    let node = fuse.mkdir(ROOT, "d", 0o750).unwrap().nodeid;
    fuse.mknod(node, "name", libc::S_IFREG | 0o600, 0).unwrap();
    assert_eq!(errno(fuse.rmdir(ROOT, "d")), Some(libc::ENOTEMPTY));
    fuse.lookup(node, "name").unwrap();
    fixture.kill();
    let fuse = fixture.guest.fuse();
    assert_eq!(fuse.getattr(node, None).unwrap().nlink, 2);
    fuse.lookup(node, "name").unwrap();
}

#[test]
fn a_directory_that_the_host_moved_is_not_the_one_that_was_removed() {
    for config in [config(), EngineConfig { inode_file_handles: InodeFileHandles::Never, ..config() }] {
        let mut fixture = Fixture::new(config.clone());
        let node = fixture.guest.fuse().mkdir(ROOT, "d", 0o750).unwrap().nodeid;
        let at = |name: &str| fixture.path().join(name);
        fs::rename(at("d"), at("elsewhere")).unwrap();
        fs::create_dir(at("d")).unwrap();
        fs::write(at("elsewhere/name"), "").unwrap();
        fixture.guest.fuse().rmdir(ROOT, "d").unwrap();
        fixture.guest.fuse().lookup(node, "name").unwrap();
        assert_eq!(fixture.guest.fuse().lookup(ROOT, "elsewhere").unwrap().nodeid, node);
        fixture.kill_and_use(config);
        fixture.guest.fuse().lookup(node, "name").unwrap();
    }
}

#[test]
fn a_rename_to_the_same_directory_removes_nothing() {
    let fixture = Fixture::new(config());
    let fuse = fixture.guest.fuse();
    let node = fuse.mkdir(ROOT, "d", 0o750).unwrap().nodeid;
    fuse.rename(ROOT, "d", ROOT, "d", 0).unwrap();
    fuse.mknod(node, "name", libc::S_IFREG | 0o600, 0).unwrap();
}
