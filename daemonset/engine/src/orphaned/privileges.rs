//! Set-id bits and file capabilities, which a change of contents or owner removes.

use std::fs::File;
use std::io;

use rustix::fs::fremovexattr;
use rustix::io::Errno;
use virtiofsd::passthrough::credentials::{ScopedCaps, drop_effective_cap};

use super::{OrphanedFile, OrphanedFileServer};

impl OrphanedFileServer {
    /// Drops `CAP_FSETID` until the guard is dropped, if the guest `asked` for that: without it the kernel clears the
    /// set-id bits.
    pub(super) fn kill_set_id(&self, asked: bool) -> io::Result<Option<ScopedCaps>> {
        if self.killpriv && asked { drop_effective_cap("FSETID") } else { Ok(None) }
    }

    /// Removes the file capabilities if they are stored under another name; under their own the kernel removes them.
    pub(super) fn clear_file_capabilities(&self, orphan: &OrphanedFile, through: &File) -> io::Result<()> {
        match self.names.file_capabilities() {
            Some(name) if orphan.regular => match fremovexattr(through, name) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
                Err(error) => Err(error.into()),
            },
            _ => Ok(()),
        }
    }
}
