//! The ledger: what the guest holds, in memory that outlives the engine.
//!
//! It is a memfd that the broker creates and sends to each engine of a session. An engine that attaches finds, without
//! reading all of it, which node an id means, by which names the node can be reached, what is open, and what the engine
//! before it was doing when it died. Everything read from it is checked: a hostile engine must not gain from it in the
//! next one.
//!
//! Nothing here touches files of the host; [`crate::session_fs`] does.

mod cells;
mod change;
#[cfg(test)]
mod damage;
#[cfg(feature = "die-at-store")]
mod die_at_store;
mod flight;
mod free_list;
mod handles;
#[cfg(test)]
mod harness;
mod index;
mod layout;
#[cfg(test)]
mod layouts;
mod names;
mod nodes;
mod parts;
mod removed;
mod request;
mod root;
mod survey;
#[cfg(test)]
mod tests;
mod words;

use std::io;
use std::os::fd::AsFd;

use virtiofs_contract::engine::{Predecessor, QUEUES};

use cells::Cells;
use change::{Change, apply_redo};
use flight::Flight;
pub(crate) use flight::{PriorState, RequestId, RequestStatus};
use free_list::FreeList;
use handles::Handle;
pub(crate) use handles::{FileHandle, OpenKind};
use layout::{FIRST_BUCKETS, Geometry, MAGIC, VERSION, header};
pub(crate) use names::MAX_NAME;
use names::Name;
pub(crate) use nodes::{Identity, ROOT, Slot};
use nodes::{Node, hash_identity};
pub(crate) use request::CompletionLog;
use words::Words;

/// Slots that are scanned for free ones with each allocation.
const SLOTS_PER_SCAN: u32 = 8;

/// Most names of a node that are dropped in one change.
const NAMES_PER_CHANGE: usize = 8;

/// The ledger has no room, or the guest holds as many nodes as it may.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// An open handle as the ledger knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    /// Its slot.
    pub(crate) slot: u32,
    /// The node it is open on.
    pub(crate) node: Slot,
    /// File or directory.
    pub(crate) kind: OpenKind,
    /// Flags to reopen it with.
    pub(crate) flags: u32,
}

/// A mapped ledger, and what this engine alone knows about it.
pub(crate) struct Ledger {
    words: Words,
    geometry: Geometry,
    key: (u64, u64),
    cells: Cells,
    nodes: FreeList,
    handles: FreeList,
    max_nodes: u64,
    /// Identifies the directory that this engine serves.
    root: u64,
    /// Nodes that have ended since [`Ledger::take_ended`].
    ended: Vec<Slot>,
}

impl Ledger {
    /// Maps a ledger and writes nothing: another engine may still be serving.
    ///
    /// # Errors
    /// If the file is not a ledger, or has a layout that this engine does not read.
    pub(crate) fn map(fd: &impl AsFd, max_nodes: u64) -> io::Result<Self> {
        let words = Words::map(fd)?;
        let geometry = Geometry::of(words.count()).ok_or_else(|| unreadable("too small"))?;
        match (words.get(header::MAGIC), words.get(header::VERSION)) {
            (0, _) | (MAGIC, VERSION) => {}
            (MAGIC, version) => return Err(unreadable(&format!("layout version {version}, expected {VERSION}"))),
            _ => return Err(unreadable("no ledger signature")),
        }
        Ok(Ledger {
            words,
            geometry,
            key: (0, 0),
            cells: Cells::attach(1),
            nodes: FreeList::default(),
            handles: FreeList::default(),
            max_nodes,
            root: 0,
            ended: Vec::new(),
        })
    }

    /// Takes the ledger over from the engine before this one, which has ended, and finishes the change it was making.
    pub(crate) fn take_over(&mut self, predecessor: Predecessor) {
        if self.words.get(header::MAGIC) == 0 {
            self.format();
        }
        apply_redo(&self.words);
        self.key = (self.words.get(header::KEY), self.words.get(header::KEY + 1));
        let high = |at, capacity: u32| (self.words.get(at) as u32).min(capacity);
        self.cells = Cells::attach(high(header::PAGES_HIGH, self.geometry.page_capacity.saturating_add(1)));
        self.nodes = FreeList::with_unscanned(ROOT + 1, high(header::NODES_HIGH, self.geometry.node_capacity));
        self.handles = FreeList::with_unscanned(1, high(header::HANDLES_HIGH, self.geometry.handle_capacity));
        if predecessor != Predecessor::Quiesced {
            for ring in 0..QUEUES {
                let flight = Flight::of(ring);
                if flight.is_started(&self.words) {
                    flight.count_death(&self.words, predecessor == Predecessor::Faulted);
                }
            }
        }
    }

