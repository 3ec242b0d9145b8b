//! Files that no name leads to any more, and that the guest still has open.
//!
//! The library reaches a file by its name and opens it itself; an open file cannot be put into it. So what was
//! unlinked, renamed over or removed on the host while the guest had it open is served from here once another
//! engine has taken over: its descriptor was parked in the broker, or the kernel opened it by its file handle.
//!
//! The guest must not see a difference, so every answer is the one that [`PassthroughFs`] (or, on a read-only
//! share, [`PassthroughFsRo`]) would give: the same system calls in the same order, with the library's own id
//! maps, xattr maps, attributes and capability guard. The tests hold the two against each other, operation by
//! operation. Arguments of the trait's methods that the library does not look at are left out here.
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

pub(crate) use attributes::Through;
pub(crate) use contents::{Place, Write};
pub(crate) use kernel_handle::{MAX_FILE_HANDLE, kernel_file_handle, open_by_kernel_handle};

use ids::Ids;
use names::XattrNames;

/// How adopted files are served: one value per engine.
pub(crate) struct AdoptedFiles {
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

impl AdoptedFiles {
    /// Serves as the library does with `library`, which it must not have been given yet: it takes the id maps and
    /// `proc_sfd_rawfd` out of its configuration.
    ///
    /// # Errors
    /// `library` has no `proc_sfd_rawfd` or its id maps contradict themselves.
    pub(crate) fn new(library: &Config, writable: bool) -> io::Result<Self> {
        let proc_self_fd = library
            .proc_sfd_rawfd
            .as_ref()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "proc_sfd_rawfd is not set"))?
            .try_clone()?;
        Ok(AdoptedFiles {
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

    /// Takes over what the library's `init` answered; after its `destroy`, that is nothing.
    pub(crate) fn negotiated(&self, agreed: FsOptions) {
        self.writeback.store(agreed.contains(FsOptions::WRITEBACK_CACHE), Ordering::Relaxed);
        self.names.allow_posix_acls(agreed.contains(FsOptions::POSIX_ACL));
    }

    /// The way of every operation that changes something.
    fn may_change(&self) -> io::Result<()> {
        if self.writable { Ok(()) } else { Err(errno(libc::EROFS)) }
    }
}

/// One open file. Dropping it is its release.
pub(crate) struct AdoptedFile {
    file: File,
    regular: bool,
}

impl AdoptedFile {
    /// Takes `file` in.
    ///
    /// # Errors
    /// `EBADF` for what the library would not open either: neither a regular file nor a directory, or only a path.
    pub(crate) fn adopt(file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !(kind.is_file() || kind.is_dir()) || fcntl_getfl(&file)?.contains(OFlags::PATH) {
            return Err(errno(libc::EBADF));
        }
        Ok(AdoptedFile { file, regular: kind.is_file() })
    }

    /// The open file itself, for copying between it and others.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
