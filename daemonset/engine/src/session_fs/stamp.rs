//! What identifies a file for as long as it exists, read by one `statx`.
//!
//! An inode number alone does not: file systems reuse it at once. Together with the time at which the inode was made, its
//! device and its mount it does, on file systems where the kernel alone sets that time. The clock of file times has
//! steps of milliseconds, in which a number could be used twice. So a file is identified only once it is older than
//! [`SETTLED`]: whatever gets its number later was made later.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use rustix::fs::{AtFlags, Statx, StatxFlags, statx};
use virtiofsd::fuse::Attr;

/// Age from which a birth time identifies a file.
const SETTLED: Duration = Duration::from_secs(1);

/// A mount of a file system, as a directory on it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    device: (u32, u32),
    id: u64,
}

impl Mount {
    /// The mount of an open file; none if the kernel does not say it, or if the file system has no birth times.
    pub(super) fn of(file: &File) -> io::Result<Option<Self>> {
        let found = statx(file, c"", AtFlags::EMPTY_PATH, wanted())?;
        Ok(has(&found, wanted()).then(|| Mount::in_statx(&found)))
    }

    /// True if this is its number (`mnt_id`).
    pub(super) fn is(self, id: u64) -> bool {
        self.id == id
    }

    fn in_statx(found: &Statx) -> Self {
        Mount { device: (found.stx_dev_major, found.stx_dev_minor), id: found.stx_mnt_id }
    }
}

/// Identifies a file that was [`SETTLED`] when it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    mount: Mount,
    inode: u64,
    /// Seconds and nanoseconds since 1970.
    birth: (i64, u32),
    /// The `S_IFMT` bits of its mode.
    kind: u16,
}

impl Stamp {
    /// True if no other file can have this stamp, now and later.
    pub(super) fn is_settled(&self) -> bool {
        let now = clock_gettime(ClockId::CLOCK_REALTIME_COARSE).map_or(Duration::ZERO, Duration::from);
        u64::try_from(self.birth.0).is_ok_and(|born| Duration::new(born, self.birth.1) + SETTLED < now)
    }
}

/// A file as `statx` found it.
pub(super) struct Found {
    pub(super) stat: libc::stat64,
    /// None if it is on another mount or device than its directory, or has no birth time.
    pub(super) stamp: Option<Stamp>,
}

impl Found {
    /// What `name` leads to below `directory`, which is on `mount`. A symbolic link is not followed and nothing is mounted,
    /// as when the library looks a name up.
    pub(super) fn below(directory: &File, name: &CStr, mount: Mount) -> io::Result<Self> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        Ok(Found::in_statx(&statx(directory, name, flags, wanted())?, mount))
    }

    /// An open file, which is on `mount`.
    pub(super) fn itself(file: &File, mount: Mount) -> io::Result<Self> {
        Ok(Found::in_statx(&statx(file, c"", AtFlags::EMPTY_PATH, wanted())?, mount))
    }

    /// True if these are the file's attributes: they were read of the same file, and nothing has changed since.
    pub(super) fn has_attributes(&self, attr: &Attr) -> bool {
        let Found { stat, .. } = self;
        (stat.st_ino, stat.st_mode, stat.st_nlink as u32, stat.st_size as u64)
            == (attr.ino, attr.mode, attr.nlink, attr.size)
            && (stat.st_ctime, stat.st_ctime_nsec as u32) == (attr.ctime as i64, attr.ctimensec)
            && (stat.st_mtime, stat.st_mtime_nsec as u32) == (attr.mtime as i64, attr.mtimensec)
    }

    fn in_statx(found: &Statx, directory: Mount) -> Self {
        let mount = Mount::in_statx(found);
        let stamp = (has(found, wanted()) && mount == directory).then_some(Stamp {
            mount,
            inode: found.stx_ino,
            birth: (found.stx_btime.tv_sec, found.stx_btime.tv_nsec),
            kind: found.stx_mode & libc::S_IFMT as u16,
        });
        Found { stat: stat_of(found), stamp }
    }
}

fn wanted() -> StatxFlags {
    StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID
}

fn has(found: &Statx, wanted: StatxFlags) -> bool {
    found.stx_mask & wanted.bits() == wanted.bits()
}

/// The same as the library makes of it.
fn stat_of(found: &Statx) -> libc::stat64 {
    // SAFETY: integers only, for which zero is a value.
    let mut stat: libc::stat64 = unsafe { MaybeUninit::zeroed().assume_init() };
    stat.st_dev = libc::makedev(found.stx_dev_major, found.stx_dev_minor);
    stat.st_ino = found.stx_ino;
    stat.st_mode = found.stx_mode.into();
    stat.st_nlink = found.stx_nlink as _;
    stat.st_uid = found.stx_uid;
    stat.st_gid = found.stx_gid;
    stat.st_rdev = libc::makedev(found.stx_rdev_major, found.stx_rdev_minor);
    stat.st_size = found.stx_size as _;
    stat.st_blksize = found.stx_blksize as _;
    stat.st_blocks = found.stx_blocks as _;
    (stat.st_atime, stat.st_atime_nsec) = (found.stx_atime.tv_sec, found.stx_atime.tv_nsec.into());
    (stat.st_mtime, stat.st_mtime_nsec) = (found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec.into());
    (stat.st_ctime, stat.st_ctime_nsec) = (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec.into());
    stat
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(directory: &std::path::Path, name: &CStr) -> Found {
        let directory = File::open(directory).unwrap();
        let mount = Mount::of(&directory).unwrap().expect("tests run on a file system with birth times");
        Found::below(&directory, name, mount).unwrap()
    }

    #[test]
    fn a_file_keeps_its_stamp_and_another_one_has_another() {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("a"), "x").unwrap();
        let first = found(place.path(), c"a").stamp.unwrap();
        std::fs::write(place.path().join("a"), "longer").unwrap();
        std::fs::hard_link(place.path().join("a"), place.path().join("b")).unwrap();
        assert_eq!(found(place.path(), c"b").stamp, Some(first), "contents and names do not identify it");
        std::fs::write(place.path().join("c"), "x").unwrap();
        assert_ne!(found(place.path(), c"c").stamp, Some(first));
    }

    #[test]
    fn a_new_file_is_not_settled() {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("a"), "").unwrap();
        let stamp = found(place.path(), c"a").stamp.unwrap();
        assert!(!stamp.is_settled());
        assert!(Stamp { birth: (stamp.birth.0 - 2, stamp.birth.1), ..stamp }.is_settled());
        assert!(!Stamp { birth: (-1, 0), ..stamp }.is_settled(), "before 1970");
    }

    #[test]
    fn what_is_mounted_on_a_name_has_no_stamp() {
        // Nothing needs to be mounted for it: /proc is.
        assert!(found(std::path::Path::new("/"), c"proc").stamp.is_none());
    }
}
