//! Opening an open file again: a guest reaches a file without a name through its `/proc/self/fd`.

use std::fs::File;
use std::io;

use virtiofsd::filesystem::OpenOptions;
use virtiofsd::passthrough::CachePolicy;
use virtiofsd::passthrough::util::reopen_fd_through_proc;

use super::{OrphanedFile, OrphanedFileServer, errno};

impl OrphanedFileServer {
    /// OPEN by node; OPENDIR with `O_DIRECTORY` among `flags`.
    pub(crate) fn open(
        &self,
        orphan: &OrphanedFile,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(OrphanedFile, OpenOptions)> {
        let flags = self.open_flags(flags as i32)?;
        let opened = {
            let _guard = self.kill_set_id(kill_priv)?;
            OrphanedFile::new(self.reopen(orphan, flags)?)?
        };
        if flags & libc::O_TRUNC != 0 {
            self.clear_file_capabilities(&opened, &opened.file)?;
        }
        Ok((opened, self.open_options(flags & libc::O_DIRECTORY != 0)))
    }

    /// The flags to open a file with that the guest opens with `flags`. The file never appends by itself (each write says
    /// whether it appends), and with writeback the guest reads what it opened for writing.
    ///
    /// # Errors
    /// On a read-only share, if the flags are for writing.
    pub(crate) fn open_flags(&self, flags: i32) -> io::Result<i32> {
        let flags = if self.writable { flags } else { only_for_reading(flags)? };
        let mut flags = flags & !libc::O_APPEND;
        if self.clean_noatime {
            flags &= !libc::O_NOATIME;
        }
        flags = self.without_refused_direct_io(flags as u32) as i32;
        if self.writeback_agreed() && flags & libc::O_ACCMODE == libc::O_WRONLY {
            flags = flags & !libc::O_ACCMODE | libc::O_RDWR;
        }
        Ok(flags)
    }

    /// Flags without `O_DIRECT` unless the configuration allows it. The guest bypasses its own cache all the same.
    pub(crate) fn without_refused_direct_io(&self, flags: u32) -> u32 {
        if self.allow_direct_io { flags } else { flags & !(libc::O_DIRECT as u32) }
    }

    /// Opens the same file again, which checks permission again.
    pub(super) fn reopen(&self, orphan: &OrphanedFile, flags: i32) -> io::Result<File> {
        reopen_fd_through_proc(&orphan.file, flags | libc::O_CLOEXEC, &self.proc_self_fd)
    }

    fn open_options(&self, directory: bool) -> OpenOptions {
        match (&self.cache_policy, directory) {
            (CachePolicy::Never | CachePolicy::Metadata, false) => OpenOptions::DIRECT_IO,
            (CachePolicy::Metadata | CachePolicy::Always, true) => OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE,
            (CachePolicy::Always, false) => OpenOptions::KEEP_CACHE,
            (CachePolicy::Never, true) | (CachePolicy::Auto, _) => OpenOptions::empty(),
        }
    }
}

fn only_for_reading(flags: i32) -> io::Result<i32> {
    let has = |flag| flags & flag == flag;
    if flags < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    if has(libc::O_PATH) {
        return Ok(flags);
    }
    if flags & libc::O_ACCMODE != libc::O_RDONLY || has(libc::O_EXCL) {
        return Err(errno(libc::EROFS));
    }
    if has(libc::O_TMPFILE) || has(libc::O_TRUNC) {
        return Err(errno(libc::EINVAL));
    }
    Ok(flags & !libc::O_CREAT)
}
