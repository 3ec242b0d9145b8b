//! What this engine knows and the ledger does not: how the library numbers what the guest holds.

use std::sync::Arc;

use rustc_hash::FxHashMap;
use virtiofs_contract::engine::QUEUES;

use crate::adopted::AdoptedFile;
use crate::ledger::{FileHandle, Ledger, ROOT, Slot};

use super::audit::ToCheck;
use super::parking::Parking;

/// The library's number of the root, FUSE_ROOT_ID.
pub(super) const LIBRARY_ROOT: u64 = 1;

/// Where a node is served from.
#[derive(Clone)]
pub(super) enum Target {
    /// By the library, under this number.
    Library(u64),
    /// By ourselves: no name leads to the file any more.
    Adopted(Arc<AdoptedFile>),
}

/// What an open handle of the guest is in this engine.
#[derive(Clone)]
pub(super) enum Live {
    /// The library's handle, and the inode it was opened on.
    Library { inode: u64, handle: u64 },
    /// A file of our own.
    Adopted(Arc<AdoptedFile>),
}

/// A node that has been resolved.
struct Bound {
    target: Target,
    /// References beyond the first that the library counts for it; given back with the last forget.
    extra: u64,
    /// Its kernel file handle, once it has been asked for: as long as the library holds the inode it is the same.
    file_handle: Option<FileHandle>,
    /// True if the guest has unlinked a name of it, or renamed over one.
    unlinked: bool,
    /// The guest's process whose OPEN was refused last because the file has no link.
    refused: Option<libc::pid_t>,
}

impl Bound {
    fn new(target: Target) -> Self {
        Bound { target, extra: 0, file_handle: None, unlinked: false, refused: None }
    }
}

/// Nodes and handles that have been resolved in this engine. A new engine has none and resolves each on its
/// first use, so taking over costs the same whatever the guest holds.
#[derive(Default)]
pub(super) struct Bindings {
    nodes: FxHashMap<Slot, Bound>,
    by_inode: FxHashMap<u64, Slot>,
    live: FxHashMap<u32, Live>,
}

impl Bindings {
    pub(super) fn target(&self, slot: Slot) -> Option<&Target> {
        self.nodes.get(&slot).map(|bound| &bound.target)
    }

    /// The library's number of a node that it serves.
    pub(super) fn inode_of(&self, slot: Slot) -> Option<u64> {
        match self.target(slot) {
            _ if slot == ROOT => Some(LIBRARY_ROOT),
            Some(Target::Library(inode)) => Some(*inode),
            _ => None,
        }
    }

    /// The node that the library knows by this number.
    pub(super) fn slot_of(&self, inode: u64) -> Option<Slot> {
        self.by_inode.get(&inode).copied()
    }

    /// The node is the library's inode; one reference comes with it.
    pub(super) fn bind(&mut self, slot: Slot, inode: u64) {
        self.nodes.insert(slot, Bound::new(Target::Library(inode)));
        self.by_inode.entry(inode).or_insert(slot);
    }

    /// The node is a file of our own.
    pub(super) fn adopt(&mut self, slot: Slot, file: Arc<AdoptedFile>) {
        self.nodes.insert(slot, Bound::new(Target::Adopted(file)));
    }

    /// The kernel file handle of the library's inode, if it has been asked for.
    pub(super) fn file_handle(&self, inode: u64) -> Option<&FileHandle> {
        self.nodes.get(self.by_inode.get(&inode)?)?.file_handle.as_ref()
    }

    pub(super) fn set_file_handle(&mut self, inode: u64, file_handle: &FileHandle) {
        let bound = self.by_inode.get(&inode).and_then(|slot| self.nodes.get_mut(slot));
        if let Some(bound) = bound {
            bound.file_handle = Some(file_handle.clone());
        }
    }

    /// The library has counted one more reference to it.
    pub(super) fn count_extra(&mut self, slot: Slot) {
        if let Some(bound) = self.nodes.get_mut(&slot) {
            bound.extra += 1;
        }
    }

    /// Records that the guest itself removed a name of the node.
    pub(super) fn set_unlinked(&mut self, slot: Slot) {
        if let Some(bound) = self.nodes.get_mut(&slot) {
            bound.unlinked = true;
        }
    }

    /// True if the guest itself removed a name of the node.
    pub(super) fn is_unlinked(&self, slot: Slot) -> bool {
        self.nodes.get(&slot).is_some_and(|bound| bound.unlinked)
    }

    /// Records that an OPEN by this process of the guest is refused. True if that process was the last to be refused.
    pub(super) fn refuse_once(&mut self, slot: Slot, pid: libc::pid_t) -> bool {
        self.nodes.get_mut(&slot).is_some_and(|bound| bound.refused.replace(pid) == Some(pid))
    }

    /// The node is no more. Returns the inode and the references to give back to the library.
    pub(super) fn unbind(&mut self, slot: Slot) -> Option<(u64, u64)> {
        let bound = self.nodes.remove(&slot)?;
        let Target::Library(inode) = bound.target else { return None };
        if self.by_inode.get(&inode) == Some(&slot) {
            self.by_inode.remove(&inode);
        }
        Some((inode, bound.extra + 1))
    }

    pub(super) fn live(&self, handle: u32) -> Option<Live> {
        self.live.get(&handle).cloned()
    }

    /// The handles that have been used in this engine.
    pub(super) fn open(&self) -> Vec<u32> {
        self.live.keys().copied().collect()
    }

    pub(super) fn set_live(&mut self, handle: u32, live: Live) {
        self.live.insert(handle, live);
    }

    pub(super) fn drop_live(&mut self, handle: u32) -> Option<Live> {
        self.live.remove(&handle)
    }
}

/// The request that is being served.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Current {
    pub(super) opcode: u32,
    /// Did an engine that died begin it?
    pub(super) again: bool,
}

/// Everything behind the layer's lock.
pub(crate) struct State {
    pub(super) ledger: Ledger,
    pub(super) bindings: Bindings,
    pub(super) parking: Parking,
    pub(super) current: Current,
    /// Is the file system being told what the guest agreed on with an earlier engine?
    pub(super) replaying_init: bool,
    /// Raised with each change of names by the guest itself: what was seen before it says nothing after it.
    pub(super) changes: u64,
    /// Rings whose request at hand a dead engine had begun: until it has been done again, what the ledger says of a
    /// name and what is there may differ by the guest's own doing.
    pub(super) unsettled: [bool; QUEUES],
    /// Is the ledger another engine's, or about to be?
    pub(super) resting: bool,
    /// Does this engine serve another directory than the one before?
    pub(super) root_changed: bool,
    /// Nodes opened by a name that the guest had in its cache.
    pub(super) to_check: ToCheck,
}
