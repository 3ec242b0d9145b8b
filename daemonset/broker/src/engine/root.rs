//! Detects that the path of a source no longer leads to the directory that is served.
//!
//! An engine keeps the directory that it received open, even if the path is unmounted, mounted over or replaced. It cannot
//! detect that, because it is in a mount namespace of its own; the broker can.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::Errno;

use super::source::Sources;
use crate::record::store::StoredRoot;

/// STATX_MNT_ID_UNIQUE (Linux 6.8): a mount id that is never reused. Older kernels return the reusable id. If a later mount
/// gets that one, its device or inode number differs, because the engine keeps the file system busy.
const UNIQUE_MOUNT: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// Identity of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    mount: u64,
    device: (u32, u32),
    inode: u64,
}

impl From<Root> for StoredRoot {
    fn from(Root { mount, device, inode }: Root) -> Self {
        StoredRoot { mount, device, inode }
    }
}

impl From<StoredRoot> for Root {
    fn from(StoredRoot { mount, device, inode }: StoredRoot) -> Self {
        Root { mount, device, inode }
    }
}

impl Root {
    /// The identity of an open directory.
    pub(crate) fn of(directory: impl AsFd) -> Result<Root, Errno> {
        let found = statx(directory, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::MNT_ID | UNIQUE_MOUNT)?;
        let device = (found.stx_dev_major, found.stx_dev_minor);
        Ok(Root { mount: found.stx_mnt_id, device, inode: found.stx_ino })
    }

    /// The identity of the directory at a path, which is resolved as for an engine's start. Blocks while its file system
    /// hangs.
    pub(crate) fn at(path: &Path, sources: &Sources) -> Result<Root, Errno> {
        Root::of(sources.open(path)?)
    }
}

/// Where a path that led to `served` leads now; none: still to `served`.
pub(crate) fn moved_to(served: Root, found: Result<Root, Errno>) -> Option<String> {
    match found {
        Ok(found) if found == served => None,
        Ok(found) if found.device != served.device => Some("another file system is there now".into()),
        Ok(found) if found.inode != served.inode => Some("another directory is there now".into()),
        Ok(_) => Some("the same directory, mounted again".into()),
        Err(Errno::NOENT | Errno::NOTDIR) => Some("nothing is there any more".into()),
        Err(errno) => Some(format!("it is not accessible: {errno}")),
    }
}

/// Changes of this process's mounts.
pub(crate) struct Mounts(File);

impl Mounts {
    pub(crate) fn watch() -> io::Result<Self> {
        Ok(Mounts(File::open("/proc/self/mountinfo")?))
    }

    /// Waits until a file system is mounted or unmounted, at most this long.
    pub(crate) fn wait(&self, longest: Duration) {
        let mut table = [PollFd::new(&self.0, PollFlags::PRI)];
        // An early or late wake-up does no harm: the caller checks the path in any case.
        let _ = poll(&mut table, Timespec::try_from(longest).ok().as_ref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_change_is_described() {
        let served = Root { mount: 1, device: (8, 1), inode: 2 };
        for (found, expected) in [
            (Ok(served), None),
            (Ok(Root { device: (8, 2), ..served }), Some("another file system")),
            (Ok(Root { inode: 3, ..served }), Some("another directory")),
            (Ok(Root { mount: 2, ..served }), Some("mounted again")),
            (Err(Errno::NOENT), Some("nothing")),
            (Err(Errno::IO), Some("not accessible")),
        ] {
            let said = moved_to(served, found);
            match expected {
                None => assert_eq!(said, None),
                Some(words) => assert!(said.as_ref().is_some_and(|said| said.contains(words)), "{found:?}: {said:?}"),
            }
        }
    }

    #[test]
    fn identity_distinguishes_directories() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("a")).unwrap();
        let sources = Sources { root: "/".into(), allowed: Vec::new(), reserved: Vec::new() };
        let at = |path: &str| Root::at(&root.join(path), &sources);
        let served = at("a").unwrap();
        assert_eq!(Root::of(File::open(root.join("a")).unwrap()), Ok(served));
        std::fs::rename(root.join("a"), root.join("b")).unwrap();
        assert_eq!(at("a"), Err(Errno::NOENT));
        std::fs::create_dir(root.join("a")).unwrap();
        assert!(moved_to(served, at("a")).is_some());
        std::os::unix::fs::symlink("b", root.join("link")).unwrap();
        assert!(moved_to(served, at("link")).is_some(), "engines are not started there either");
    }
}
