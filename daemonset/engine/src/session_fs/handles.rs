//! Which open file each handle of the guest is in this engine.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::orphaned::OrphanedFile;

/// What serves an open handle.
#[derive(Clone)]
pub(super) enum OpenFile {
    /// The library, by its handle and the inode that it was opened on.
    Library { inode: u64, handle: u64 },
    /// The engine itself.
    Orphaned(Arc<OrphanedFile>),
}

/// The handles that have been used in this engine, by their slots in the ledger. A new engine has none and reopens each
/// when the guest first uses it.
#[derive(Default)]
pub(super) struct OpenHandles {
    by_slot: FxHashMap<u32, OpenFile>,
}

impl OpenHandles {
    /// What serves a handle; none: it has not been used in this engine.
    pub(super) fn get(&self, slot: u32) -> Option<OpenFile> {
        self.by_slot.get(&slot).cloned()
    }

    /// The slots of all handles that have been used in this engine.
    pub(super) fn slots(&self) -> Vec<u32> {
        self.by_slot.keys().copied().collect()
    }

    /// Records what serves a handle.
    pub(super) fn insert(&mut self, slot: u32, file: OpenFile) {
        self.by_slot.insert(slot, file);
    }

    /// Drops a handle that the guest has closed.
    pub(super) fn remove(&mut self, slot: u32) -> Option<OpenFile> {
        self.by_slot.remove(&slot)
    }
}
