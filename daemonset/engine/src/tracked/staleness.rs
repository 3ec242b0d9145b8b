//! What the guest was told, against what is there now: stale events, counted by cause.
//!
//! The ledger is the table of what the guest was told; there is no second one. The guest's own changes are in the
//! ledger before anybody compares, so whatever differs is not its doing: a host process, or another VM.
//!
//! A stale name is an event once: with the event the ledger forgets the name, or has the new node by it. Nothing is
//! lost by that, as the name no longer leads to the node in any case.

use std::io;

use virtiofs_contract::counters::Counters;
use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::FileSystem;

use crate::ledger::Slot;

use super::names::Place;
use super::resolve::{belongs_below, names_nothing};
use super::state::State;
use super::{Tracked, errno, ourselves};

/// A name below a node.
pub(super) type NameBelow<'a> = (Slot, &'a [u8]);

/// Most names of one node that are looked at while the guest waits.
const MOST_NAMES: usize = 8;

/// What an error says of staleness, where the file itself does not tell more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Symptom {
    /// There was no descriptor to be had.
    NoDescriptor,
    /// What is held by its file handle does not open.
    DoesNotOpen,
    /// Nothing.
    None,
}

/// What is to be seen by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sight {
    /// The node that the guest was told of.
    Same,
    /// Something else, or nothing.
    Gone(Cause),
    /// The directory does not open by its file handle either.
    BelowWhatDoesNotOpen,
    /// Nothing could be seen.
    Unknown,
}

fn symptom(errno: i32) -> Symptom {
    match errno {
        libc::EMFILE | libc::ENFILE => Symptom::NoDescriptor,
        libc::ESTALE => Symptom::DoesNotOpen,
        _ => Symptom::None,
    }
}

impl<F: FileSystem> Tracked<F> {
    /// The guest used a number that means nothing in this session.
    pub(super) fn fenced(&self) {
        if let Some(counters) = &self.stale {
            counters.count_stale(Cause::Fenced, b"");
        }
    }

    /// The guest holds `told` by a name that leads elsewhere, or nowhere.
    pub(super) fn name_is_stale(&self, state: &State, name: NameBelow<'_>, told: Slot, cause: Cause) {
        if let Some(counters) = &self.stale {
            count_name(self.inner.as_ref(), counters, state, name, told, cause);
        }
    }

    /// There is nothing by that name.
    pub(super) fn name_is_gone(&self, state: &mut State, name: NameBelow<'_>) {
        if let Some(told) = state.ledger.find(name.0, name.1) {
            self.name_is_stale(state, name, told, Cause::SourceRemoved);
            state.ledger.remove(name.0, name.1);
        }
    }

    /// By a name that `slot` is known by something else was found in search of it.
    pub(super) fn name_leads_elsewhere(&self, state: &mut State, name: NameBelow<'_>, slot: Slot) {
        self.search_failed(state, name, slot, Cause::SourceReplaced);
    }

    /// A name that `slot` is known by could not be followed.
    pub(super) fn name_not_resolved(&self, state: &mut State, name: NameBelow<'_>, slot: Slot, error: &io::Error) {
        match symptom(errno(error)) {
            Symptom::NoDescriptor => self.refused_for_want_of_descriptors(state, name),
            Symptom::None if names_nothing(error) => self.search_failed(state, name, slot, Cause::SourceRemoved),
            // The directory above does not open. What that means is found out by its own names.
            Symptom::DoesNotOpen => self.node_refused(state, name.0, error),
            Symptom::None => {}
        }
    }

    fn search_failed(&self, state: &mut State, name: NameBelow<'_>, slot: Slot, cause: Cause) {
        // A request that a dead engine had begun may itself have moved the name. If not, the audit finds it.
        if state.current.again || state.ledger.find(name.0, name.1) != Some(slot) {
            return;
        }
        self.name_is_stale(state, name, slot, cause);
        if self.stale.is_some() {
            state.ledger.remove(name.0, name.1);
        }
    }

    /// A lookup of the guest's was refused.
    pub(super) fn lookup_refused(&self, state: &mut State, place: Place<'_>, error: &io::Error) {
        match symptom(errno(error)) {
            Symptom::NoDescriptor => self.refused_for_want_of_descriptors(state, (place.slot, place.name.to_bytes())),
            Symptom::DoesNotOpen => self.node_refused(state, place.slot, error),
            Symptom::None => {}
        }
    }

    fn refused_for_want_of_descriptors(&self, state: &State, name: NameBelow<'_>) {
        if let Some(counters) = &self.stale {
            counters.count_stale(Cause::FdExhausted, &state.ledger.path_of(name.0, name.1));
        }
    }