    /// True if `ring` has a request in flight that was begun and not finished.
    pub(crate) fn has_unfinished(&self, ring: usize) -> bool {
        Flight::of(ring).is_started(&self.words)
    }

    fn format(&mut self) {
        // RandomState is seeded by the system; two values make the key of the hash.
        let draw = || std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u64);
        self.words.set(header::VERSION, VERSION);
        self.words.set(header::KEY, draw());
        self.words.set(header::KEY + 1, draw());
        self.clear();
        self.words.set(header::MAGIC, MAGIC);
    }

    /// Drops everything: the guest has mounted again, or has unmounted. Ids given out before stay unknown.
    pub(crate) fn clear(&mut self) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let table = self.geometry;
        for (at, value) in [
            (header::NODES_HIGH, u64::from(ROOT) + 1),
            (header::HANDLES_HIGH, 1),
            (header::PAGES_HIGH, 1),
            (header::NODES, 0),
            (header::HANDLES, 0),
            (header::NAMES, 0),
            (header::NAME_BUCKETS, u64::from(FIRST_BUCKETS)),
            (header::IDENTITY_BUCKETS, u64::from(FIRST_BUCKETS)),
            (header::INIT_REQUEST_LENGTH, 0),
            (header::INIT_REPLY_LENGTH, 0),
        ] {
            change.set(at, value);
        }
        change.add(header::MOUNTS, 1);
        for bucket in 0..FIRST_BUCKETS {
            change.set_half(table.name_buckets, bucket, 0);
            change.set_half(table.identity_buckets, bucket, 0);
        }
        if let Some(root) = Node::at(&table, ROOT) {
            root.begin(&mut change, 0, Identity { ino: self.root, domain: 0 });
        }
        change.commit();
        self.cells = Cells::attach(1);
        self.ended.clear();
        (self.nodes, self.handles) = (FreeList::default(), FreeList::default());
        words.release(table.pages, table.page_capacity * layout::PAGE);
    }

    // --- ids of the guest ---

    /// The guest's id of a node.
    pub(crate) fn id(&self, slot: Slot) -> u64 {
        let change = Change::new(&self.words);
        let generation = Node::at(&self.geometry, slot).map_or(0, |node| node.generation(&change));
        change::pair(generation, slot)
    }

    /// The node of an id; none if this session has not given it out, or the guest has forgotten it.
    pub(crate) fn slot(&self, id: u64) -> Option<Slot> {
        let (generation, slot) = ((id >> 32) as u32, id as u32);
        let change = Change::new(&self.words);
        let node = Node::at(&self.geometry, slot)?;
        let begun = u64::from(slot) < self.words.get(header::NODES_HIGH);
        let held = begun && node.is_used(&change) && (slot == ROOT || !node.is_idle(&change));
        (held && node.generation(&change) == generation).then_some(slot)
    }

    /// The guest's number of a handle.
    pub(crate) fn fh(&self, slot: u32) -> u64 {
        let change = Change::new(&self.words);
        change::pair(Handle::at(&self.geometry, slot).map_or(0, |handle| handle.generation(&change)), slot)
    }

    /// The handle of a guest's number.
    pub(crate) fn opened(&self, fh: u64) -> Option<Opened> {
        let (generation, slot) = ((fh >> 32) as u32, fh as u32);
        let change = Change::new(&self.words);
        let begun = u64::from(slot) < self.words.get(header::HANDLES_HIGH);
        let handle =
            Handle::at(&self.geometry, slot).filter(|handle| begun && handle.generation(&change) == generation)?;
        let kind = handle.kind(&change)?;
        Some(Opened { slot, node: handle.node(&change), kind, flags: handle.flags(&change) })
    }

    /// Which file is open by the handle in `slot`.
    pub(crate) fn file_handle(&self, slot: u32) -> FileHandle {
        let change = Change::new(&self.words);
        Handle::at(&self.geometry, slot).map_or_else(FileHandle::default, |handle| handle.file_handle(&change))
    }

    // --- nodes and names ---

    /// What the node is on the host.
    pub(crate) fn identity(&self, slot: Slot) -> Identity {
        let change = Change::new(&self.words);
        Node::at(&self.geometry, slot).map_or_else(Identity::default, |node| node.identity(&change))
    }

    /// The names of a node: each with the node that it is below.
    pub(crate) fn names(&self, slot: Slot) -> Vec<(Slot, Vec<u8>)> {
        let change = Change::new(&self.words);
        self.name_cells(&change, slot)
            .filter_map(|cell| Name::at(&self.geometry, cell))
            .map(|name| (name.parent(&change), name.bytes(&change, &self.words)))
            .filter(|(_, name)| !removed::is_record(name))
            .collect()
    }

    /// One of the names of a node.
    pub(crate) fn first_name(&self, slot: Slot) -> Option<(Slot, Vec<u8>)> {
        let change = Change::new(&self.words);
        let cells = self.name_cells(&change, slot).filter_map(|cell| Name::at(&self.geometry, cell));
        let mut names = cells.map(|name| (name.parent(&change), name.bytes(&change, &self.words)));
        names.find(|(_, name)| !removed::is_record(name))
    }

    /// The node that a name leads to.
    pub(crate) fn find(&self, parent: Slot, name: &[u8]) -> Option<Slot> {
        let change = Change::new(&self.words);
        let cell = self.find_cell(&change, parent, name)?;
        Name::at(&self.geometry, cell).map(|name| name.node(&change))
    }

    /// The nodes with this identity, each of them a hint.
    pub(crate) fn nodes_with_identity(&self, identity: Identity) -> Vec<Slot> {
        let change = Change::new(&self.words);
        self.by_identity()
            .candidates(&change, hash_identity(self.key.0, identity))
            .filter(|slot| {
                Node::at(&self.geometry, *slot)
                    .is_some_and(|node| node.is_used(&change) && node.identity(&change) == identity)
            })
            .collect()
    }

    // --- lookups ---

    /// Counts a lookup of `slot` by `name` below `parent`, for the request of `ring`. Returns the node that the name led to
    /// before, if that was another one.
    pub(crate) fn add_lookup(
        &mut self,
        ring: usize,
        parent: Slot,
        name: &[u8],
        slot: Slot,
    ) -> Result<Option<Slot>, Full> {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let mut freed = Vec::new();
        let displaced = self.set_name(&mut change, parent, name, slot, &mut freed)?;
        self.count_ref(&mut change, ring, slot);
        self.commit(&change, freed);
        Ok(displaced)
    }

    /// Checks that there is room for a name of this length.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn room_for_name(&mut self, length: usize) -> Result<(), Full> {
        let words = self.words.clone();
        let room = self.cells.has_room(&Change::new(&words), &self.geometry, names::words_for(length));
        room.then_some(()).ok_or(Full)
    }

    /// Checks that there is room for a node.
    ///
    /// # Errors
    /// If there is none, or the guest holds as many as it may.
    pub(crate) fn room_for_node(&mut self) -> Result<(), Full> {
        let words = self.words.clone();
        let room = words.get(header::NODES) < self.max_nodes && self.has_free_node(&Change::new(&words));
        room.then_some(()).ok_or(Full)
    }

    /// Checks that there is room for a handle.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn room_for_handle(&mut self) -> Result<(), Full> {
        let words = self.words.clone();
        self.has_free_handle(&Change::new(&words)).then_some(()).ok_or(Full)
    }

    /// Adds a node that the guest does not hold yet, with one lookup. Returns it, and the node that `name` led to before.
    pub(crate) fn add_node(
        &mut self,
        ring: usize,
        parent: Slot,
        name: &[u8],
        identity: Identity,
    ) -> Result<(Slot, Option<Slot>), Full> {
        if self.words.get(header::NODES) >= self.max_nodes {
            return Err(Full);
        }
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let slot = self.take_node(&mut change).ok_or(Full)?;
        let node = Node::at(&self.geometry, slot).ok_or(Full)?;
        let generation = node.generation(&change).wrapping_add(1).max(1);
        node.begin(&mut change, generation, identity);
        change.add(header::NODES, 1);
        let nodes = change.get(header::NODES);
        self.by_identity().insert(&mut change, slot, nodes);
        let mut freed = Vec::new();
        let displaced = match self.set_name(&mut change, parent, name, slot, &mut freed) {
            Ok(displaced) => displaced,
            Err(full) => {
                // A slot that was never used stays unused: the change that would have begun it is not made.
                if u64::from(slot) < self.words.get(header::NODES_HIGH) {
                    self.nodes.release(slot);
                }
                return Err(full);
            }
        };
        self.count_ref(&mut change, ring, slot);
        self.commit(&change, freed);
        Ok((slot, displaced))
    }

    /// FORGET: drops `count` lookups. `part` is the number (from 1) of this part of the request of `ring`.
    pub(crate) fn forget(&mut self, ring: usize, slot: Slot, count: u64, part: u64) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        Flight::of(ring).set_progress(&mut change, part);
        if let Some(node) = Node::at(&self.geometry, slot).filter(|node| slot != ROOT && node.is_used(&change)) {
            let refs = node.refs(&change);
            node.set_refs(&mut change, refs.saturating_sub(count));
        }
        change.commit();
        self.release_if_idle(slot);
    }

    /// Drops a lookup that the request of `ring` counted itself, for an entry that does not fit into its reply.
    pub(crate) fn undo_lookup(&mut self, ring: usize, slot: Slot) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        self.uncount_ref(&mut change, slot);
        Flight::of(ring).unrecord_ref(&mut change, slot);
        change.commit();
        self.release_if_idle(slot);
    }

    /// Removes `name` below `parent`. Returns the node that it led to.
    pub(crate) fn remove(&mut self, parent: Slot, name: &[u8]) -> Option<Slot> {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let cell = self.find_cell(&change, parent, name)?;
        let node = Name::at(&self.geometry, cell).map_or(0, |name| name.node(&change));
        let mut freed = Vec::new();
        self.drop_name(&mut change, cell, &mut freed);
        self.commit(&change, freed);
        self.release_if_idle(node);
        self.release_if_idle(parent);
        Some(node)
    }

    /// Moves the first name to the second; with `exchange`, also the second to the first.
    pub(crate) fn rename(&mut self, from: (Slot, &[u8]), to: (Slot, &[u8]), exchange: bool) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let mut freed = Vec::new();
        let (moved, replaced) = (self.find(from.0, from.1), self.find(to.0, to.1));
        if moved.is_some() && moved == replaced {
            // Two names of one file: rename(2) leaves both.
            return;
        }
        for (parent, name) in [from, to] {
            if let Some(cell) = self.find_cell(&change, parent, name) {
                self.drop_name(&mut change, cell, &mut freed);
            }
        }
        // A name for which there is no room is found again by the guest's next lookup.
        if let Some(moved) = moved {
            let _ = self.set_name(&mut change, to.0, to.1, moved, &mut freed);
        }
        if let (true, Some(replaced)) = (exchange, replaced) {
            let _ = self.set_name(&mut change, from.0, from.1, replaced, &mut freed);
        }
        self.commit(&change, freed);
        self.release_if_idle(replaced.unwrap_or(0));
        self.release_if_idle(from.0);
    }

    // --- open handles ---

    /// Adds a handle on `node`, opened by the request of `ring`. Returns the guest's number for it.
    pub(crate) fn open(
        &mut self,
        ring: usize,
        node: Slot,
        kind: OpenKind,
        flags: u32,
        file_handle: &FileHandle,
    ) -> Result<u64, Full> {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let slot = self.take_handle(&mut change).ok_or(Full)?;
        let (handle, open) = Handle::at(&self.geometry, slot).zip(Node::at(&self.geometry, node)).ok_or(Full)?;
        handle.begin(&mut change, kind, node, flags, file_handle);
        self.chain_handle(&mut change, open, slot);
        change.add(header::HANDLES, 1);
        Flight::of(ring).record_handle(&mut change, slot);
        let fh = change::pair(handle.generation(&change), slot);
        change.commit();
        Ok(fh)
    }

    /// The guest has closed the handle in `slot`.
    pub(crate) fn close(&mut self, ring: usize, slot: u32) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        Flight::of(ring).set_progress(&mut change, 1);
        let node = self.end_handle(&mut change, slot);
        change.commit();
        self.handles.release(slot);
        self.release_if_idle(node);
    }

    fn end_handle(&self, change: &mut Change<'_>, slot: u32) -> Slot {
        let Some(handle) = Handle::at(&self.geometry, slot).filter(|handle| handle.kind(change).is_some()) else {
            return 0;
        };
        let node = handle.node(change);
        handle.end(change);
        change.subtract(header::HANDLES, 1);
        if let Some(open) = Node::at(&self.geometry, node) {
            self.unchain_handle(change, open, handle);
        }
        node
    }

    /// The handles that are open on a node, the latest first.
    pub(crate) fn handles_of(&self, node: Slot) -> Vec<Opened> {
        let change = Change::new(&self.words);
        let Some(open) = Node::at(&self.geometry, node) else { return Vec::new() };
        let first = Some(open.first_handle(&change));
        // At most as many as are counted: a damaged chain may have no end.
        std::iter::successors(first, |slot| Handle::at(&self.geometry, *slot).map(|handle| handle.next(&change)))
            .take(open.handles(&change).min(self.geometry.handle_capacity) as usize)
            .map_while(|slot| self.opened(self.fh(slot)).filter(|opened| opened.node == node))
            .collect()
    }
}

fn unreadable(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("ledger: {why}"))
}
