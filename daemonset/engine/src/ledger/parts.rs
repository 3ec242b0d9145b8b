//! The parts of changes: names, lookup counts, ends of nodes, free slots.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;
use smallvec::SmallVec;

use super::change::Change;
use super::flight::Flight;
use super::free_list::{has_unused, next_unused};
use super::handles::Handle;
use super::index::Index;
use super::layout::header;
use super::names::{self, ByName, Name};
use super::nodes::{ByIdentity, Node, ROOT, Slot};
use super::{Full, Ledger, NAMES_PER_CHANGE, SLOTS_PER_SCAN};

/// Nodes that may have become idle.
pub(super) type Candidates = SmallVec<[Slot; NAMES_PER_CHANGE]>;

impl Ledger {
    pub(super) fn commit(&mut self, change: &Change<'_>, freed: Vec<u32>) {
        change.commit();
        for cell in freed {
            self.cells.release(&self.words, &self.geometry, cell);
        }
    }

    pub(super) fn count_ref(&self, change: &mut Change<'_>, ring: usize, slot: Slot) {
        if slot == ROOT {
            return;
        }
        if let Some(node) = Node::at(&self.geometry, slot) {
            let refs = node.refs(change);
            node.set_refs(change, refs.saturating_add(1));
            Flight::of(ring).record_ref(change, slot);
        }
    }

    pub(super) fn uncount_ref(&self, change: &mut Change<'_>, slot: Slot) {
        if let Some(node) = Node::at(&self.geometry, slot).filter(|node| slot != ROOT && node.is_used(change)) {
            let refs = node.refs(change);
            node.set_refs(change, refs.saturating_sub(1));
        }
    }

    /// Makes `name` lead to `slot`. Returns the node that it led to before, if that was another one.
    pub(super) fn set_name(
        &mut self,
        change: &mut Change<'_>,
        parent: Slot,
        name: &[u8],
        slot: Slot,
        freed: &mut Vec<u32>,
    ) -> Result<Option<Slot>, Full> {
        let mut displaced = None;
        let hash = self.hash_name(parent, name);
        if let Some(cell) = self.find_hashed(change, hash, (parent, name)) {
            displaced = Name::at(&self.geometry, cell).map(|known| known.node(change));
            if displaced == Some(slot) {
                return Ok(None);
            }
            self.drop_name(change, cell, freed);
        }
        let (node, above) = Node::at(&self.geometry, slot).zip(Node::at(&self.geometry, parent)).ok_or(Full)?;
        let cell = self.cells.take(change, &self.geometry, names::words_for(name.len())).ok_or(Full)?;
        let record = Name::at(&self.geometry, cell).ok_or(Full)?;
        record.write_bytes(&self.words, name);
        record.begin(change, parent, slot, hash, name.len());
        let others = node.names(change);
        record.set_next_of_node(change, others);
        node.set_names(change, cell);
        let children = above.children(change);
        above.set_children(change, children.saturating_add(1));
        change.add(header::NAMES, 1);
        let count = change.get(header::NAMES);
        self.by_name().insert(change, cell, count);
        Ok(displaced)
    }

    pub(super) fn drop_name(&self, change: &mut Change<'_>, cell: u32, freed: &mut Vec<u32>) {
        let Some(name) = Name::at(&self.geometry, cell) else { return };
        let (parent, slot) = (name.parent(change), name.node(change));
        self.by_name().remove(change, cell);
        self.take_from_node(change, slot, cell);
        if let Some(above) = Node::at(&self.geometry, parent) {
            let children = above.children(change);
            above.set_children(change, children.saturating_sub(1));
        }
        change.subtract(header::NAMES, 1);
        freed.push(cell);
        name.end(change);
    }

