//! The in-flight record of a ring: it shows the next engine whether a request was done.

use super::change::Change;
use super::layout::{FLIGHT_REFS, Geometry, MAX_REFS};
use super::nodes::Slot;
use super::words::Words;

const STATE: u32 = 0;
const POSITION: u32 = 1;
const UNIQUE: u32 = 2;
const REPLY_BYTES: u32 = 3;
const REFS: u32 = 4;
const PROGRESS: u32 = 5;
const HANDLE: u32 = 6;
const DEATHS: u32 = 7;
const BEFORE: u32 = 8;

const IDLE: u64 = 0;
const STARTED: u64 = 1;
const FINISHED: u64 = 2;

/// The state on the host before a request was carried out, as far as a repetition needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PriorState {
    /// True if it has been recorded.
    pub(crate) known: bool,
    /// True if the name existed (unlink, rmdir, create, mkdir, ...), or the attribute.
    pub(crate) existed: bool,
    /// Inode number at the (first) name.
    pub(crate) first: u64,
    /// Inode number at the second name of a rename; 0: it did not exist.
    pub(crate) second: u64,
    /// Size of the file.
    pub(crate) size: u64,
}

/// Identifies a request on its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestId {
    /// Position in the available ring.
    pub(crate) position: u16,
    /// `unique` of the FUSE header.
    pub(crate) unique: u64,
}

/// What the in-flight record says of a request that is taken from the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestStatus {
    /// No engine has begun it.
    New,
    /// An engine that died had begun it.
    Interrupted {
        /// Deaths by fault during this request.
        faults: u32,
        /// Deaths by SIGKILL during this request.
        kills: u32,
    },
    /// It was finished and its reply is in guest memory, but not in the used ring.
    Answered {
        /// Length of the reply.
        bytes: u32,
    },
}

/// A ring's record.
#[derive(Clone, Copy)]
pub(super) struct Flight {
    at: u32,
}

impl Flight {
    pub(super) fn of(ring: usize) -> Self {
        Flight { at: Geometry::flight(ring) }
    }

    /// What the record says of this request.
    pub(super) fn status(self, words: &Words, id: &RequestId) -> RequestStatus {
        let same = words.get(self.at + POSITION) == u64::from(id.position) && words.get(self.at + UNIQUE) == id.unique;
        match words.get(self.at + STATE) {
            FINISHED if same => RequestStatus::Answered { bytes: words.get(self.at + REPLY_BYTES) as u32 },
            STARTED if same => {
                let deaths = words.get(self.at + DEATHS);
                RequestStatus::Interrupted { faults: (deaths >> 32) as u32, kills: deaths as u32 }
            }
            _ => RequestStatus::New,
        }
    }

    /// True if a request was begun and not finished.
    pub(super) fn is_started(self, words: &Words) -> bool {
        words.get(self.at + STATE) == STARTED
    }

    pub(super) fn begin(self, words: &Words, id: &RequestId) {
        words.set(self.at + STATE, IDLE);
        words.set(self.at + POSITION, u64::from(id.position));
        words.set(self.at + UNIQUE, id.unique);
        words.set(self.at + REFS, 0);
        words.set(self.at + PROGRESS, 0);
        words.set(self.at + HANDLE, 0);
        words.set(self.at + DEATHS, 0);
        words.set(self.at + BEFORE, 0);
        words.set(self.at + STATE, STARTED);
    }

    /// Counts the death of an engine during the request.
    pub(super) fn count_death(self, words: &Words, by_fault: bool) {
        let step = if by_fault { 1 << 32 } else { 1 };
        words.set(self.at + DEATHS, words.get(self.at + DEATHS).wrapping_add(step));
    }

    pub(super) fn finish(self, words: &Words, reply_bytes: u32) {
        words.set(self.at + REPLY_BYTES, u64::from(reply_bytes));
        words.set(self.at + STATE, FINISHED);
    }

    pub(super) fn clear(self, words: &Words) {
        words.set(self.at + STATE, IDLE);
    }

    /// Records, in the change that counts it, a lookup to drop if the request is repeated.
    pub(super) fn record_ref(self, change: &mut Change<'_>, slot: Slot) {
        let taken = self.taken(change);
        if taken < MAX_REFS {
            change.set_half(self.at + FLIGHT_REFS, taken, slot);
            change.set(self.at + REFS, u64::from(taken) + 1);
        }
    }

    /// The lookup that was recorded last and has not been dropped.
    pub(super) fn last_ref(self, change: &Change<'_>) -> Option<Slot> {
        let taken = self.taken(change);
        (taken > 0).then(|| change.half(self.at + FLIGHT_REFS, taken - 1))
    }

    /// Removes the lookup that was recorded last.
    pub(super) fn drop_last_ref(self, change: &mut Change<'_>) {
        let left = self.taken(change).saturating_sub(1);
        change.set(self.at + REFS, left.into());
    }

    /// Number of recorded lookups. Never more than there is room for, whatever a damaged record says.
    fn taken(self, change: &Change<'_>) -> u32 {
        u32::try_from(change.get(self.at + REFS)).unwrap_or(MAX_REFS).min(MAX_REFS)
    }

    /// The request itself has dropped a lookup of `slot`.
    pub(super) fn unrecord_ref(self, change: &mut Change<'_>, slot: Slot) {
        if self.last_ref(change) == Some(slot) {
            self.drop_last_ref(change);
        }
    }

    /// Records the handle that the request opens.
    pub(super) fn record_handle(self, change: &mut Change<'_>, slot: u32) {
        change.set(self.at + HANDLE, u64::from(slot));
    }

    pub(super) fn handle(self, change: &Change<'_>) -> u32 {
        change.get(self.at + HANDLE) as u32
    }

    /// How many parts of the request have been carried out.
    pub(super) fn progress(self, words: &Words) -> u64 {
        words.get(self.at + PROGRESS)
    }

    pub(super) fn set_progress(self, change: &mut Change<'_>, parts: u64) {
        change.set(self.at + PROGRESS, parts);
    }

    pub(super) fn prior_state(self, words: &Words) -> PriorState {
        let flags = words.get(self.at + BEFORE);
        PriorState {
            known: flags & 1 != 0,
            existed: flags & 2 != 0,
            first: words.get(self.at + BEFORE + 1),
            second: words.get(self.at + BEFORE + 2),
            size: words.get(self.at + BEFORE + 3),
        }
    }

    pub(super) fn set_prior_state(self, words: &Words, prior: &PriorState) {
        words.set(self.at + BEFORE + 1, prior.first);
        words.set(self.at + BEFORE + 2, prior.second);
        words.set(self.at + BEFORE + 3, prior.size);
        words.set(self.at + BEFORE, 1 | u64::from(prior.existed) << 1);
    }
}
