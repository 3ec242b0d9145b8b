//! Files with capabilities: the guest's kernel removes them before it changes the file, and fails if that fails.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, setxattr};
use virtiofs_config::{EngineConfig, InodeFileHandles};

use crate::fixture::{Fixture, ROOT, config, errno};

const NAME: &str = "security.capability";

/// `cap_net_raw=ep` in the second revision of `struct vfs_cap_data`, as `setcap` writes it.
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn with_capabilities(path: &Path, mode: u32) {
    fs::write(path, "program").unwrap();
    setxattr(path, NAME, &NET_RAW, XattrFlags::empty()).unwrap();
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn has_capabilities(path: &Path) -> bool {
    getxattr(path, NAME, &mut [0u8; 64][..]).is_ok()
}

#[test]
fn file_capabilities_are_removed_without_the_right_to_set_them() {
    for handles in [InodeFileHandles::Prefer, InodeFileHandles::Never] {
        let fixture = Fixture::new(EngineConfig { inode_file_handles: handles, ..config() });
        let fuse = fixture.guest.fuse();
        for mode in [0o755, 0o6755] {
            let path = fixture.path().join("program");
            with_capabilities(&path, mode);
            let node = fuse.lookup(ROOT, "program").unwrap().nodeid;
            fuse.removexattr(node, NAME).unwrap();
            assert!(!has_capabilities(&path), "{mode:o}");
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, mode);
            assert_eq!(fs::read(&path).unwrap(), b"program");
            assert_eq!(errno(fuse.removexattr(node, NAME)), Some(libc::ENODATA), "there are none left");
            assert_eq!(errno(fuse.setxattr(node, NAME, &NET_RAW, 0)), Some(libc::EPERM), "setting needs the right");
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn file_capabilities_of_an_orphaned_file_are_removed() {
    let mut fixture = Fixture::new(config());
    let path = fixture.path().join("program");
    with_capabilities(&path, 0o4755);
    let fuse = fixture.guest.fuse();
    let node = fuse.lookup(ROOT, "program").unwrap().nodeid;
    let fh = fuse.open(node, libc::O_RDWR).unwrap().fh;
    fuse.unlink(ROOT, "program").unwrap();
    fixture.kill();
    let fuse = fixture.guest.fuse();
    assert_eq!(fuse.read(node, fh, 0, 7).unwrap(), b"program");
    fuse.removexattr(node, NAME).unwrap();
    assert_eq!(errno(fuse.getxattr(node, NAME)), Some(libc::ENODATA));
    assert_eq!(fuse.getattr(node, None).unwrap().mode & 0o7777, 0o4755);
}
