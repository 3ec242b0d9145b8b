//! Attributes: GETATTR, SETATTR and STATFS.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::fcntl::AtFlags;
use nix::unistd::{Gid, Uid, fchownat};
use rustix::fs::{Timespec, Timestamps, ftruncate, futimens};
use virtiofsd::filesystem::SetattrValid;
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib;
use virtiofsd::passthrough::stat::statx;

use super::{OrphanedFile, OrphanedFileServer};

/// How a SETATTR names the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SetattrBy {
    /// By handle: the size changes through the descriptor as it was opened.
    Handle,
    /// By node alone: the file is opened for writing if its size is to change.
    Node,
}

impl OrphanedFileServer {
    /// The guest's attributes of a file of the host.
    pub(crate) fn attributes(&self, stat: libc::stat64) -> io::Result<Attr> {
        self.ids.attributes(stat)
    }

    /// Also for GETATTR by node: the library ignores the handle.
    pub(crate) fn getattr(&self, orphan: &OrphanedFile) -> io::Result<(Attr, Duration)> {
        let stat = statx(&orphan.file, None)?.st;
        Ok((self.attributes(stat)?, self.attr_timeout))
    }

    pub(crate) fn setattr(
        &self,
        orphan: &OrphanedFile,
        attr: SetattrIn,
        through: SetattrBy,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        self.may_change()?;
        let writable = self.open_to_resize(orphan, through, valid)?;
        if valid.contains(SetattrValid::MODE) {
            oslib::fchmod(orphan.file.as_raw_fd(), attr.mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            self.change_owner(orphan, &attr, valid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let file = writable.as_ref().unwrap_or(&orphan.file);
            let _guard = self.kill_set_id(valid.contains(SetattrValid::KILL_SUIDGID))?;
            self.clear_file_capabilities(orphan, file)?;
            ftruncate(file, attr.size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            futimens(&orphan.file, &times(&attr, valid))?;
        }
        self.getattr(orphan)
    }

    pub(crate) fn statfs(&self, orphan: &OrphanedFile) -> io::Result<libc::statvfs64> {
        let mut out = MaybeUninit::<libc::statvfs64>::zeroed();
        // SAFETY: the descriptor is open and `out` is as large as the call writes.
        let result = unsafe { libc::fstatvfs64(orphan.file.as_raw_fd(), out.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: integers only, all of them zero before the call filled them in.
        Ok(unsafe { out.assume_init() })
    }

    /// Opened before anything is changed, so that an error leaves everything as it was.
    fn open_to_resize(
        &self,
        orphan: &OrphanedFile,
        through: SetattrBy,
        valid: SetattrValid,
    ) -> io::Result<Option<File>> {
        if through == SetattrBy::Node && valid.contains(SetattrValid::SIZE) {
            self.reopen(orphan, libc::O_RDWR | libc::O_NONBLOCK).map(Some)
        } else {
            Ok(None)
        }
    }

    fn change_owner(&self, orphan: &OrphanedFile, attr: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
        let uid = valid.contains(SetattrValid::UID).then(|| self.ids.host_uid(attr.uid)).transpose()?;
        let gid = valid.contains(SetattrValid::GID).then(|| self.ids.host_gid(attr.gid)).transpose()?;
        self.clear_file_capabilities(orphan, &orphan.file)?;
        let here = AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW;
        Ok(fchownat(&orphan.file, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), here)?)
    }
}

fn times(attr: &SetattrIn, valid: SetattrValid) -> Timestamps {
    let time = |now, given, seconds: u64, nanoseconds: u32| {
        if valid.contains(now) {
            Timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW }
        } else if valid.contains(given) {
            Timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds.into() }
        } else {
            Timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT }
        }
    };
    Timestamps {
        last_access: time(SetattrValid::ATIME_NOW, SetattrValid::ATIME, attr.atime, attr.atimensec),
        last_modification: time(SetattrValid::MTIME_NOW, SetattrValid::MTIME, attr.mtime, attr.mtimensec),
    }
}
