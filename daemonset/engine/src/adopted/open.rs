//! Opening once more what is open: a guest reaches a nameless file through its own `/proc/self/fd`.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use virtiofsd::filesystem::OpenOptions;
use virtiofsd::passthrough::CachePolicy;
use virtiofsd::passthrough::util::reopen_fd_through_proc;

use super::{AdoptedFile, AdoptedFiles, errno};

impl AdoptedFiles {
    /// OPEN by node; OPENDIR with `O_DIRECTORY` among `flags`.
    pub(crate) fn open(
        &self,
        adopted: &AdoptedFile,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(AdoptedFile, OpenOptions)> {
        let flags = self.open_flags(flags as i32)?;
        let opened = {
            let _guard = self.kill_set_id(kill_priv)?;
            AdoptedFile::adopt(self.reopen(adopted, flags)?)?
        };
        if flags & libc::O_TRUNC != 0 {
            self.clear_file_capabilities(&opened, &opened.file)?;
        }
        Ok((opened, self.open_options(flags & libc::O_DIRECTORY != 0)))
    }

    /// What a file is really opened with when the guest opens it with `flags`: it never appends by itself (each
    /// write says whether it does), and a guest that collects writes reads what it opened for writing.
    ///
    /// # Errors
    /// On a read-only share, flags that are for writing.
    pub(crate) fn open_flags(&self, flags: i32) -> io::Result<i32> {
        let flags = if self.writable { flags } else { only_for_reading(flags)? };
        let mut flags = flags & !libc::O_APPEND;
        if self.clean_noatime {
            flags &= !libc::O_NOATIME;
        }
        if !self.allow_direct_io {
            flags &= !libc::O_DIRECT;
        }
        if self.writeback.load(Ordering::Relaxed) && flags & libc::O_ACCMODE == libc::O_WRONLY {
            flags = flags & !libc::O_ACCMODE | libc::O_RDWR;
        }
        Ok(flags)
    }

    /// A descriptor of the same file, opened anew: permission is checked anew too.
    pub(super) fn reopen(&self, adopted: &AdoptedFile, flags: i32) -> io::Result<File> {
        reopen_fd_through_proc(&adopted.file, flags | libc::O_CLOEXEC, &self.proc_self_fd)
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
