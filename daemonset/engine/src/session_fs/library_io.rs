//! Access to the library's open files, which it keeps private, through its own reads and writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use virtiofsd::filesystem::{FileSystem, ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::{ReadvFlags, WritevFlags};

use super::errors::{engine_context, error};
use super::handles::OpenFile;

/// Calls `probe` with the file behind a handle.
///
/// # Errors
/// The error of `probe`, or `EBADF` if the library does not know the handle.
pub(super) fn probe_file<F: FileSystem, T>(
    library: &F,
    file: &OpenFile,
    mut probe: impl FnMut(&File) -> io::Result<T>,
) -> io::Result<T> {
    let (inode, handle) = match file {
        OpenFile::Library { inode, handle } => (*inode, *handle),
        OpenFile::Orphaned(file) => return probe(file.file()),
    };
    let mut found = None;
    let reader = FileProbe(|file: &File| {
        found = Some(probe(file)?);
        Ok(())
    });
    library.read(engine_context(), inode.into(), handle.into(), reader, 0, 0, None, 0)?;
    found.ok_or_else(|| error(libc::EBADF))
}

/// The destination of a read of no bytes, which is shown the file to read from.
struct FileProbe<P: FnMut(&File) -> io::Result<()>>(P);

impl<P: FnMut(&File) -> io::Result<()>> ZeroCopyWriter for FileProbe<P> {
    fn read_from_file_at(&mut self, f: &File, _: usize, _: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        (self.0)(f).map(|()| 0)
    }
}

/// How much of an append the first run wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// Nothing.
    Nothing,
    /// A beginning.
    Bytes {
        /// Number of bytes that are in the file.
        done: usize,
        /// Offset at which the rest belongs: the end of the file.
        rest_at: u64,
    },
}

/// The source of a write that looks at the file first and leaves out what was written before.
pub(super) struct ResumedWrite<'a, R, P: FnMut(&File) -> io::Result<Written>> {
    pub(super) reader: R,
    /// Returns how much of the data is in the file already.
    pub(super) probe: P,
    /// Takes data of which a part is not to be written again.
    pub(super) scratch: &'a File,
}

impl<R: ZeroCopyReader, P: FnMut(&File) -> io::Result<Written>> ZeroCopyReader for ResumedWrite<'_, R, P> {
    fn write_to_file_at(&mut self, f: &File, count: usize, off: u64, flags: Option<WritevFlags>) -> io::Result<usize> {
        match (self.probe)(f)? {
            Written::Nothing => self.reader.write_to_file_at(f, count, off, flags),
            Written::Bytes { done, .. } if done >= count => Ok(count),
            Written::Bytes { done, rest_at } => {
                // All of it, not only the part to leave out: the library's reader stops only at the end of one of the
                // guest's buffers.
                let sent = self.reader.write_to_file_at(self.scratch, count, 0, None)?.min(count);
                let mut rest = vec![0; sent.saturating_sub(done)];
                self.scratch.read_exact_at(&mut rest, done as u64)?;
                f.write_all_at(&rest, rest_at)?;
                Ok(sent)
            }
        }
    }
}
