//! The request in flight of each ring, and what was agreed in FUSE_INIT.

use virtiofs_contract::counters::Held;

use super::Ledger;
use super::change::Change;
use super::flight::{Flight, PriorState, RequestId, RequestStatus};
use super::handles::Handle;
use super::layout::header;
use super::words::Words;

impl Ledger {
    /// What the in-flight record says of a request that `ring` is about to serve.
    pub(crate) fn status(&self, ring: usize, id: &RequestId) -> RequestStatus {
        Flight::of(ring).status(&self.words, id)
    }

    /// Records that `ring` begins a request.
    pub(crate) fn begin(&mut self, ring: usize, id: &RequestId) {
        Flight::of(ring).begin(&self.words, id);
    }

    /// The guest's number of the handle that the request of `ring` has opened so far.
    pub(crate) fn taken_handle(&self, ring: usize) -> Option<u64> {
        let change = Change::new(&self.words);
        let slot = Flight::of(ring).handle(&change);
        Some(self.fh(slot)).filter(|fh| self.opened(*fh).is_some())
    }

    /// Records that `ring` repeats a request that a dead engine had begun, and drops the lookups and the handle it had taken.
    pub(crate) fn restart(&mut self, ring: usize) {
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
            flight.record_handle(&mut change, 0);
            change.commit();
            self.handles.release(handle);
            self.release_if_idle(node);
        }
    }

    /// How many parts of the request of `ring` have been carried out.
    pub(crate) fn progress(&self, ring: usize) -> u64 {
        Flight::of(ring).progress(&self.words)
    }

    /// The state before the request of `ring` was first carried out.
    pub(crate) fn prior_state(&self, ring: usize) -> PriorState {
        Flight::of(ring).prior_state(&self.words)
    }

    /// Records it before the request is carried out.
    pub(crate) fn set_prior_state(&mut self, ring: usize, prior: &PriorState) {
        Flight::of(ring).set_prior_state(&self.words, prior);
    }

    /// A view by which the device records the end of requests without the lock.
    pub(crate) fn completion_log(&self) -> CompletionLog {
        CompletionLog { words: self.words.clone() }
    }

    /// Records the FUSE_INIT request of the guest and its reply.
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

    /// The FUSE_INIT request and reply; none: the guest has not mounted.
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

/// Records the end of requests.
pub(crate) struct CompletionLog {
    words: Words,
}

impl CompletionLog {
    /// The request of `ring` is done and its reply is in guest memory.
    pub(crate) fn finish(&self, ring: usize, reply_bytes: u32) {
        Flight::of(ring).finish(&self.words, reply_bytes);
    }

    /// The reply of `ring` is in the used ring.
    pub(crate) fn published(&self, ring: usize) {
        Flight::of(ring).clear(&self.words);
    }

    /// How much the guest holds.
    pub(crate) fn held(&self) -> Held {
        Held { inodes: self.words.get(header::NODES), handles: self.words.get(header::HANDLES) }
    }
}
