//! The request that a ring is working on: enough to know, after a kill, whether it was done.

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

/// What was true on the host before the request was carried out, as far as its repetition must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Before {
    /// Has anything been recorded?
    pub(crate) known: bool,
    /// Did the name exist (unlink, rmdir, create and its kin), or the attribute?
    pub(crate) existed: bool,
    /// Inode number behind the (first) name.
    pub(crate) first: u64,
    /// Inode number behind the second name of a rename; 0: there was none.
    pub(crate) second: u64,
    /// Size of the file.
    pub(crate) size: u64,
}

/// The request as the device sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// Position in the available ring.
    pub(crate) position: u16,
    /// FUSE's number of the request.
    pub(crate) unique: u64,
}

/// What the record says of a request that is taken from the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Course {
    /// Nobody has worked on it.
    Fresh,
    /// It was begun by an engine that died, so many times so far.
    Again {
        /// Deaths by fault while this request was worked on.
        faults: u32,
        /// Deaths by SIGKILL likewise.
        kills: u32,
    },
    /// It was finished, its reply stands in guest memory, and only the used ring does not say so yet.
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

    /// What is known of the request with this ticket.
    pub(super) fn course(self, words: &Words, ticket: &Ticket) -> Course {
        let same =
            words.get(self.at + POSITION) == u64::from(ticket.position) && words.get(self.at + UNIQUE) == ticket.unique;
        match words.get(self.at + STATE) {
            FINISHED if same => Course::Answered { bytes: words.get(self.at + REPLY_BYTES) as u32 },
            STARTED if same => {
                let deaths = words.get(self.at + DEATHS);
                Course::Again { faults: (deaths >> 32) as u32, kills: deaths as u32 }
            }
            _ => Course::Fresh,
        }
    }

    /// Is a request begun and not finished?
    pub(super) fn is_started(self, words: &Words) -> bool {
        words.get(self.at + STATE) == STARTED
    }

    pub(super) fn begin(self, words: &Words, ticket: &Ticket) {
        words.set(self.at + STATE, IDLE);
        words.set(self.at + POSITION, u64::from(ticket.position));
        words.set(self.at + UNIQUE, ticket.unique);
        words.set(self.at + REFS, 0);
        words.set(self.at + PROGRESS, 0);
        words.set(self.at + HANDLE, 0);
        words.set(self.at + DEATHS, 0);
        words.set(self.at + BEFORE, 0);
        words.set(self.at + STATE, STARTED);
    }

    /// Counts the death of an engine that was working on it.
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

    /// Notes, with the change that takes it, a reference that is to be given back should the request run again.
    pub(super) fn note_ref(self, change: &mut Change<'_>, slot: Slot) {
        let taken = change.get(self.at + REFS) as u32;
        if taken < MAX_REFS {
            change.set_half(self.at + FLIGHT_REFS, taken, slot);
            change.set(self.at + REFS, u64::from(taken) + 1);
        }
    }

    /// A reference noted last that has not been given back yet.
    pub(super) fn last_ref(self, change: &Change<'_>) -> Option<Slot> {
        let taken = (change.get(self.at + REFS) as u32).min(MAX_REFS);
        (taken > 0).then(|| change.half(self.at + FLIGHT_REFS, taken - 1))
    }

    /// Forgets the reference noted last.
    pub(super) fn drop_last_ref(self, change: &mut Change<'_>) {
        change.subtract(self.at + REFS, 1);
    }

    /// A reference to `slot` was given back by the request itself.
    pub(super) fn unnote(self, change: &mut Change<'_>, slot: Slot) {
        if self.last_ref(change) == Some(slot) {
            self.drop_last_ref(change);
        }
    }

    /// Notes a handle slot likewise.
    pub(super) fn note_handle(self, change: &mut Change<'_>, slot: u32) {
        change.set(self.at + HANDLE, u64::from(slot));
    }

    pub(super) fn handle(self, change: &Change<'_>) -> u32 {
        change.get(self.at + HANDLE) as u32
    }

    /// How many of the request's parts have been carried out.
    pub(super) fn progress(self, words: &Words) -> u64 {
        words.get(self.at + PROGRESS)
    }

    pub(super) fn set_progress(self, change: &mut Change<'_>, parts: u64) {
        change.set(self.at + PROGRESS, parts);
    }

    pub(super) fn before(self, words: &Words) -> Before {
        let flags = words.get(self.at + BEFORE);
        Before {
            known: flags & 1 != 0,
            existed: flags & 2 != 0,
            first: words.get(self.at + BEFORE + 1),
            second: words.get(self.at + BEFORE + 2),
            size: words.get(self.at + BEFORE + 3),
        }
    }

    pub(super) fn set_before(self, words: &Words, before: &Before) {
        words.set(self.at + BEFORE + 1, before.first);
        words.set(self.at + BEFORE + 2, before.second);
        words.set(self.at + BEFORE + 3, before.size);
        words.set(self.at + BEFORE, 1 | u64::from(before.existed) << 1);
    }
}
