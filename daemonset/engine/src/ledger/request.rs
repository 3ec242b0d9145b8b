//! The request at hand, as its ring's record tells of it, and what was agreed when the guest mounted.

use virtiofs_contract::counters::Held;

use super::Ledger;
use super::change::Change;
use super::flight::{Before, Course, Flight, Ticket};
use super::handles::Handle;
use super::layout::header;
use super::words::Words;

impl Ledger {
    /// What is known of a request that `ring` is about to serve.
    pub(crate) fn course(&self, ring: usize, ticket: &Ticket) -> Course {
        Flight::of(ring).course(&self.words, ticket)
    }

    /// `ring` begins a request.
    pub(crate) fn begin(&mut self, ring: usize, ticket: &Ticket) {
        self.ring = ring;
        Flight::of(ring).begin(&self.words, ticket);
    }

    /// The handle that the request at hand of `ring` has opened so far, by the guest's number.
    pub(crate) fn taken_handle(&self, ring: usize) -> Option<u64> {
        let change = Change::new(&self.words);
        let slot = Flight::of(ring).handle(&change);
        Some(self.fh(slot)).filter(|fh| self.opened(*fh).is_some())
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
