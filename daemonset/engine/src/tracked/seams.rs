//! Looking at the library's open files through its own reads and writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use virtiofsd::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::{ReadvFlags, WritevFlags};

/// A reader of nothing that is shown the file it would read from.
pub(super) struct Glance<L: FnMut(&File) -> io::Result<()>>(pub(super) L);

impl<L: FnMut(&File) -> io::Result<()>> ZeroCopyWriter for Glance<L> {
    fn read_from_file_at(&mut self, f: &File, _: usize, _: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        (self.0)(f).map(|()| 0)
    }
}

/// A write that first looks at the file, and may begin in the middle of what the guest sent.
pub(super) struct Measured<'a, R, L: FnMut(&File) -> io::Result<Skip>> {
    pub(super) reader: R,
    /// Says how much of the data stands in the file already.
    pub(super) look: L,
    /// Where data goes of which a part is not to be written again.
    pub(super) scratch: &'a File,
}

/// How much of an append was carried out before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skip {
    /// Nothing: write as asked.
    Nothing,
    /// This many bytes; the rest belongs at this offset.
    Bytes {
        /// Bytes that stand in the file.
        done: usize,
        /// The end of the file.
        rest_at: u64,
    },
}

impl<R: ZeroCopyReader, L: FnMut(&File) -> io::Result<Skip>> ZeroCopyReader for Measured<'_, R, L> {
    fn write_to_file_at(&mut self, f: &File, count: usize, off: u64, flags: Option<WritevFlags>) -> io::Result<usize> {
        match (self.look)(f)? {
            Skip::Nothing => self.reader.write_to_file_at(f, count, off, flags),
            Skip::Bytes { done, .. } if done >= count => Ok(count),
            Skip::Bytes { done, rest_at } => {
                // All of it, and not only what is to be skipped: the library's reader ends only where one of the
                // guest's buffers does.
                let sent = self.reader.write_to_file_at(self.scratch, count, 0, None)?.min(count);
                let mut rest = vec![0; sent.saturating_sub(done)];
                self.scratch.read_exact_at(&mut rest, done as u64)?;
                f.write_all_at(&rest, rest_at)?;
                Ok(sent)
            }
        }
    }
}
