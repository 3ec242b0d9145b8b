//! Removing file capabilities without the right to set them.
//!
//! The guest's kernel removes `security.capability` from a file before it writes to, truncates or chowns it
//! (`file_remove_privs` and `notify_change` call `cap_inode_killpriv`), and fails the call if the file server does. For
//! `removexattr` of that name the host wants CAP_SETFCAP (`cap_inode_removexattr`), which engines do not have unless
//! `fileCapabilities` is on. The host removes file capabilities by itself, though, when a file's owner is set
//! (`ATTR_KILL_PRIV` in `chown_common`), even to the owner that it has.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::{Context, FileSystem, SetattrValid};
use virtiofsd::fuse::{Attr, SetattrIn};

use crate::ledger::Slot;
use crate::orphaned::SetattrBy;

use super::SessionFs;
use super::errors::{errno, error};
use super::nodes::Target;
use super::request::RequestContext;
use super::state::State;

const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;

impl<F: FileSystem> SessionFs<F> {
    /// Removes an attribute that the engine may not remove directly, if it is the file's capabilities.
    ///
    /// # Errors
    /// `denied` for other attributes and other errors than `EPERM`; `ENODATA` if the file has no capabilities.
    pub(super) fn remove_file_capabilities(
        &self,
        state: &mut State,
        (request, ctx): (RequestContext, Context),
        slot: Slot,
        name: &CStr,
        denied: io::Error,
    ) -> io::Result<()> {
        let native = name == c"security.capability" && !self.xattr_names_mapped;
        if !native || errno(&denied) != libc::EPERM {
            return Err(denied);
        }
        self.get_attribute(state, request, slot, name, 0)?;
        let target = self.target(state, request, slot)?;
        let before = self.attributes(ctx, &target)?;
        let owner = SetattrIn { uid: before.uid, ..SetattrIn::default() };
        self.set_attributes(ctx, &target, owner, SetattrValid::UID)?;
        // It takes the set-user-ID bit too. An engine that ends in between leaves the file without it.
        if before.mode & SET_ID != 0 {
            let mode = SetattrIn { mode: before.mode & 0o7777, ..SetattrIn::default() };
            self.set_attributes(ctx, &target, mode, SetattrValid::MODE)?;
        }
        match self.get_attribute(state, request, slot, name, 0) {
            Err(absent) if errno(&absent) == libc::ENODATA => Ok(()),
            Ok(_) => Err(error(libc::EPERM)),
            Err(other) => Err(other),
        }
    }

    fn attributes(&self, ctx: Context, target: &Target) -> io::Result<Attr> {
        Ok(match target {
            Target::Library(inode) => self.library.getattr(ctx, (*inode).into(), None)?.0,
            Target::Orphaned(file) => self.orphaned.getattr(file)?.0,
            Target::RemovedDirectory(directory) => directory.attributes(),
        })
    }

    fn set_attributes(&self, ctx: Context, target: &Target, attr: SetattrIn, valid: SetattrValid) -> io::Result<()> {
        match target {
            Target::Library(inode) => self.library.setattr(ctx, (*inode).into(), attr, None, valid)?,
            Target::Orphaned(file) => self.orphaned.setattr(file, attr, SetattrBy::Node, valid)?,
            Target::RemovedDirectory(_) => return Err(error(libc::ENODATA)),
        };
        Ok(())
    }
}
