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

use super::{AdoptedFile, AdoptedFiles};

/// How the guest named the file in a SETATTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Through {
    /// By a handle: its size changes through the descriptor as it was opened.
    Handle,
    /// By its node alone: it is opened for writing when its size is to change.
    Node,
}

impl AdoptedFiles {
    /// Also for GETATTR by node alone: the library never looks at the handle.
    pub(crate) fn getattr(&self, adopted: &AdoptedFile) -> io::Result<(Attr, Duration)> {
        let stat = statx(&adopted.file, None)?.st;
        Ok((self.ids.attributes(stat)?, self.attr_timeout))
    }

    pub(crate) fn setattr(
        &self,
        adopted: &AdoptedFile,
        attr: SetattrIn,
        through: Through,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        self.may_change()?;
        let writable = self.open_to_resize(adopted, through, valid)?;
        if valid.contains(SetattrValid::MODE) {
            oslib::fchmod(adopted.file.as_raw_fd(), attr.mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            self.change_owner(adopted, &attr, valid)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let file = writable.as_ref().unwrap_or(&adopted.file);
            let _guard = self.kill_set_id(valid.contains(SetattrValid::KILL_SUIDGID))?;
            self.clear_file_capabilities(adopted, file)?;
            ftruncate(file, attr.size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            futimens(&adopted.file, &times(&attr, valid))?;
        }
        self.getattr(adopted)
    }

    pub(crate) fn statfs(&self, adopted: &AdoptedFile) -> io::Result<libc::statvfs64> {
        let mut out = MaybeUninit::<libc::statvfs64>::zeroed();
        // SAFETY: the descriptor is open and `out` is as large as the call writes.
        let result = unsafe { libc::fstatvfs64(adopted.file.as_raw_fd(), out.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: integers only, all of them zero before the call filled them in.
        Ok(unsafe { out.assume_init() })
    }

    /// Before anything else is changed, so that a refusal leaves everything as it was.
    fn open_to_resize(&self, adopted: &AdoptedFile, through: Through, valid: SetattrValid) -> io::Result<Option<File>> {
        if through == Through::Node && valid.contains(SetattrValid::SIZE) {
            self.reopen(adopted, libc::O_RDWR | libc::O_NONBLOCK).map(Some)
        } else {
            Ok(None)
        }
    }

    fn change_owner(&self, adopted: &AdoptedFile, attr: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
        let uid = valid.contains(SetattrValid::UID).then(|| self.ids.host_uid(attr.uid)).transpose()?;
        let gid = valid.contains(SetattrValid::GID).then(|| self.ids.host_gid(attr.gid)).transpose()?;
        self.clear_file_capabilities(adopted, &adopted.file)?;
        let here = AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW;
        Ok(fchownat(&adopted.file, c"", uid.map(Uid::from_raw), gid.map(Gid::from_raw), here)?)
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
