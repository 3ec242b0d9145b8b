//! Nodes that the guest holds.

use super::change::{Change, pair};
use super::index::Entries;
use super::layout::{Geometry, NODE_WORDS};

/// Slot of a node. 0: no node, 1: the root.
pub(crate) type Slot = u32;

/// The root's slot. Its generation is 0, so its id is FUSE_ROOT_ID.
pub(crate) const ROOT: Slot = 1;

const USED: u32 = 1;

/// A node's words.
#[derive(Clone, Copy)]
pub(super) struct Node {
    at: u32,
}

/// Identity of a node on the host: a hint, because inode numbers are reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Inode number.
    pub(crate) ino: u64,
    /// The file system below the share: another one below each mount point.
    pub(crate) domain: u32,
}

impl Identity {
    /// Set in the domains below mount points, and not in those of root directories.
    pub(crate) const BELOW_MOUNT: u32 = 1 << 31;
}

impl Node {
    /// The node in this slot, used or not; none: outside the table.
    pub(super) fn at(geometry: &Geometry, slot: Slot) -> Option<Node> {
        (slot != 0 && slot < geometry.node_capacity).then(|| Node { at: geometry.nodes + slot * NODE_WORDS })
    }

    pub(super) fn generation(self, change: &Change<'_>) -> u32 {
        change.high(self.at)
    }

    pub(super) fn is_used(self, change: &Change<'_>) -> bool {
        change.low(self.at) == USED
    }

    /// Lookups that the guest has not forgotten (`nlookup` of the kernel's FUSE client).
    pub(super) fn refs(self, change: &Change<'_>) -> u64 {
        change.get(self.at + 1)
    }

    pub(super) fn set_refs(self, change: &mut Change<'_>, refs: u64) {
        change.set(self.at + 1, refs);
    }

    /// Names below it.
    pub(super) fn children(self, change: &Change<'_>) -> u32 {
        change.high(self.at + 2)
    }

    pub(super) fn set_children(self, change: &mut Change<'_>, children: u32) {
        change.set_high(self.at + 2, children);
    }

    /// Handles open on it.
    pub(super) fn handles(self, change: &Change<'_>) -> u32 {
        change.low(self.at + 2)
    }

    pub(super) fn set_handles(self, change: &mut Change<'_>, handles: u32) {
        change.set_low(self.at + 2, handles);
    }

    pub(super) fn identity(self, change: &Change<'_>) -> Identity {
        Identity { ino: change.get(self.at + 3), domain: change.high(self.at + 4) }
    }

    pub(super) fn set_identity(self, change: &mut Change<'_>, identity: Identity) {
        change.set(self.at + 3, identity.ino);
        change.set_high(self.at + 4, identity.domain);
    }

    /// First of its names (a cell); 0: none.
    pub(super) fn names(self, change: &Change<'_>) -> u32 {
        change.low(self.at + 4)
    }

    pub(super) fn set_names(self, change: &mut Change<'_>, cell: u32) {
        change.set_low(self.at + 4, cell);
    }

    /// First of the handles open on it; 0: none.
    pub(super) fn first_handle(self, change: &Change<'_>) -> u32 {
        change.low(self.at + 5)
    }

    pub(super) fn set_first_handle(self, change: &mut Change<'_>, slot: u32) {
        change.set_low(self.at + 5, slot);
    }

    /// True if the guest does not hold it, by itself or by a name below it.
    pub(super) fn is_idle(self, change: &Change<'_>) -> bool {
        self.refs(change) == 0 && change.get(self.at + 2) == 0
    }

    /// Begins a node in this slot.
    pub(super) fn begin(self, change: &mut Change<'_>, generation: u32, identity: Identity) {
        change.set(self.at, pair(generation, USED));
        change.set(self.at + 1, 0);
        change.set(self.at + 2, 0);
        change.set(self.at + 3, identity.ino);
        change.set(self.at + 4, pair(identity.domain, 0));
        change.set(self.at + 5, 0);
    }

    /// Ends it. The generation stays, so that its id stays unknown when the slot is used again.
    pub(super) fn end(self, change: &mut Change<'_>) {
        change.set_low(self.at, 0);
    }
}

/// Nodes as entries of the identity index.
pub(super) struct ByIdentity {
    pub(super) geometry: Geometry,
    pub(super) key: u64,
}

impl Entries for ByIdentity {
    fn next_word(&self, slot: u32) -> Option<u32> {
        Node::at(&self.geometry, slot).map(|node| node.at + 5)
    }

    fn hash(&self, change: &Change<'_>, slot: u32) -> u32 {
        Node::at(&self.geometry, slot).map_or(0, |node| hash_identity(self.key, node.identity(change)))
    }
}

/// Hash of an identity. A guest cannot choose inode numbers of the host, so a cheap mix suffices.
pub(super) fn hash_identity(key: u64, identity: Identity) -> u32 {
    let mixed = (identity.ino ^ key ^ (u64::from(identity.domain) << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93).wrapping_shr(32) as u32
}
