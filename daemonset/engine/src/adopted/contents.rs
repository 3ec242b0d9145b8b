//! Contents: reading, writing, syncing, seeking, space, copying.

use std::fs::File;
use std::io;

use nix::unistd::close;
use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, seek};
use virtiofsd::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::WritevFlags;

use super::{AdoptedFile, AdoptedFiles, errno};

/// The arguments of a WRITE.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Write {
    pub(crate) size: u32,
    pub(crate) offset: u64,
    /// Does it come from the guest's page cache? Then the guest has chosen the offset, `O_APPEND` or not.
    pub(crate) delayed: bool,
    pub(crate) kill_priv: bool,
    /// The open flags that the guest's file has now.
    pub(crate) flags: u32,
}

/// One end of a copy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) file: &'a File,
    pub(crate) offset: u64,
}

impl AdoptedFiles {
    pub(crate) fn read<W: ZeroCopyWriter>(
        &self,
        adopted: &AdoptedFile,
        mut w: W,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        check_range(offset, size)?;
        w.read_from_file_at(&adopted.file, size as usize, offset, None)
    }

    pub(crate) fn write<R: ZeroCopyReader>(&self, adopted: &AdoptedFile, mut r: R, write: Write) -> io::Result<usize> {
        self.may_change()?;
        check_range(write.offset, write.size)?;
        let _guard = self.kill_set_id(write.kill_priv)?;
        self.clear_file_capabilities(adopted, &adopted.file)?;
        // Only the kernel can append exactly where several guests write; the descriptor itself never appends.
        let append = write.flags & libc::O_APPEND as u32 != 0 && !write.delayed;
        let flags = append.then_some(WritevFlags::RWF_APPEND);
        r.write_to_file_at(&adopted.file, write.size as usize, write.offset, flags)
    }

    pub(crate) fn fsync(&self, adopted: &AdoptedFile, datasync: bool) -> io::Result<()> {
        Ok(if datasync { fdatasync(&adopted.file) } else { fsync(&adopted.file) }?)
    }

    /// What closing a descriptor tells (NFS writes back then) without closing this one.
    pub(crate) fn flush(&self, adopted: &AdoptedFile) -> io::Result<()> {
        Ok(close(rustix::io::dup(&adopted.file)?)?)
    }

    pub(crate) fn lseek(&self, adopted: &AdoptedFile, offset: u64, whence: u32) -> io::Result<u64> {
        let to = match whence as i32 {
            libc::SEEK_SET => SeekFrom::Start(offset),
            libc::SEEK_CUR => SeekFrom::Current(offset as i64),
            libc::SEEK_END => SeekFrom::End(offset as i64),
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(errno(libc::EINVAL)),
        };
        Ok(seek(&adopted.file, to)?)
    }

    pub(crate) fn fallocate(&self, adopted: &AdoptedFile, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        self.may_change()?;
        Ok(fallocate(&adopted.file, FallocateFlags::from_bits_retain(mode), offset, length)?)
    }

    /// Between two files of which at least one is adopted; both may be the same.
    pub(crate) fn copyfilerange(&self, from: Place<'_>, to: Place<'_>, len: u64, flags: u64) -> io::Result<usize> {
        self.may_change()?;
        // The kernel knows none yet and refuses all.
        if flags != 0 {
            return Err(errno(libc::EINVAL));
        }
        let (mut offset_in, mut offset_out) = (from.offset, to.offset);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        Ok(copy_file_range(from.file, Some(&mut offset_in), to.file, Some(&mut offset_out), len)?)
    }
}

/// Offsets are signed in the kernel, and a zero-copy reader or writer of the library panics where they do not fit.
fn check_range(offset: u64, size: u32) -> io::Result<()> {
    match offset.checked_add(size.into()) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(errno(libc::EINVAL)),
    }
}
