//! The ledger: what the guest has been told and still holds, in memory that outlives the engine.
//!
//! It lies in a file that the broker makes and hands to each engine of a session. Whoever attaches finds, without
//! reading it all, which node an id means, by which names it can be reached, what is open, and what the last
//! engine was doing when it died. Everything read from it is checked: a hostile engine must not gain from it in
//! the next one.
//!
//! Nothing here touches the host's files; [`crate::tracked`] does.

mod cells;
mod change;
#[cfg(feature = "die-at-store")]
mod die_at_store;
mod flight;
mod free_list;
mod handles;
#[cfg(test)]
mod harness;
mod index;
mod layout;
mod names;
mod nodes;
mod parts;
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
use change::{Change, carry_out};
use flight::Flight;
pub(crate) use flight::{Before, Course, Ticket};
use free_list::FreeList;
use handles::Handle;
pub(crate) use handles::{FileHandle, OpenKind};
use layout::{FIRST_BUCKETS, Geometry, MAGIC, VERSION, header};
use names::Name;
pub(crate) use nodes::{Identity, ROOT, Slot};
use nodes::{Node, hash_identity};
pub(crate) use request::Log;
use words::Words;

/// How many slots of the tables are looked at per allocation, in search of free ones.
const LOOKS: u32 = 8;

/// How many names of a node are dropped in one change.
const NAMES_PER_CHANGE: usize = 8;

/// The ledger is full, or holds as many nodes as the guest may have.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// An open handle as the ledger knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Opened {
    /// Its slot.
    pub(crate) slot: u32,
    /// The node it is open on.
    pub(crate) node: Slot,
    /// File or directory.
    pub(crate) kind: OpenKind,
    /// Flags to open it with again.
    pub(crate) flags: u32,
    /// Which file it is.
    pub(crate) file_handle: FileHandle,
}

/// A mapped ledger, and what its present engine alone knows of it.
pub(crate) struct Ledger {
    words: Words,
    geometry: Geometry,
    key: (u64, u64),
    cells: Cells,
    nodes: FreeList,
    handles: FreeList,
    ring: usize,
    max_nodes: u64,
    /// Which directory this engine serves.
    root: u64,
    /// Nodes that have ended since they were last asked for.
    ended: Vec<Slot>,
}

impl Ledger {
    /// Maps a ledger and writes nothing: its present engine may still be serving.
    ///
    /// # Errors
    /// A file that is no ledger, or one of a layout that this engine does not read.
    pub(crate) fn map(fd: &impl AsFd, max_nodes: u64) -> io::Result<Self> {
        let words = Words::map(fd)?;
        let geometry = Geometry::of(words.count()).ok_or_else(|| unreadable("it is too small"))?;
        match (words.get(header::MAGIC), words.get(header::VERSION)) {
            (0, _) | (MAGIC, VERSION) => {}
            (MAGIC, version) => return Err(unreadable(&format!("its layout is {version}, not {VERSION}"))),
            _ => return Err(unreadable("it is something else")),
        }
        Ok(Ledger {
            words,
            geometry,
            key: (0, 0),
            cells: Cells::attach(1),
            nodes: FreeList::default(),
            handles: FreeList::default(),
            ring: 0,
            max_nodes,
            root: 0,
            ended: Vec::new(),
        })
    }

    /// Takes the ledger over: the engine before this one has come to its end. Finishes the change it was making.
    pub(crate) fn take_over(&mut self, predecessor: Predecessor) {
        if self.words.get(header::MAGIC) == 0 {
            self.format();
        }
        carry_out(&self.words);
        self.key = (self.words.get(header::KEY), self.words.get(header::KEY + 1));
        let high = |at, capacity: u32| (self.words.get(at) as u32).min(capacity);
        self.cells = Cells::attach(high(header::PAGES_HIGH, self.geometry.page_capacity.saturating_add(1)));
        self.nodes = FreeList::behind(ROOT + 1, high(header::NODES_HIGH, self.geometry.node_capacity));
        self.handles = FreeList::behind(1, high(header::HANDLES_HIGH, self.geometry.handle_capacity));
        if predecessor != Predecessor::Quiesced {
            for ring in 0..QUEUES {
                let flight = Flight::of(ring);
                if flight.is_started(&self.words) {
                    flight.count_death(&self.words, predecessor == Predecessor::Faulted);
                }
            }
        }
    }

    /// Has `ring` a request that was begun and not finished?
    pub(crate) fn has_begun(&self, ring: usize) -> bool {
        Flight::of(ring).is_started(&self.words)
    }

