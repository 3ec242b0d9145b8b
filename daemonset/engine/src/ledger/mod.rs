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
mod handles;
#[cfg(test)]
mod harness;
mod index;
mod layout;
mod names;
mod nodes;
#[cfg(test)]
mod tests;
mod words;

use std::io;
use std::os::fd::AsFd;

use siphasher::sip::SipHasher13;
use virtiofs_contract::counters::Held;
use virtiofs_contract::engine::{Predecessor, QUEUES};

use cells::Cells;
use change::{Change, carry_out};
use flight::Flight;
pub(crate) use flight::{Before, Course, Ticket};
use handles::Handle;
pub(crate) use handles::{FileHandle, OpenKind};
use index::Index;
use layout::{FIRST_BUCKETS, Geometry, MAGIC, VERSION, header};
use names::{ByName, Name};
use nodes::{ByIdentity, Node, hash_identity};
pub(crate) use nodes::{Identity, ROOT, Slot};
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
        self.cells = Cells::attach(self.words.get(header::PAGES_HIGH) as u32);
        let high = |at, capacity: u32| (self.words.get(at) as u32).min(capacity);
        self.nodes = FreeList::behind(ROOT + 1, high(header::NODES_HIGH, self.geometry.node_capacity));
        self.handles = FreeList::behind(1, high(header::HANDLES_HIGH, self.geometry.handle_capacity));
        if predecessor != Predecessor::AtRest {
            for ring in 0..QUEUES {
                let flight = Flight::of(ring);
                if flight.is_started(&self.words) {
                    flight.count_death(&self.words, predecessor == Predecessor::Faulted);
                }
            }
        }
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
            root.begin(&mut change, 0, Identity::default());
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

    /// How many handles are open on a node.
    pub(crate) fn open_count(&self, slot: Slot) -> u32 {
        let change = Change::new(&self.words);
        Node::at(&self.geometry, slot).map_or(0, |node| node.handles(&change))
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

    /// The guest is told that `name` below `parent` leads to `slot`.
    pub(crate) fn tell(&mut self, parent: Slot, name: &[u8], slot: Slot) -> Result<(), Full> {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let mut freed = Vec::new();
        self.lead(&mut change, parent, name, slot, &mut freed)?;
        self.count_ref(&mut change, slot);
        self.commit(change, freed);
        Ok(())
    }

    /// The guest is told of a node that it does not hold yet.
    pub(crate) fn tell_new(&mut self, parent: Slot, name: &[u8], identity: Identity) -> Result<Slot, Full> {
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
        if let Err(full) = self.lead(&mut change, parent, name, slot, &mut freed) {
            self.nodes.give_back(slot);
            return Err(full);
        }
        self.count_ref(&mut change, slot);
        self.commit(change, freed);
        Ok(slot)
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

    /// `name` below `parent` leads nowhere any more.
    pub(crate) fn remove(&mut self, parent: Slot, name: &[u8]) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let Some(cell) = self.find_cell(&change, parent, name) else { return };
        let node = Name::at(&self.geometry, cell).map_or(0, |name| name.node(&change));
        let mut freed = Vec::new();
        self.drop_name(&mut change, cell, &mut freed);
        self.commit(change, freed);
        self.release_if_idle(node);
        self.release_if_idle(parent);
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
        let count = open.handles(&change);
        open.set_handles(&mut change, count.saturating_add(1));
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
            let count = open.handles(change);
            open.set_handles(change, count.saturating_sub(1));
        }
        node
    }

    /// The handles open on a node, by number of slot.
    pub(crate) fn handles_of(&self, node: Slot) -> Vec<Opened> {
        let change = Change::new(&self.words);
        let high = (change.get(header::HANDLES_HIGH) as u32).min(self.geometry.handle_capacity);
        (1..high)
            .filter_map(|slot| Handle::at(&self.geometry, slot).map(|handle| (slot, handle)))
            .filter(|(_, handle)| handle.kind(&change).is_some() && handle.node(&change) == node)
            .filter_map(|(slot, handle)| self.opened(change::pair(handle.generation(&change), slot)))
            .collect()
    }

    // --- the request at hand ---

    /// What is known of a request that `ring` is about to serve.
    pub(crate) fn course(&self, ring: usize, ticket: &Ticket) -> Course {
        Flight::of(ring).course(&self.words, ticket)
    }

    /// `ring` begins a request.
    pub(crate) fn begin(&mut self, ring: usize, ticket: &Ticket) {
        self.ring = ring;
        Flight::of(ring).begin(&self.words, ticket);
    }

    /// `ring` begins a request anew that a dead engine had begun: what it had taken for it is given back.
    pub(crate) fn begin_again(&mut self, ring: usize) {
        self.ring = ring;
        let flight = Flight::of(ring);
        let words = self.words.clone();
        loop {
            let mut change = Change::new(&words);
            let Some(slot) = flight.last_ref(&change) else { break };
            self.uncount_ref(&mut change, slot);
            flight.drop_last_ref(&mut change);
            change.commit();
            self.release_if_idle(slot);
        }
        let mut change = Change::new(&words);
        let handle = flight.handle(&change);
        if Handle::at(&self.geometry, handle).is_some_and(|taken| taken.kind(&change).is_some()) {
            let node = self.end_handle(&mut change, handle);
            flight.note_handle(&mut change, 0);
            change.commit();
            self.handles.give_back(handle);
            self.release_if_idle(node);
        }
    }

    /// When the request at hand was begun, by whichever engine was first.
    pub(crate) fn begun_at(&self) -> u64 {
        Flight::of(self.ring).started_at(&self.words)
    }

    /// How many parts of the request at hand have been carried out.
    pub(crate) fn progress(&self) -> u64 {
        Flight::of(self.ring).progress(&self.words)
    }

    /// What was true before the request at hand was first carried out.
    pub(crate) fn before(&self) -> Before {
        Flight::of(self.ring).before(&self.words)
    }

    /// Records it, before the request is carried out.
    pub(crate) fn set_before(&mut self, before: &Before) {
        Flight::of(self.ring).set_before(&self.words, before);
    }

    /// The end of requests, which needs no look at anything else.
    pub(crate) fn log(&self) -> Log {
        Log { words: self.words.clone() }
    }

    // --- the guest's mount ---

    /// Records what the guest and this session agreed on in FUSE_INIT.
    pub(crate) fn record_init(&mut self, request: &[u8], reply: &[u8]) {
        if request.len() > header::INIT_BYTES || reply.len() > header::INIT_BYTES {
            return;
        }
        self.words.set(header::INIT_REQUEST_LENGTH, 0);
        self.words.set_bytes(header::INIT_REQUEST, request);
        self.words.set_bytes(header::INIT_REPLY, reply);
        self.words.set(header::INIT_REPLY_LENGTH, reply.len() as u64);
        self.words.set(header::INIT_REQUEST_LENGTH, request.len() as u64);
    }

    /// What they agreed on, request and reply; none: the guest has not mounted.
    pub(crate) fn init(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let length = |at| (self.words.get(at) as usize).min(header::INIT_BYTES);
        let request = length(header::INIT_REQUEST_LENGTH);
        (request > 0).then(|| {
            let (mut sent, mut answered) = (Vec::new(), Vec::new());
            self.words.get_bytes(header::INIT_REQUEST, request, &mut sent);
            self.words.get_bytes(header::INIT_REPLY, length(header::INIT_REPLY_LENGTH), &mut answered);
            (sent, answered)
        })
    }

    // --- parts of changes ---

    fn commit(&mut self, change: Change<'_>, freed: Vec<(u32, u32)>) {
        change.commit();
        for (cell, words) in freed {
            self.cells.give_back(cell, words);
        }
    }

    fn count_ref(&self, change: &mut Change<'_>, slot: Slot) {
        if slot == ROOT {
            return;
        }
        if let Some(node) = Node::at(&self.geometry, slot) {
            let refs = node.refs(change);
            node.set_refs(change, refs.saturating_add(1));
            Flight::of(self.ring).note_ref(change, slot);
        }
    }

    fn uncount_ref(&self, change: &mut Change<'_>, slot: Slot) {
        if let Some(node) = Node::at(&self.geometry, slot).filter(|node| slot != ROOT && node.is_used(change)) {
            let refs = node.refs(change);
            node.set_refs(change, refs.saturating_sub(1));
        }
    }

    /// Makes `name` lead to `slot`, whatever it led to before.
    fn lead(
        &mut self,
        change: &mut Change<'_>,
        parent: Slot,
        name: &[u8],
        slot: Slot,
        freed: &mut Vec<(u32, u32)>,
    ) -> Result<(), Full> {
        if let Some(cell) = self.find_cell(change, parent, name) {
            if Name::at(&self.geometry, cell).is_some_and(|known| known.node(change) == slot) {
                return Ok(());
            }
            self.drop_name(change, cell, freed);
        }
        let (node, above) = Node::at(&self.geometry, slot).zip(Node::at(&self.geometry, parent)).ok_or(Full)?;
        let cell = self.cells.take(change, &self.geometry, names::words_for(name.len())).ok_or(Full)?;
        let record = Name::at(&self.geometry, cell).ok_or(Full)?;
        record.write_bytes(&self.words, name);
        record.begin(change, parent, slot, self.hash_name(parent, name), name.len());
        let others = node.names(change);
        record.set_next_of_node(change, others);
        node.set_names(change, cell);
        let children = above.children(change);
        above.set_children(change, children.saturating_add(1));
        change.add(header::NAMES, 1);
        let count = change.get(header::NAMES);
        self.by_name().insert(change, cell, count);
        Ok(())
    }

    fn drop_name(&self, change: &mut Change<'_>, cell: u32, freed: &mut Vec<(u32, u32)>) {
        let Some(name) = Name::at(&self.geometry, cell) else { return };
        let (parent, slot) = (name.parent(change), name.node(change));
        self.by_name().remove(change, cell);
        self.take_from_node(change, slot, cell);
        if let Some(above) = Node::at(&self.geometry, parent) {
            let children = above.children(change);
            above.set_children(change, children.saturating_sub(1));
        }
        change.subtract(header::NAMES, 1);
        freed.push((cell, name.words(change)));
        name.end(change);
    }

    fn take_from_node(&self, change: &mut Change<'_>, slot: Slot, cell: u32) {
        let Some(node) = Node::at(&self.geometry, slot) else { return };
        let cells = self.name_cells(change, slot);
        let Some(at) = cells.iter().position(|known| *known == cell) else { return };
        let next = cells.get(at + 1).copied().unwrap_or(0);
        match at.checked_sub(1).and_then(|before| Name::at(&self.geometry, cells[before])) {
            Some(before) => before.set_next_of_node(change, next),
            None => node.set_names(change, next),
        }
    }

    /// The cells of a node's names, within bounds that a damaged list cannot exceed.
    fn name_cells(&self, change: &Change<'_>, slot: Slot) -> Vec<u32> {
        const MOST_LINKS: usize = 65536;
        let Some(node) = Node::at(&self.geometry, slot) else { return Vec::new() };
        let first = Some(node.names(change));
        std::iter::successors(first, |cell| Name::at(&self.geometry, *cell).map(|name| name.next_of_node(change)))
            .take_while(|cell| Name::at(&self.geometry, *cell).is_some_and(|name| name.node(change) == slot))
            .take(MOST_LINKS)
            .collect()
    }

    fn find_cell(&self, change: &Change<'_>, parent: Slot, name: &[u8]) -> Option<u32> {
        self.by_name().candidates(change, self.hash_name(parent, name)).find(|cell| {
            Name::at(&self.geometry, *cell).is_some_and(|known| known.is(change, &self.words, parent, name))
        })
    }

    fn hash_name(&self, parent: Slot, name: &[u8]) -> u32 {
        use std::hash::Hasher;
        let mut hasher = SipHasher13::new_with_keys(self.key.0, self.key.1);
        hasher.write_u32(parent);
        hasher.write(name);
        hasher.finish() as u32
    }

    fn by_name(&self) -> Index<ByName> {
        Index {
            buckets: self.geometry.name_buckets,
            in_use: header::NAME_BUCKETS,
            capacity: self.geometry.node_capacity,
            entries: ByName { geometry: self.geometry },
        }
    }

    fn by_identity(&self) -> Index<ByIdentity> {
        Index {
            buckets: self.geometry.identity_buckets,
            in_use: header::IDENTITY_BUCKETS,
            capacity: self.geometry.node_capacity,
            entries: ByIdentity { geometry: self.geometry, key: self.key.0 },
        }
    }

    /// Ends a node that nobody can use any more, and the nodes above it that it alone kept.
    fn release_if_idle(&mut self, slot: Slot) {
        let mut doubtful = vec![slot];
        while let Some(slot) = doubtful.pop() {
            while self.release_step(slot, &mut doubtful) {}
        }
    }

    /// The nodes that have ended since this was last asked: their slots may mean other nodes by now.
    pub(crate) fn take_ended(&mut self) -> Vec<Slot> {
        std::mem::take(&mut self.ended)
    }

    /// Drops some of an idle node's names, and with the last of them the node. True: there are more.
    fn release_step(&mut self, slot: Slot, doubtful: &mut Vec<Slot>) -> bool {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let Some(node) = Node::at(&self.geometry, slot) else { return false };
        if slot == ROOT || !node.is_used(&change) || !node.is_idle(&change) {
            return false;
        }
        let cells = self.name_cells(&change, slot);
        let mut freed = Vec::new();
        for cell in cells.iter().take(NAMES_PER_CHANGE) {
            doubtful.extend(Name::at(&self.geometry, *cell).map(|name| name.parent(&change)));
            self.drop_name(&mut change, *cell, &mut freed);
        }
        let last = cells.len() <= NAMES_PER_CHANGE;
        if last {
            self.by_identity().remove(&mut change, slot);
            node.end(&mut change);
            change.subtract(header::NODES, 1);
        }
        self.commit(change, freed);
        if last {
            self.nodes.give_back(slot);
            self.ended.push(slot);
        }
        !last
    }

    fn take_node(&mut self, change: &mut Change<'_>) -> Option<Slot> {
        self.look_for_nodes();
        let capacity = self.geometry.node_capacity;
        self.nodes.free.pop().or_else(|| next_unused(change, header::NODES_HIGH, capacity))
    }

    fn take_handle(&mut self, change: &mut Change<'_>) -> Option<u32> {
        self.look_for_handles(change);
        let capacity = self.geometry.handle_capacity;
        self.handles.free.pop().or_else(|| next_unused(change, header::HANDLES_HIGH, capacity))
    }

    /// Looks at the next few slots that earlier engines used: a free one can be used again, and an idle one was
    /// about to be ended when its engine died.
    fn look_for_nodes(&mut self) {
        for _ in 0..LOOKS {
            let Some(slot) = self.nodes.look() else { return };
            let change = Change::new(&self.words);
            match Node::at(&self.geometry, slot) {
                Some(node) if !node.is_used(&change) => self.nodes.give_back(slot),
                Some(node) if node.is_idle(&change) => self.release_if_idle(slot),
                _ => {}
            }
        }
    }

    fn look_for_handles(&mut self, change: &Change<'_>) {
        for _ in 0..LOOKS {
            let Some(slot) = self.handles.look() else { return };
            if Handle::at(&self.geometry, slot).is_some_and(|handle| handle.kind(change).is_none()) {
                self.handles.give_back(slot);
            }
        }
    }
}

