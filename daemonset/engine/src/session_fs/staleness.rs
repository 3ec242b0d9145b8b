//! Staleness: what the guest holds, compared with what is on the host, counted by cause.
//!
//! The ledger lists what the guest holds; there is no second table. The guest's own changes are in the ledger before
//! anything is compared, so a difference is the work of another process: of the host, or of another VM.
//!
//! A stale name is counted once: the ledger then drops the name, or holds the new node by it. Nothing is lost by that,
//! because the name does not lead to the old node any more.

use std::io;

use virtiofs_contract::counters::Counters;
use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::FileSystem;

use crate::ledger::Slot;

use super::SessionFs;
use super::errors::{engine_context, errno, is_missing};
use super::identity::belongs_below;
use super::names::NameRef;
use super::nodes::LIBRARY_ROOT;
use super::request::RequestContext;
use super::resolve::component;
use super::state::State;

/// A name below a node.
pub(super) type NameBelow<'a> = (Slot, &'a [u8]);

/// Most names of one node that are looked up while the guest waits.
const MAX_NAMES: usize = 8;

/// What an error number says about staleness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Symptom {
    /// The engine has no descriptor left.
    NoDescriptor,
    /// A file handle does not open.
    DoesNotOpen,
    /// Nothing.
    None,
}

/// What a name leads to now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NameProbe {
    /// The node that the guest holds by it.
    Same,
    /// Another node, or none.
    Stale(Cause),
    /// Its directory does not open by file handle either.
    ParentDoesNotOpen,
    /// The lookup failed for another reason.
    Unknown,
}

fn symptom(errno: i32) -> Symptom {
    match errno {
        libc::EMFILE | libc::ENFILE => Symptom::NoDescriptor,
        libc::ESTALE => Symptom::DoesNotOpen,
        _ => Symptom::None,
    }
}

impl<F: FileSystem> SessionFs<F> {
    /// Counts a node id or handle of the guest that means nothing in this session.
    pub(super) fn count_fenced(&self) {
        if let Some(counters) = &self.counters {
            counters.count_stale(Cause::Fenced, b"");
        }
    }

    /// Counts a name by which the guest holds `node`, and that does not lead to it any more.
    pub(super) fn count_stale_name(&self, state: &State, name: NameBelow<'_>, node: Slot, cause: Cause) {
        if let Some(counters) = &self.counters {
            count_stale(self.library.as_ref(), counters, state, name, node, cause);
        }
    }

    /// Counts and drops a name that does not exist on the host, if the guest holds a node by it: `held`.
    pub(super) fn drop_missing_name(&self, state: &mut State, name: NameBelow<'_>, held: Option<Slot>) {
        if let Some(node) = held {
            self.count_stale_name(state, name, node, Cause::SourceRemoved);
            state.ledger.remove(name.0, name.1);
        }
    }

    /// Counts and drops a name by which the guest holds `node`, and that was found to lead elsewhere.
    pub(super) fn drop_stale_name(
        &self,
        state: &mut State,
        request: RequestContext,
        name: NameBelow<'_>,
        node: Slot,
        cause: Cause,
    ) {
        // A repeated request may itself have moved the name. If not, the audit finds it.
        if request.repeated || state.ledger.find(name.0, name.1) != Some(node) {
            return;
        }
        self.count_stale_name(state, name, node, cause);
        if self.counters.is_some() {
            state.ledger.remove(name.0, name.1);
        }
    }

    /// A name by which the guest holds `node` could not be looked up.
    pub(super) fn name_unresolved(
        &self,
        state: &mut State,
        request: RequestContext,
        name: NameBelow<'_>,
        node: Slot,
        error: &io::Error,
    ) {
        match symptom(errno(error)) {
            Symptom::NoDescriptor => self.count_fd_exhausted(state, name),
            Symptom::None if is_missing(error) => {
                self.drop_stale_name(state, request, name, node, Cause::SourceRemoved);
            }
            // The directory does not open. Its own names say what that means.
            Symptom::DoesNotOpen => self.node_failed(state, request, name.0, error),
            Symptom::None => {}
        }
    }

    /// A lookup or CREATE of the guest failed.
    pub(super) fn lookup_failed(&self, state: &mut State, request: RequestContext, at: NameRef<'_>, error: &io::Error) {
        match symptom(errno(error)) {
            Symptom::NoDescriptor => self.count_fd_exhausted(state, at.key()),
            Symptom::DoesNotOpen => self.node_failed(state, request, at.parent, error),
            Symptom::None => {}
        }
    }

