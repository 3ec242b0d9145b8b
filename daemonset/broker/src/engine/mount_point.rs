//! Identifies the file system of a source by its mount point.
//!
//! When a file system is unmounted, its mount point is still a directory, empty and on another file system. A guest with
//! open files must not be served from that directory.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofs_contract::preflight::{Finding, Reason};

use super::finding;

/// The mount point of a directory's file system, as the kernel spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountPoint(PathBuf);

impl MountPoint {
    /// That of an earlier broker.
    pub(crate) fn restored(path: PathBuf) -> Self {
        MountPoint(path)
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The mount point of an open directory; none if the kernel does not report it.
    pub(crate) fn of(directory: &impl AsFd) -> Option<Self> {
        let stat = statx(directory, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::MNT_ID).ok()?;
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        find(&mounts, stat.stx_mnt_id)
    }

    /// True if `now` is the file system on which this one was mounted.
    fn was_mounted_on(&self, now: &MountPoint) -> bool {
        *self != *now && self.0.starts_with(&now.0)
    }
}

/// Returns a finding if the file system that was mounted before is not mounted now.
pub(crate) fn check(before: Option<&MountPoint>, now: Option<&MountPoint>) -> Result<(), Finding> {
    match (before, now) {
        (Some(before), Some(now)) if before.was_mounted_on(now) => Err(finding(
            Reason::SourceMissing,
            format!("the file system that was mounted at {} is not mounted", before.0.display()),
            "mount it again; to continue without it, disconnect the VM and connect it again",
        )),
        _ => Ok(()),
    }
}

/// Parses proc_pid_mountinfo(5): the first field is the mount id, the fifth the mount point.
fn find(mounts: &str, id: u64) -> Option<MountPoint> {
    let line = mounts.lines().find(|line| line.split(' ').next().and_then(|field| field.parse().ok()) == Some(id))?;
    Some(MountPoint(Path::new(line.split(' ').nth(4)?).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_point_is_found_by_id() {
        let mounts = "21 1 8:1 / / rw - ext4 /dev/a rw\n210 21 8:2 / /srv/a\\040b rw shared:1 - xfs /dev/b rw\n";
        assert_eq!(find(mounts, 210), Some(MountPoint("/srv/a\\040b".into())));
        assert_eq!(find(mounts, 2), None);
        assert!(MountPoint::of(&std::fs::File::open("/proc/self").unwrap()).is_some());
    }

    #[test]
    fn only_an_unmounted_file_system_is_refused() {
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