/// A view of the ledger for the thread that ends requests.
pub(crate) struct Log {
    words: Words,
}

impl Log {
    /// `ring`'s request is done and its reply stands in guest memory.
    pub(crate) fn finish(&self, ring: usize, reply_bytes: u32) {
        Flight::of(ring).finish(&self.words, reply_bytes);
    }

    /// The guest has been told.
    pub(crate) fn published(&self, ring: usize) {
        Flight::of(ring).clear(&self.words);
    }

    /// How much is held.
    pub(crate) fn held(&self) -> Held {
        Held { inodes: self.words.get(header::NODES), handles: self.words.get(header::HANDLES) }
    }
}

fn next_unused(change: &mut Change<'_>, high_water: u32, capacity: u32) -> Option<u32> {
    let slot = change.get(high_water) as u32;
    (slot < capacity).then(|| {
        change.set(high_water, u64::from(slot) + 1);
        slot
    })
}

/// Slots of a table that this engine knows to be free, and those of earlier engines that it has yet to look at.
#[derive(Default)]
struct FreeList {
    free: Vec<u32>,
    next: u32,
    end: u32,
}

impl FreeList {
    fn behind(first: u32, high_water: u32) -> Self {
        FreeList { free: Vec::new(), next: first, end: high_water }
    }

    fn look(&mut self) -> Option<u32> {
        (self.next < self.end).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// The slot is free for good. One that is yet to be looked at will be found then.
    fn give_back(&mut self, slot: u32) {
        if !(self.next..self.end).contains(&slot) {
            self.free.push(slot);
        }
    }
}

fn unreadable(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a ledger that this engine reads: {why}"))
}
