//! What a change of contents or owner takes away: set-id bits and file capabilities.

use std::fs::File;
use std::io;

use rustix::fs::fremovexattr;
use rustix::io::Errno;
use virtiofsd::passthrough::credentials::{ScopedCaps, drop_effective_cap};

use super::{AdoptedFile, AdoptedFiles};

impl AdoptedFiles {
    /// Gives up `CAP_FSETID` until the guard is dropped, where the guest `asked` for it: without it the kernel
    /// itself clears the set-id bits.
    pub(super) fn kill_set_id(&self, asked: bool) -> io::Result<Option<ScopedCaps>> {
        if self.killpriv && asked { drop_effective_cap("FSETID") } else { Ok(None) }
    }

    /// Removes the file capabilities where they are kept under another name: under their own the kernel does it.
    pub(super) fn clear_file_capabilities(&self, adopted: &AdoptedFile, through: &File) -> io::Result<()> {
        match self.names.file_capabilities() {
            Some(name) if adopted.regular => match fremovexattr(through, name) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
                Err(error) => Err(error.into()),
            },
            _ => Ok(()),
        }
    }
}
