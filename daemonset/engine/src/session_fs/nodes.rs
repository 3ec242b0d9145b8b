//! Which library inode, or which orphaned file, each node of the guest is in this engine.
//!
//! A new engine knows none and finds each when the guest first uses it (`resolve`), so taking over costs the same
//! whatever the guest holds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use crate::ledger::{FileHandle, ROOT, Slot};
use crate::orphaned::OrphanedFile;

use super::removed_directory::RemovedDirectory;
use super::stamp::Stamp;

/// The library's inode number of the root, FUSE_ROOT_ID.
pub(super) const LIBRARY_ROOT: u64 = 1;

/// How long after a LOOKUP an OPEN by the same thread belongs to the same path walk. The kernel sends it at once.
pub(super) const SAME_WALK: Duration = Duration::from_millis(50);

/// What serves a node.
#[derive(Clone)]
pub(super) enum Target {
    /// The library, under this inode number.
    Library(u64),
    /// The engine itself: no name leads to the file any more.
    Orphaned(Arc<OrphanedFile>),
    /// The engine itself: the guest removed the directory.
    RemovedDirectory(Arc<RemovedDirectory>),
}

/// A node that has been resolved in this engine.
struct Binding {
    target: Target,
    /// True for a directory; none: not known.
    directory: Option<bool>,
    /// Lookups beyond the first that the library counts; returned to it with the last FORGET.
    extra_lookups: u64,
    /// The kernel file handle, once it has been read. It does not change while the library holds the inode.
    file_handle: Option<Box<FileHandle>>,
    /// Identifies the file, once a name has led to it again.
    stamp: Option<Stamp>,
    /// True if the guest itself unlinked a name of the node, or renamed over one.
    unlinked: bool,
    /// The guest thread that looked the node up last and has not opened it since, and when it did.
    looked_up: Option<(libc::pid_t, Instant)>,
    /// The guest thread whose OPEN was refused last because the file has no link.
    refused: Option<libc::pid_t>,
}

impl Binding {
    fn new(target: Target) -> Self {
        Binding {
            target,
            directory: None,
            extra_lookups: 0,
            file_handle: None,
            stamp: None,
            unlinked: false,
            looked_up: None,
            refused: None,
        }
    }
}

/// The nodes that have been resolved in this engine.
#[derive(Default)]
pub(super) struct NodeBindings {
    by_slot: FxHashMap<Slot, Binding>,
    by_inode: FxHashMap<u64, Slot>,
}

impl NodeBindings {
    /// What serves a node; none: it has not been resolved yet.
    pub(super) fn target(&self, slot: Slot) -> Option<&Target> {
        self.by_slot.get(&slot).map(|binding| &binding.target)
    }

    /// The library's inode number of a node that the library serves.
    pub(super) fn inode_of(&self, slot: Slot) -> Option<u64> {
        match self.target(slot) {
            _ if slot == ROOT => Some(LIBRARY_ROOT),
            Some(Target::Library(inode)) => Some(*inode),
            _ => None,
        }
    }

    /// The node bound to this library inode.
    pub(super) fn slot_of(&self, inode: u64) -> Option<Slot> {
        self.by_inode.get(&inode).copied()
    }

    /// Binds a node to a library inode of this mode, on which the library has counted one lookup for it.
    pub(super) fn bind(&mut self, slot: Slot, inode: u64, mode: u32) {
        let directory = Some(mode & libc::S_IFMT == libc::S_IFDIR);
        self.by_slot.insert(slot, Binding { directory, ..Binding::new(Target::Library(inode)) });
        self.by_inode.entry(inode).or_insert(slot);
    }

    /// Binds a node to an orphaned file.
    pub(super) fn bind_orphan(&mut self, slot: Slot, file: Arc<OrphanedFile>) {
        self.by_slot.insert(slot, Binding::new(Target::Orphaned(file)));
    }

    /// Binds a node to a directory that the guest removed.
    pub(super) fn bind_removed(&mut self, slot: Slot, directory: Arc<RemovedDirectory>) {
        self.by_slot.insert(slot, Binding::new(Target::RemovedDirectory(directory)));
    }

    /// True for a directory; none: not known.
    pub(super) fn is_directory(&self, slot: Slot) -> Option<bool> {
        self.by_slot.get(&slot)?.directory
    }

    /// Drops the binding of a node that has ended. Returns the library inode and the lookups to return to the library.
    pub(super) fn unbind(&mut self, slot: Slot) -> Option<(u64, u64)> {
        let binding = self.by_slot.remove(&slot)?;
        let Target::Library(inode) = binding.target else { return None };
        if self.by_inode.get(&inode) == Some(&slot) {
            self.by_inode.remove(&inode);
        }
        Some((inode, binding.extra_lookups + 1))
    }

    /// The library has counted one more lookup of the node.
    pub(super) fn count_extra_lookup(&mut self, slot: Slot) {
        if let Some(binding) = self.by_slot.get_mut(&slot) {
            binding.extra_lookups += 1;
        }
    }

    /// The kernel file handle of a library inode, if it has been read.
    pub(super) fn file_handle(&self, inode: u64) -> Option<&FileHandle> {
        self.by_slot.get(self.by_inode.get(&inode)?)?.file_handle.as_deref()
    }

    /// Records the kernel file handle of a library inode.
    pub(super) fn set_file_handle(&mut self, inode: u64, file_handle: &FileHandle) {
        let binding = self.by_inode.get(&inode).and_then(|slot| self.by_slot.get_mut(slot));
        if let Some(binding) = binding {
            binding.file_handle = Some(Box::new(file_handle.clone()));
        }
    }

    /// Identifies the file of a node, if that is known.
    pub(super) fn stamp(&self, slot: Slot) -> Option<Stamp> {
        self.by_slot.get(&slot)?.stamp
    }

    /// Records what identifies the file of a node.
    pub(super) fn set_stamp(&mut self, slot: Slot, stamp: Stamp) {
        if let Some(binding) = self.by_slot.get_mut(&slot) {
            binding.stamp = Some(stamp);
        }
    }

    /// Records that the guest itself removed a name of the node.
    pub(super) fn set_unlinked(&mut self, slot: Slot) {
        if let Some(binding) = self.by_slot.get_mut(&slot) {
            binding.unlinked = true;
        }
    }

    /// True if the guest itself removed a name of the node.
    pub(super) fn is_unlinked(&self, slot: Slot) -> bool {
        self.by_slot.get(&slot).is_some_and(|binding| binding.unlinked)
    }

    /// Records that this guest thread looked the node up.
    pub(super) fn set_looked_up(&mut self, slot: Slot, pid: libc::pid_t) {
        if let Some(binding) = self.by_slot.get_mut(&slot) {
            binding.looked_up = Some((pid, Instant::now()));
        }
    }

    /// True if a request by this guest thread belongs to the path walk that looked the node up last, `longest` ago at most.
    pub(super) fn is_same_walk(&mut self, slot: Slot, pid: libc::pid_t, longest: Duration) -> bool {
        let looked_up = self.by_slot.get_mut(&slot).and_then(|binding| binding.looked_up.take());
        looked_up.is_some_and(|(by, at)| by == pid && at.elapsed() < longest)
    }

    /// Records that an OPEN by this guest thread is refused. True if it was the last one to be refused.
    pub(super) fn refuse_once(&mut self, slot: Slot, pid: libc::pid_t) -> bool {
        self.by_slot.get_mut(&slot).is_some_and(|binding| binding.refused.replace(pid) == Some(pid))
    }
}