    fn count_fd_exhausted(&self, state: &State, name: NameBelow<'_>) {
        if let Some(counters) = &self.counters {
            counters.count_stale(Cause::FdExhausted, &state.ledger.path_of(name.0, name.1));
        }
    }

    /// The library could not open a node that it knows.
    pub(super) fn node_failed(&self, state: &mut State, request: RequestContext, node: Slot, error: &io::Error) {
        let symptom = symptom(errno(error));
        if symptom == Symptom::DoesNotOpen {
            state.recent.node_is_stale();
        }
        let Some(counters) = &self.counters else { return };
        match symptom {
            Symptom::NoDescriptor => counters.count_stale(Cause::FdExhausted, &state.ledger.path(node)),
            Symptom::DoesNotOpen => self.diagnose_stale_handle(state, request, counters, node),
            Symptom::None => {}
        }
    }

    /// A file handle does not open: finds out whether the file is gone, or only the handle is stale.
    fn diagnose_stale_handle(&self, state: &mut State, request: RequestContext, counters: &Counters, node: Slot) {
        let mut suspects = vec![node];
        for _ in 0..MAX_NAMES * MAX_NAMES {
            let Some(node) = suspects.pop() else { return };
            let (named, unopened) = self.probe_names(state, request, node);
            // It may be the directory that is gone.
            suspects.extend(unopened);
            // A node without a name was counted when its names went.
            if named {
                counters.count_stale(Cause::HandleStale, &state.ledger.path(node));
            }
        }
    }

    /// True if a name by which the guest holds the node still leads to it. Names that do not are counted and dropped.
    pub(super) fn has_name(&self, state: &mut State, request: RequestContext, node: Slot) -> bool {
        self.probe_names(state, request, node).0
    }

    /// Looks the names of a node up, and counts and drops those that lead elsewhere. Returns whether one leads to it, and
    /// the directories that did not open.
    fn probe_names(&self, state: &mut State, request: RequestContext, node: Slot) -> (bool, Vec<Slot>) {
        let (mut named, mut unopened) = (false, Vec::new());
        for (parent, name) in state.ledger.names(node).into_iter().take(MAX_NAMES) {
            match self.probe_name(state, (parent, &name), node) {
                NameProbe::Stale(cause) => self.drop_stale_name(state, request, (parent, &name), node, cause),
                NameProbe::Same => named = true,
                NameProbe::ParentDoesNotOpen => unopened.push(parent),
                NameProbe::Unknown => {}
            }
        }
        (named, unopened)
    }

    fn probe_name(&self, state: &State, (parent, name): NameBelow<'_>, node: Slot) -> NameProbe {
        let (Some(above), Ok(name)) = (state.nodes.inode_of(parent), component(name)) else {
            return NameProbe::Unknown;
        };
        match self.library.lookup(engine_context(), above.into(), &name) {
            Ok(entry) => {
                self.library.forget(engine_context(), entry.inode.into(), 1);
                let same = state.nodes.slot_of(entry.inode) == Some(node);
                if same { NameProbe::Same } else { NameProbe::Stale(Cause::SourceReplaced) }
            }
            Err(gone) if errno(&gone) == libc::ESTALE => NameProbe::ParentDoesNotOpen,
            Err(gone) if is_missing(&gone) => NameProbe::Stale(Cause::SourceRemoved),
            Err(_) => NameProbe::Unknown,
        }
    }

    /// The guest has opened a node without a lookup: has the audit check its names soon.
    pub(super) fn queue_check(&self, state: &mut State, node: Slot) {
        if self.counters.is_some() && state.to_check.push(node) {
            self.shared.wake_audit.notify_one();
        }
    }
}

/// Counts a stale name, unless the guest received it under another root directory, or the root itself is gone: the
/// broker sees that and counts it once for all names.
pub(super) fn count_stale<F: FileSystem>(
    library: &F,
    counters: &Counters,
    state: &State,
    (parent, name): NameBelow<'_>,
    node: Slot,
    cause: Cause,
) {
    let same_root = belongs_below(state.ledger.identity(parent), name, state.ledger.identity(node));
    if same_root && !is_root_removed(library) {
        counters.count_stale(cause, &state.ledger.path_of(parent, name));
    }
}

fn is_root_removed<F: FileSystem>(library: &F) -> bool {
    library.getattr(engine_context(), LIBRARY_ROOT.into(), None).is_ok_and(|(attr, _)| attr.nlink == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_numbers_map_to_symptoms() {
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