    fn format(&mut self) {
        // RandomState is seeded by the system; two draws make the key of the hash.
        let draw = || std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u64);
        self.words.set(header::VERSION, VERSION);
        self.words.set(header::KEY, draw());
        self.words.set(header::KEY + 1, draw());
        self.clear();
        self.words.set(header::MAGIC, MAGIC);
    }

    /// Forgets everything: the guest has mounted anew, or has unmounted. Ids given out before stay unknown.
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
        words.give_back(table.pages, table.page_capacity * layout::PAGE);
    }

    // --- what a guest's ids mean ---

    /// The id by which the guest knows a node.
    pub(crate) fn id(&self, slot: Slot) -> u64 {
        let change = Change::new(&self.words);
        let generation = Node::at(&self.geometry, slot).map_or(0, |node| node.generation(&change));
        change::pair(generation, slot)
    }

    /// The node that an id means; none where this session has not given it out, or it has been forgotten.
    pub(crate) fn slot(&self, id: u64) -> Option<Slot> {
        let (generation, slot) = ((id >> 32) as u32, id as u32);
        let change = Change::new(&self.words);
        let node = Node::at(&self.geometry, slot)?;
        let begun = u64::from(slot) < self.words.get(header::NODES_HIGH);
        let held = begun && node.is_used(&change) && (slot == ROOT || !node.is_idle(&change));
        (held && node.generation(&change) == generation).then_some(slot)
    }

    /// The number by which the guest knows a handle.
    pub(crate) fn fh(&self, slot: u32) -> u64 {
        let change = Change::new(&self.words);
        change::pair(Handle::at(&self.geometry, slot).map_or(0, |handle| handle.generation(&change)), slot)
    }

    /// The handle that a guest's number means.
    pub(crate) fn opened(&self, fh: u64) -> Option<Opened> {
        let (generation, slot) = ((fh >> 32) as u32, fh as u32);
        let change = Change::new(&self.words);
        let begun = u64::from(slot) < self.words.get(header::HANDLES_HIGH);
        let handle =
            Handle::at(&self.geometry, slot).filter(|handle| begun && handle.generation(&change) == generation)?;
        let kind = handle.kind(&change)?;
        Some(Opened {
            slot,
            node: handle.node(&change),
            kind,
            flags: handle.flags(&change),
            file_handle: handle.file_handle(&change),
        })
    }

    // --- what a node is ---

    pub(crate) fn identity(&self, slot: Slot) -> Identity {
        let change = Change::new(&self.words);
        Node::at(&self.geometry, slot).map_or_else(Identity::default, |node| node.identity(&change))
    }

    /// The names by which a node is known: below which node, and how.
    pub(crate) fn names(&self, slot: Slot) -> Vec<(Slot, Vec<u8>)> {
        let change = Change::new(&self.words);
        self.name_cells(&change, slot)
            .into_iter()
            .filter_map(|cell| Name::at(&self.geometry, cell))
            .map(|name| (name.parent(&change), name.bytes(&change, &self.words)))
            .collect()
    }

    /// The node that a name is known to lead to.
    pub(crate) fn find(&self, parent: Slot, name: &[u8]) -> Option<Slot> {
        let change = Change::new(&self.words);
        let cell = self.find_cell(&change, parent, name)?;
        Name::at(&self.geometry, cell).map(|name| name.node(&change))
    }

    /// Nodes known by this identity. Each is a hint.
    pub(crate) fn look_alikes(&self, identity: Identity) -> Vec<Slot> {
        let change = Change::new(&self.words);
        self.by_identity()
            .candidates(&change, hash_identity(self.key.0, identity))
            .filter(|slot| {
                Node::at(&self.geometry, *slot)
                    .is_some_and(|node| node.is_used(&change) && node.identity(&change) == identity)
            })
            .collect()
    }

    // --- what the guest is told ---

    /// The guest is told that `name` below `parent` leads to `slot`. Returns the node that it was told before.
    pub(crate) fn tell(&mut self, parent: Slot, name: &[u8], slot: Slot) -> Result<Option<Slot>, Full> {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let mut freed = Vec::new();
        let displaced = self.lead(&mut change, parent, name, slot, &mut freed)?;
        self.count_ref(&mut change, slot);
        self.commit(change, freed);
        Ok(displaced)
    }

    /// Can the guest be told of another name of this length?
    ///
    /// # Errors
    /// There is no room for it.
    pub(crate) fn room_for_name(&mut self, length: usize) -> Result<(), Full> {
        let words = self.words.clone();
        let room = self.cells.has_room(&Change::new(&words), &self.geometry, names::words_for(length));
        room.then_some(()).ok_or(Full)
    }

    /// Can the guest be told of another node?
    ///
    /// # Errors
    /// It holds as many as it may, or there is no room for it.
    pub(crate) fn room_for_node(&mut self) -> Result<(), Full> {
        let words = self.words.clone();
        let room = words.get(header::NODES) < self.max_nodes && self.has_free_node(&Change::new(&words));
        room.then_some(()).ok_or(Full)
    }

    /// Can the guest be given another handle?
    ///
    /// # Errors
    /// There is no room for it.
    pub(crate) fn room_for_handle(&mut self) -> Result<(), Full> {
        let words = self.words.clone();
        self.has_free_handle(&Change::new(&words)).then_some(()).ok_or(Full)
    }

    /// The guest is told of a node that it does not hold yet. Returns it, and the node that `name` led to before.
    pub(crate) fn tell_new(
        &mut self,
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
        let displaced = match self.lead(&mut change, parent, name, slot, &mut freed) {
            Ok(displaced) => displaced,
            Err(full) => {
                // One that was never used stays so: the change that would have begun it is not made.
                if u64::from(slot) < self.words.get(header::NODES_HIGH) {
                    self.nodes.give_back(slot);
                }
                return Err(full);
            }
        };
        self.count_ref(&mut change, slot);
        self.commit(change, freed);
        Ok((slot, displaced))
    }

    /// The guest has forgotten `count` tellings; part number `part` (from 1) of the request at hand.
    pub(crate) fn forget(&mut self, slot: Slot, count: u64, part: u64) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        Flight::of(self.ring).set_progress(&mut change, part);
        if let Some(node) = Node::at(&self.geometry, slot).filter(|node| slot != ROOT && node.is_used(&change)) {
            let refs = node.refs(&change);
            node.set_refs(&mut change, refs.saturating_sub(count));
        }
        change.commit();
        self.release_if_idle(slot);
    }

    /// The request at hand takes one telling of its own back (a directory entry that no longer fits).
    pub(crate) fn untell(&mut self, slot: Slot) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        self.uncount_ref(&mut change, slot);
        Flight::of(self.ring).unnote(&mut change, slot);
        change.commit();
        self.release_if_idle(slot);
    }

    /// `name` below `parent` leads nowhere any more. Returns the node that it led to.
    pub(crate) fn remove(&mut self, parent: Slot, name: &[u8]) -> Option<Slot> {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let cell = self.find_cell(&change, parent, name)?;
        let node = Name::at(&self.geometry, cell).map_or(0, |name| name.node(&change));
        let mut freed = Vec::new();
        self.drop_name(&mut change, cell, &mut freed);
        self.commit(change, freed);
        self.release_if_idle(node);
        self.release_if_idle(parent);
        Some(node)
    }

    /// The first name now leads where the second leads, and with `exchange` the other way round too.
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
        // A name that cannot be kept for want of room is found again by the guest's next lookup.
        if let Some(moved) = moved {
            let _ = self.lead(&mut change, to.0, to.1, moved, &mut freed);
        }
        if let (true, Some(replaced)) = (exchange, replaced) {
            let _ = self.lead(&mut change, from.0, from.1, replaced, &mut freed);
        }
        self.commit(change, freed);
        self.release_if_idle(replaced.unwrap_or(0));
        self.release_if_idle(from.0);
    }

    // --- what the guest has open ---

    /// The guest has opened `node`. Returns its number for the handle.
    pub(crate) fn open(
        &mut self,
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
        Flight::of(self.ring).note_handle(&mut change, slot);
        let fh = change::pair(handle.generation(&change), slot);
        change.commit();
        Ok(fh)
    }

    /// The guest has closed the handle in `slot`.
    pub(crate) fn close(&mut self, slot: u32) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        Flight::of(self.ring).set_progress(&mut change, 1);
        let node = self.end_handle(&mut change, slot);
        change.commit();
        self.handles.give_back(slot);
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

    /// The handles open on a node, the latest first.
    pub(crate) fn handles_of(&self, node: Slot) -> Vec<Opened> {
        let change = Change::new(&self.words);
        let Some(open) = Node::at(&self.geometry, node) else { return Vec::new() };
        let first = Some(open.first_handle(&change));
        // As many as are counted: a damaged chain may have no end.
        std::iter::successors(first, |slot| Handle::at(&self.geometry, *slot).map(|handle| handle.next(&change)))
            .take(open.handles(&change).min(self.geometry.handle_capacity) as usize)
            .map_while(|slot| self.opened(self.fh(slot)).filter(|opened| opened.node == node))
            .collect()
    }
}

fn unreadable(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a ledger that this engine reads: {why}"))
}