    /// The library could not open a node that it knows.
    pub(super) fn node_refused(&self, state: &mut State, node: Slot, error: &io::Error) {
        let Some(counters) = &self.stale else { return };
        match symptom(errno(error)) {
            Symptom::NoDescriptor => counters.count_stale(Cause::FdExhausted, &state.ledger.path(node)),
            Symptom::DoesNotOpen => self.find_out(state, counters, node),
            Symptom::None => {}
        }
    }

    /// A file handle does not open: is the file gone, or only the handle?
    fn find_out(&self, state: &mut State, counters: &Counters, node: Slot) {
        let mut doubtful = vec![node];
        for _ in 0..MOST_NAMES * MOST_NAMES {
            let Some(node) = doubtful.pop() else { return };
            let mut still_there = false;
            for (parent, name) in state.ledger.names(node).into_iter().take(MOST_NAMES) {
                match self.look(state, (parent, &name), node) {
                    Sight::Gone(cause) => self.search_failed(state, (parent, &name), node, cause),
                    Sight::Same => still_there = true,
                    // Then it may well be the directory that is gone.
                    Sight::BelowWhatDoesNotOpen => doubtful.push(parent),
                    Sight::Unknown => {}
                }
            }
            // Where no name is left that was counted when they went.
            if still_there {
                counters.count_stale(Cause::HandleStale, &state.ledger.path(node));
            }
        }
    }

    /// True if a name that the guest holds still leads to the node. Names that do not are counted and forgotten.
    pub(super) fn has_name(&self, state: &mut State, node: Slot) -> bool {
        let mut found = false;
        for (parent, name) in state.ledger.names(node).into_iter().take(MOST_NAMES) {
            match self.look(state, (parent, &name), node) {
                Sight::Same => found = true,
                Sight::Gone(cause) => self.search_failed(state, (parent, &name), node, cause),
                Sight::BelowWhatDoesNotOpen | Sight::Unknown => {}
            }
        }
        found
    }

    /// What is to be seen by a name of a node.
    fn look(&self, state: &State, (parent, name): NameBelow<'_>, node: Slot) -> Sight {
        let (Some(above), Ok(name)) = (state.bindings.inode_of(parent), super::resolve::component(name)) else {
            return Sight::Unknown;
        };
        match self.inner.lookup(ourselves(), above.into(), &name) {
            Ok(entry) => {
                self.inner.forget(ourselves(), entry.inode.into(), 1);
                let same = state.bindings.slot_of(entry.inode) == Some(node);
                if same { Sight::Same } else { Sight::Gone(Cause::SourceReplaced) }
            }
            Err(gone) if errno(&gone) == libc::ESTALE => Sight::BelowWhatDoesNotOpen,
            Err(gone) if names_nothing(&gone) => Sight::Gone(Cause::SourceRemoved),
            Err(_) => Sight::Unknown,
        }
    }

    /// The guest has opened a node, and asked for no name before: is it still what its names lead to?
    pub(super) fn opened_by_cached_name(&self, state: &mut State, node: Slot) {
        if self.stale.is_some() && state.to_check.add(node) {
            self.core.wake.notify_one();
        }
    }
}

/// Counts a stale name, unless the guest was told of it under another root, or the root itself is gone: that is seen
/// and counted by the broker, once for all names.
pub(super) fn count_name<F: FileSystem>(
    inner: &F,
    counters: &Counters,
    state: &State,
    (parent, name): NameBelow<'_>,
    told: Slot,
    cause: Cause,
) {
    let known = belongs_below(state.ledger.identity(parent), state.ledger.identity(told));
    if known && !is_root_removed(inner) {
        counters.count_stale(cause, &state.ledger.path_of(parent, name));
    }
}

fn is_root_removed<F: FileSystem>(inner: &F) -> bool {
    let root = super::state::LIBRARY_ROOT;
    inner.getattr(ourselves(), root.into(), None).is_ok_and(|(attr, _)| attr.nlink == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_they_say_and_no_more() {
        for (errno, expected) in [
            (libc::EMFILE, Symptom::NoDescriptor),
            (libc::ENFILE, Symptom::NoDescriptor),
            (libc::ESTALE, Symptom::DoesNotOpen),
            (libc::ENOENT, Symptom::None),
            (libc::EACCES, Symptom::None),
            (libc::EIO, Symptom::None),
            (libc::ENOMEM, Symptom::None),
        ] {
            assert_eq!(symptom(errno), expected, "{errno}");
        }
    }
}
