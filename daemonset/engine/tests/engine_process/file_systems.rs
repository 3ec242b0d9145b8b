//! Replacement, open files and staleness on the file systems that hosts have.

use std::fs;
use std::path::Path;

use testkit::skip::require;
use virtiofs_config::{EngineConfig, InodeFileHandles};
use virtiofs_contract::staleness::Cause;

use crate::fixture::{Fixture, ROOT, config, errno};
use crate::mounted::Mounted;

fn mounted(fs_type: &str, directory: &Path) -> Option<Mounted> {
    let at = directory.join("source");
    match fs_type {
        "tmpfs" => Some(Mounted::tmpfs(&at)),
        "overlay" => {
            let layers = ["lower", "upper", "work"].map(|name| directory.join("layers").join(name));
            fs::create_dir_all(&layers[0]).unwrap();
            // The layers are on another file system than the one of the test, which may be an overlayfs itself.
            Some(Mounted::overlay(&layers[0], &layers[1], &layers[2], &at))
        }
        _ => require(&format!("mkfs.{fs_type} and a loop device"), Mounted::image(fs_type, &at)),
    }
}

fn replaced_on(fs_type: &str, handles: InodeFileHandles) {
    let directory = tempfile::tempdir().unwrap();
    let Some(mount) = mounted(fs_type, directory.path()) else { return };
    let config = EngineConfig { inode_file_handles: handles, ..config() };
    let mut fixture = Fixture::on(directory, mount.0.clone(), config.clone());
    fixture.write("gone", "by the host");
    let fuse = fixture.guest.fuse().clone();
    let made = |name: &str, text: &[u8]| {
        let made = fuse.create(ROOT, name, libc::O_RDWR, 0o644).unwrap();
        fuse.write(made.entry.nodeid, made.open.fh, 0, text, 0).unwrap();
        (made.entry.nodeid, made.open.fh)
    };
    let (kept, removed) = (made("kept", b"kept"), made("removed", b"removed"));
    let below = fuse.mkdir(ROOT, "below", 0o755).unwrap().nodeid;
    fuse.mkdir(below, "deeper", 0o755).unwrap();
    fuse.unlink(ROOT, "removed").unwrap();
    fuse.lookup(ROOT, "gone").unwrap();
    for round in 0..4 {
        if round % 2 == 0 {
            fixture.kill_and_use(config.clone())
        } else {
            fixture.hand_over_to(config.clone())
        }
        let fuse = fixture.guest.fuse();
        assert_eq!(fuse.read(kept.0, kept.1, 0, 100).unwrap(), b"kept", "{fs_type}, round {round}");
        assert_eq!(fuse.read(removed.0, removed.1, 0, 100).unwrap(), b"removed", "{fs_type}, round {round}");
        assert_eq!(fuse.lookup(ROOT, "kept").unwrap().nodeid, kept.0);
        assert_eq!(fuse.lookup(below, "deeper").unwrap().attr.mode & libc::S_IFMT, libc::S_IFDIR);
        assert_eq!(fixture.stale(), [], "{fs_type}, round {round}: the guest alone changes anything");
    }
    fs::remove_file(fixture.path().join("gone")).unwrap();
    assert_eq!(errno(fixture.guest.fuse().lookup(ROOT, "gone")), Some(libc::ENOENT));
    assert_eq!(fixture.stale(), [(Cause::SourceRemoved, 1)], "{fs_type}");
    assert_eq!(fs::read(fixture.path().join("kept")).unwrap(), b"kept");
    assert_eq!(fixture.guest.violations(), []);
}

fn replaced_with_and_without_handles(fs_type: &str) {
    for handles in [InodeFileHandles::Prefer, InodeFileHandles::Never] {
        replaced_on(fs_type, handles);
    }
}

#[test]
fn engines_are_replaced_on_ext4() {
    replaced_with_and_without_handles("ext4");
}

#[test]
fn engines_are_replaced_on_xfs() {
    replaced_with_and_without_handles("xfs");
}

#[test]
fn engines_are_replaced_on_btrfs() {
    replaced_with_and_without_handles("btrfs");
}

#[test]
fn engines_are_replaced_on_overlayfs() {
    replaced_with_and_without_handles("overlay");
}

#[test]
fn engines_are_replaced_on_tmpfs() {
    replaced_with_and_without_handles("tmpfs");
}