    pub(super) fn take_from_node(&self, change: &mut Change<'_>, slot: Slot, cell: u32) {
        let Some(node) = Node::at(&self.geometry, slot) else { return };
        let Some(name) = Name::at(&self.geometry, cell) else { return };
        let next = name.next_of_node(change);
        if node.names(change) == cell {
            return node.set_names(change, next);
        }
        let is_before =
            |known: &u32| Name::at(&self.geometry, *known).is_some_and(|known| known.next_of_node(change) == cell);
        let before = self.name_cells(change, slot).find(is_before);
        if let Some(before) = before.and_then(|before| Name::at(&self.geometry, before)) {
            before.set_next_of_node(change, next);
        }
    }

    /// Adds a handle at the head of its node's chain.
    pub(super) fn chain_handle(&self, change: &mut Change<'_>, node: Node, slot: u32) {
        let (count, next) = (node.handles(change), node.first_handle(change));
        node.set_handles(change, count.saturating_add(1));
        node.set_first_handle(change, slot);
        if let Some(handle) = Handle::at(&self.geometry, slot) {
            handle.set_next(change, next);
        }
        if let Some(next) = Handle::at(&self.geometry, next) {
            next.set_previous(change, slot);
        }
    }

    /// Removes a handle from its node's chain.
    pub(super) fn unchain_handle(&self, change: &mut Change<'_>, node: Node, handle: Handle) {
        let count = node.handles(change);
        node.set_handles(change, count.saturating_sub(1));
        let (previous, next) = (handle.previous(change), handle.next(change));
        match Handle::at(&self.geometry, previous) {
            Some(previous) => previous.set_next(change, next),
            None => node.set_first_handle(change, next),
        }
        if let Some(next) = Handle::at(&self.geometry, next) {
            next.set_previous(change, previous);
        }
    }

