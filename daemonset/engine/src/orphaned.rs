//! Orphaned files: no name leads to them any more, and the guest still has them open.
//!
//! The library opens files by name and cannot take over an open file. So a file that was unlinked, renamed over or
//! removed on the host while the guest had it open is served from here once another engine has taken over. Its
//! descriptor comes from the fd stash, or the kernel opens it by its file handle.
//!
//! The guest must not see a difference, so every reply is the one that [`PassthroughFs`] (or, on a read-only share,
//! [`PassthroughFsRo`]) would give: the same system calls in the same order, with the library's own id maps, xattr maps,
//! attributes and capability guard. The tests compare the two, operation by operation. Arguments that the library ignores
//! are left out.
//!
//! [`PassthroughFs`]: virtiofsd::passthrough::PassthroughFs
//! [`PassthroughFsRo`]: virtiofsd::passthrough::read_only::PassthroughFsRo

mod attributes;
mod contents;
mod ids;
mod kernel_handle;
mod names;
mod open;
mod privileges;
#[cfg(test)]
mod tests;
mod xattr;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{OFlags, fcntl_getfl};
use virtiofsd::filesystem::FsOptions;
use virtiofsd::passthrough::{CachePolicy, Config};
use virtiofsd::soft_idmap::{GuestGid, GuestUid};

pub(crate) use attributes::SetattrBy;
pub(crate) use contents::{CopyEnd, Write};
pub(crate) use kernel_handle::{KernelFileHandle, MAX_FILE_HANDLE, kernel_file_handle, open_by_kernel_handle};

use ids::Ids;
use names::XattrNames;

/// Serves orphaned files; one per engine.
pub(crate) struct OrphanedFileServer {
    writable: bool,
    attr_timeout: Duration,
    cache_policy: CachePolicy,
    allow_direct_io: bool,
    clean_noatime: bool,
    killpriv: bool,
    writeback: AtomicBool,
    ids: Ids,
    names: XattrNames,
    proc_self_fd: File,
}

impl OrphanedFileServer {
    /// Serves as the library does with the configuration `library`. Call this before the library gets it: the library
    /// takes the id maps and `proc_sfd_rawfd` out.
    ///
    /// # Errors
    /// If `library` has no `proc_sfd_rawfd`, or its id maps overlap.
    pub(crate) fn new(library: &Config, writable: bool) -> io::Result<Self> {
        let proc_self_fd = library
            .proc_sfd_rawfd
            .as_ref()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "proc_sfd_rawfd is not set"))?
            .try_clone()?;
        Ok(OrphanedFileServer {
            writable,
            attr_timeout: library.attr_timeout,
            cache_policy: library.cache_policy.clone(),
            allow_direct_io: library.allow_direct_io,
            clean_noatime: library.clean_noatime,
            killpriv: library.killpriv_v2,
            writeback: AtomicBool::new(false),
            ids: Ids::new(library)?,
            names: XattrNames::new(library),
            proc_self_fd,
        })
    }

    /// Applies the options that the library's `init` returned; none after its `destroy`.
    pub(crate) fn negotiated(&self, agreed: FsOptions) {
        self.writeback.store(agreed.contains(FsOptions::WRITEBACK_CACHE), Ordering::Relaxed);
        self.names.allow_posix_acls(agreed.contains(FsOptions::POSIX_ACL));
    }

    /// How long a guest may trust attributes.
    pub(crate) fn attr_timeout(&self) -> Duration {
        self.attr_timeout
    }

    /// True if the guest keeps written data in its page cache and sends it later (FUSE_WRITEBACK_CACHE).
    pub(crate) fn writeback_agreed(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// The host's id of a guest's user; none if it may not be used.
    pub(crate) fn host_uid(&self, uid: GuestUid) -> Option<u32> {
        self.ids.host_uid(uid).ok()
    }

    /// The host's id of a guest's group; none if it may not be used.
    pub(crate) fn host_gid(&self, gid: GuestGid) -> Option<u32> {
        self.ids.host_gid(gid).ok()
    }

    /// True if the share is writable.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Called first by every operation that changes something.
    fn may_change(&self) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(errno(libc::EROFS)) }
    }
}

/// An open file. Dropping it closes it.
pub(crate) struct OrphanedFile {
    file: File,
    regular: bool,
}

impl OrphanedFile {
    /// Wraps an open file.
    ///
    /// # Errors
    /// `EBADF` for what the library would not open either: neither a regular file nor a directory, or an `O_PATH`
    /// descriptor.
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !(kind.is_file() || kind.is_dir()) || fcntl_getfl(&file)?.contains(OFlags::PATH) {
            return Err(errno(libc::EBADF));
        }
        Ok(OrphanedFile { file, regular: kind.is_file() })
    }

    /// The open file itself.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
