//! Contents: READ, WRITE, FSYNC, FLUSH, LSEEK, FALLOCATE and COPY_FILE_RANGE.

use std::fs::File;
use std::io;

use nix::unistd::close;
use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek};
use virtiofsd::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::WritevFlags;

use super::{OrphanedFile, OrphanedFileServer, errno};

/// The arguments of a WRITE.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Write {
    pub(crate) size: u32,
    pub(crate) offset: u64,
    /// True if it comes from the guest's page cache: the guest has chosen the offset, `O_APPEND` or not.
    pub(crate) delayed: bool,
    pub(crate) kill_priv: bool,
    /// The flags of the guest's open file now.
    pub(crate) flags: u32,
}

/// One end of a copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CopyEnd<'a> {
    pub(crate) file: &'a File,
    pub(crate) offset: u64,
}

impl OrphanedFileServer {
    pub(crate) fn read<W: ZeroCopyWriter>(
        &self,
        orphan: &OrphanedFile,
        mut w: W,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        check_range(offset, size)?;
        w.read_from_file_at(&orphan.file, size as usize, offset, None)
    }

    pub(crate) fn write<R: ZeroCopyReader>(&self, orphan: &OrphanedFile, mut r: R, write: Write) -> io::Result<usize> {
        self.may_change()?;
        check_range(write.offset, write.size)?;
        let _guard = self.kill_set_id(write.kill_priv)?;
        self.clear_file_capabilities(orphan, &orphan.file)?;
        // Only the kernel can append at the end if several guests write; the descriptor itself never appends.
        let append = write.flags & libc::O_APPEND as u32 != 0 && !write.delayed;
        let flags = append.then_some(WritevFlags::RWF_APPEND);
        r.write_to_file_at(&orphan.file, write.size as usize, write.offset, flags)
    }

    pub(crate) fn fsync(&self, orphan: &OrphanedFile, datasync: bool) -> io::Result<()> {
        Ok(if datasync { fdatasync(&orphan.file) } else { fsync(&orphan.file) }?)
    }

    /// Has the file system do what it does at close(2) (NFS writes back then) without closing the file.
    pub(crate) fn flush(&self, orphan: &OrphanedFile) -> io::Result<()> {
        Ok(close(rustix::io::dup(&orphan.file)?)?)
    }

    pub(crate) fn lseek(&self, orphan: &OrphanedFile, offset: u64, whence: u32) -> io::Result<u64> {
        let to = match whence as i32 {
            libc::SEEK_SET => SeekFrom::Start(offset),
            libc::SEEK_CUR => SeekFrom::Current(offset as i64),
            libc::SEEK_END => SeekFrom::End(offset as i64),
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(errno(libc::EINVAL)),
        };
        Ok(seek(&orphan.file, to)?)
    }

    pub(crate) fn fallocate(&self, orphan: &OrphanedFile, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        self.may_change()?;
        Ok(fallocate(&orphan.file, FallocateFlags::from_bits_retain(mode), offset, length)?)
    }

    /// Copies between two files, of which at least one is orphaned; both may be the same.
    pub(crate) fn copyfilerange(&self, from: CopyEnd<'_>, to: CopyEnd<'_>, len: u64, flags: u64) -> io::Result<usize> {
        self.may_change()?;
        // The kernel defines no flags yet and refuses all.
        if flags != 0 {
            return Err(errno(libc::EINVAL));
        }
        let (mut offset_in, mut offset_out) = (from.offset, to.offset);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        Ok(copy_file_range(from.file, Some(&mut offset_in), to.file, Some(&mut offset_out), len)?)
    }
}

/// Offsets are signed in the kernel, and the library's zero-copy readers and writers panic if they do not fit.
fn check_range(offset: u64, size: u32) -> io::Result<()> {
    match offset.checked_add(size.into()) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(errno(libc::EINVAL)),
    }
}