    /// The cells of a node's names, bounded against damaged lists.
    pub(super) fn name_cells<'c>(&'c self, change: &'c Change<'_>, slot: Slot) -> impl Iterator<Item = u32> + 'c {
        const MAX_LINKS: usize = 65536;
        let first = Node::at(&self.geometry, slot).map(|node| node.names(change));
        std::iter::successors(first, |cell| Name::at(&self.geometry, *cell).map(|name| name.next_of_node(change)))
            .take_while(move |cell| Name::at(&self.geometry, *cell).is_some_and(|name| name.node(change) == slot))
            .take(MAX_LINKS)
    }

    /// The cell of a name below a directory.
    pub(super) fn find_cell(&self, change: &Change<'_>, parent: Slot, name: &[u8]) -> Option<u32> {
        self.find_hashed(change, self.hash_name(parent, name), (parent, name))
    }

    /// The same, for a name with this hash.
    fn find_hashed(&self, change: &Change<'_>, hash: u32, (parent, name): (Slot, &[u8])) -> Option<u32> {
        self.by_name().candidates(change, hash).find(|cell| {
            Name::at(&self.geometry, *cell).is_some_and(|known| known.is(change, &self.words, hash, (parent, name)))
        })
    }

    pub(super) fn hash_name(&self, parent: Slot, name: &[u8]) -> u32 {
        let mut hasher = SipHasher13::new_with_keys(self.key.0, self.key.1);
        hasher.write_u32(parent);
        hasher.write(name);
        hasher.finish() as u32
    }

    pub(super) fn by_name(&self) -> Index<ByName> {
        Index {
            buckets: self.geometry.name_buckets,
            in_use: header::NAME_BUCKETS,
            capacity: self.geometry.node_capacity,
            entries: ByName { geometry: self.geometry },
        }
    }

    pub(super) fn by_identity(&self) -> Index<ByIdentity> {
        Index {
            buckets: self.geometry.identity_buckets,
            in_use: header::IDENTITY_BUCKETS,
            capacity: self.geometry.node_capacity,
            entries: ByIdentity { geometry: self.geometry, key: self.key.0 },
        }
    }

    /// Ends a node that the guest does not hold any more, and the nodes above it that only it kept.
    pub(super) fn release_if_idle(&mut self, slot: Slot) {
        let mut candidates = Candidates::from_slice(&[slot]);
        while let Some(slot) = candidates.pop() {
            while self.release_step(slot, &mut candidates) {}
        }
    }

    /// The nodes that have ended since the last call. Their slots may hold other nodes by now.
    pub(crate) fn take_ended(&mut self) -> Vec<Slot> {
        std::mem::take(&mut self.ended)
    }

    /// Drops some of an idle node's names, and with the last of them the node. True if names are left.
    pub(super) fn release_step(&mut self, slot: Slot, candidates: &mut Candidates) -> bool {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let Some(node) = Node::at(&self.geometry, slot) else { return false };
        if slot == ROOT || !node.is_used(&change) || !node.is_idle(&change) {
            return false;
        }
        // No more than are dropped, and one to know whether any is left: a file may have thousands of names.
        let cells: SmallVec<[u32; NAMES_PER_CHANGE + 1]> =
            self.name_cells(&change, slot).take(NAMES_PER_CHANGE + 1).collect();
        let mut freed = Vec::new();
        for cell in cells.iter().take(NAMES_PER_CHANGE) {
            candidates.extend(Name::at(&self.geometry, *cell).map(|name| name.parent(&change)));
            self.drop_name(&mut change, *cell, &mut freed);
        }
        let last = cells.len() <= NAMES_PER_CHANGE;
        if last {
            self.by_identity().remove(&mut change, slot);
            node.end(&mut change);
            change.subtract(header::NODES, 1);
        }
        self.commit(&change, freed);
        if last {
            self.nodes.release(slot);
            self.ended.push(slot);
        }
        !last
    }

    pub(super) fn take_node(&mut self, change: &mut Change<'_>) -> Option<Slot> {
        self.has_free_node(change);
        self.nodes.free.pop().or_else(|| next_unused(change, header::NODES_HIGH, self.geometry.node_capacity))
    }

    pub(super) fn take_handle(&mut self, change: &mut Change<'_>) -> Option<u32> {
        self.has_free_handle(change);
        self.handles.free.pop().or_else(|| next_unused(change, header::HANDLES_HIGH, self.geometry.handle_capacity))
    }

    /// True if there is a free slot. Scans a few slots that earlier engines used; all of them before it returns false.
    pub(super) fn has_free_node(&mut self, change: &Change<'_>) -> bool {
        let unused = has_unused(change, header::NODES_HIGH, self.geometry.node_capacity);
        loop {
            self.scan_nodes();
            if unused || !self.nodes.free.is_empty() || !self.nodes.has_unscanned() {
                return unused || !self.nodes.free.is_empty();
            }
        }
    }

    /// The same of handles.
    pub(super) fn has_free_handle(&mut self, change: &Change<'_>) -> bool {
        let unused = has_unused(change, header::HANDLES_HIGH, self.geometry.handle_capacity);
        loop {
            self.scan_handles(change);
            if unused || !self.handles.free.is_empty() || !self.handles.has_unscanned() {
                return unused || !self.handles.free.is_empty();
            }
        }
    }

    /// Looks at the next few slots that earlier engines used: a free one can be used again, and an idle one was
    /// about to be ended when its engine died.
    pub(super) fn scan_nodes(&mut self) {
        for _ in 0..SLOTS_PER_SCAN {
            let Some(slot) = self.nodes.next_unscanned() else { return };
            let change = Change::new(&self.words);
            match Node::at(&self.geometry, slot) {
                Some(node) if !node.is_used(&change) => self.nodes.release(slot),
                Some(node) if node.is_idle(&change) => self.release_if_idle(slot),
                _ => {}
            }
        }
    }

    pub(super) fn scan_handles(&mut self, change: &Change<'_>) {
        for _ in 0..SLOTS_PER_SCAN {
            let Some(slot) = self.handles.next_unscanned() else { return };
            if Handle::at(&self.geometry, slot).is_some_and(|handle| handle.kind(change).is_none()) {
                self.handles.release(slot);
            }
        }
    }
}
