//! Directories that the guest removed and still uses, as a working directory for instance.
//!
//! Such a directory has no entries and never gets any, so nothing of it is needed but its attributes. The host's directory
//! is gone: a file handle does not open it any more, and an `O_PATH` descriptor keeps it for one engine only. So its last
//! attributes are recorded in the ledger before it is removed, and every engine serves it from them.
//!
//! Names below it are `ENOENT`, as on a local file system. Extended attributes are gone.
//!
//! A directory that others removed is `ESTALE`: another one may be at its path, and the guest's kernel finds it upon that.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use virtiofsd::filesystem::{FileSystem, SetattrValid};
use virtiofsd::fuse::{Attr, Opcode, SetattrIn};
use vm_memory::ByteValued;

use crate::ledger::Slot;

use super::SessionFs;
use super::errors::{engine_context, error};
use super::nodes::Target;
use super::request::RequestContext;
use super::state::State;

/// A removed directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct RemovedDirectory(Attr);

impl RemovedDirectory {
    /// `last`: its attributes, which another engine may have recorded.
    fn new(last: Attr) -> Self {
        let mode = libc::S_IFDIR | last.mode & 0o7777;
        RemovedDirectory(Attr { mode, nlink: 0, rdev: 0, flags: 0, ..last })
    }

    fn from_record(record: &[u8]) -> Option<Self> {
        let mut last = Attr::default();
        (record.len() == size_of::<Attr>()).then(|| {
            last.as_mut_slice().copy_from_slice(record);
            RemovedDirectory::new(last)
        })
    }

    pub(super) fn attributes(&self) -> Attr {
        self.0
    }

    /// SETATTR.
    fn change(&mut self, to: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
        if valid.contains(SetattrValid::SIZE) {
            return Err(error(libc::EISDIR));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = |is_now, given, seconds, nanoseconds| match valid {
            valid if valid.contains(is_now) => Some((now.as_secs(), now.subsec_nanos())),
            valid if valid.contains(given) => Some((seconds, nanoseconds)),
            _ => None,
        };
        let attr = &mut self.0;
        if valid.contains(SetattrValid::MODE) {
            attr.mode = libc::S_IFDIR | to.mode & 0o7777;
        }
        if valid.contains(SetattrValid::UID) {
            attr.uid = to.uid;
        }
        if valid.contains(SetattrValid::GID) {
            attr.gid = to.gid;
        }
        if let Some(atime) = time(SetattrValid::ATIME_NOW, SetattrValid::ATIME, to.atime, to.atimensec) {
            (attr.atime, attr.atimensec) = atime;
        }
        if let Some(mtime) = time(SetattrValid::MTIME_NOW, SetattrValid::MTIME, to.mtime, to.mtimensec) {
            (attr.mtime, attr.mtimensec) = mtime;
        }
        (attr.ctime, attr.ctimensec) = (now.as_secs(), now.subsec_nanos());
        Ok(())
    }
}

impl<F: FileSystem> SessionFs<F> {
    /// Records the attributes of a directory that the guest is about to remove, by RMDIR or by a RENAME over it. Returns it if
    /// it is recorded: [`SessionFs::directory_removed`] or [`SessionFs::directory_remains`] must follow.
    pub(super) fn record_directory(
        &self,
        state: &mut State,
        request: RequestContext,
        victim: Option<Slot>,
    ) -> Option<Slot> {
        let victim = victim.filter(|victim| may_be_directory(state, request, *victim))?;
        if let Ok(Target::Library(inode)) = self.target(state, request, victim)
            && let Ok((attr, _)) = self.library.getattr(engine_context(), inode.into(), None)
            && attr.mode & libc::S_IFMT == libc::S_IFDIR
        {
            state.ledger.record_removed(victim, attr.as_slice());
        }
        // The first run of a repeated request may have recorded and removed it.
        state.ledger.removed(victim).map(|_| victim)
    }

    /// The name has been removed, and with it the directory: the engine itself serves it from now on. If another process had
    /// moved the directory and the name led to another one, it remains.
    pub(super) fn directory_removed(&self, state: &mut State, victim: Option<Slot>) {
        let Some(victim) = victim else { return };
        let inode = state.nodes.inode_of(victim);
        let found = inode.map(|inode| self.library.getattr(engine_context(), inode.into(), None));
        if found.is_some_and(|found| found.is_ok_and(|(attr, _)| attr.nlink > 0)) {
            return self.directory_remains(state, Some(victim));
        }
        let Some(directory) = recorded(state, victim) else { return };
        if let Some((inode, lookups)) = state.nodes.unbind(victim) {
            self.library.forget(engine_context(), inode.into(), lookups);
        }
        state.nodes.bind_removed(victim, directory);
    }

    /// The directory could not be removed.
    pub(super) fn directory_remains(&self, state: &mut State, victim: Option<Slot>) {
        if let Some(victim) = victim {
            state.ledger.forget_removed(victim);
        }
    }

    /// A directory that this engine or an earlier one removed for the guest.
    pub(super) fn take_removed_directory(&self, state: &mut State, slot: Slot) -> Option<Target> {
        let directory = recorded(state, slot)?;
        state.nodes.bind_removed(slot, directory.clone());
        Some(Target::RemovedDirectory(directory))
    }

    /// SETATTR of a removed directory.
    pub(super) fn set_removed_directory(
        &self,
        state: &mut State,
        slot: Slot,
        directory: &RemovedDirectory,
        (to, valid): (&SetattrIn, SetattrValid),
    ) -> io::Result<(Attr, Duration)> {
        let mut directory = *directory;
        directory.change(to, valid)?;
        state.ledger.record_removed(slot, directory.0.as_slice());
        state.nodes.bind_removed(slot, Arc::new(directory));
        Ok((directory.0, self.orphaned.attr_timeout()))
    }
}

/// True if the node may be a directory. RENAME replaces files far more often, and those cost nothing here.
fn may_be_directory(state: &State, request: RequestContext, node: Slot) -> bool {
    request.opcode == Opcode::Rmdir as u32
        || request.opcode != Opcode::Unlink as u32 && state.nodes.is_directory(node) != Some(false)
}

fn recorded(state: &State, slot: Slot) -> Option<Arc<RemovedDirectory>> {
    RemovedDirectory::from_record(&state.ledger.removed(slot)?).map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_another_engine_is_a_directory_without_links() {
        let recorded = Attr { mode: libc::S_IFREG | 0o4755, nlink: 3, flags: 1, ..Attr::default() };
        let read = RemovedDirectory::from_record(recorded.as_slice()).unwrap().attributes();
        assert_eq!((read.mode, read.nlink, read.flags), (libc::S_IFDIR | 0o4755, 0, 0));
        assert!(RemovedDirectory::from_record(&recorded.as_slice()[1..]).is_none());
    }

    #[test]
    fn attributes_change_as_asked() {
        let mut directory = RemovedDirectory::new(Attr { mode: 0o755, mtime: 5, ..Attr::default() });
        let to = SetattrIn { mode: 0o40700, atime: 7, ..SetattrIn::default() };
        directory.change(&to, SetattrValid::MODE | SetattrValid::ATIME).unwrap();
        let Attr { mode, atime, mtime, .. } = directory.attributes();
        assert_eq!((mode, atime, mtime), (libc::S_IFDIR | 0o700, 7, 5));
        let size = directory.change(&to, SetattrValid::SIZE).unwrap_err();
        assert_eq!(size.raw_os_error(), Some(libc::EISDIR));
    }
}
