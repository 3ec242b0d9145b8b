//! Which file system a source lies on, told by where that is mounted.
//!
//! A directory on which something was mounted is still there when that is unmounted, empty and on another file
//! system. A guest that had files open must not be shown that one.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofs_contract::preflight::{Finding, Reason};

use super::finding;

/// Where the file system of a directory is mounted, in the kernel's spelling of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountPoint(PathBuf);

impl MountPoint {
    /// Of an open directory; none where the kernel does not tell.
    pub(crate) fn of(directory: &impl AsFd) -> Option<Self> {
        let stat = statx(directory, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::MNT_ID).ok()?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        find(&mounts, stat.stx_mnt_id)
    }

    /// Is the file system at `now` the one on which this one was mounted?
    fn was_mounted_on(&self, now: &MountPoint) -> bool {
        *self != *now && self.0.starts_with(&now.0)
    }
}

/// Says so if the file system that was there `before` is not there `now`.
pub(crate) fn check(before: Option<&MountPoint>, now: Option<&MountPoint>) -> Result<(), Finding> {
    match (before, now) {
        (Some(before), Some(now)) if before.was_mounted_on(now) => Err(finding(
            Reason::SourceMissing,
            format!("the file system that was mounted at {} is not there", before.0.display()),
            "mount it again; a VM that is to go on without it has to connect anew",
        )),
        _ => Ok(()),
    }
}

/// proc_pid_mountinfo(5): the first field is the mount's number, the fifth where it is mounted.
fn find(mounts: &str, id: u64) -> Option<MountPoint> {
    let line = mounts.lines().find(|line| line.split(' ').next().and_then(|field| field.parse().ok()) == Some(id))?;
    Some(MountPoint(Path::new(line.split(' ').nth(4)?).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_list_is_read_by_number() {
        let mounts = "21 1 8:1 / / rw - ext4 /dev/a rw\n210 21 8:2 / /srv/a\\040b rw shared:1 - xfs /dev/b rw\n";
        assert_eq!(find(mounts, 210), Some(MountPoint("/srv/a\\040b".into())));
        assert_eq!(find(mounts, 2), None);
        assert!(MountPoint::of(&std::fs::File::open("/proc/self").unwrap()).is_some());
    }

    #[test]
    fn only_what_is_seen_when_a_file_system_is_gone_is_refused() {
        let at = |path: &str| Some(MountPoint(path.into()));
        for (before, now, good) in [
            (at("/srv/a"), at("/srv/a"), true),
            (at("/srv/a"), at("/srv"), false),
            (at("/srv/a"), at("/"), false),
            (at("/srv/a"), at("/srv/a/b"), true),
            (at("/srv/ab"), at("/srv/a"), true),
            (at("/"), at("/srv"), true),
            (None, at("/"), true),
            (at("/srv/a"), None, true),
        ] {
            assert_eq!(check(before.as_ref(), now.as_ref()).is_ok(), good, "{before:?} {now:?}");
        }
    }
}
