//! The audit: checks all names that the guest holds, in the background.
//!
//! A guest that caches a name sends no LOOKUP, so nothing else would notice that the name has become stale. The audit
//! checks nodes that the guest has just opened without a lookup (within a second), and all others one after another
//! (a *walk*).
//!
//! The guest never waits for it. A check is put together under the lock that requests take, runs on the host without
//! it, and its result is applied under the lock if the guest has changed no name meanwhile. The thread sleeps between
//! slices of bounded size.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustc_hash::FxHashSet;
use virtiofs_contract::counters::Counters;
use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::FileSystem;

use crate::ledger::{Identity, ROOT, Slot};

use super::SharedState;
use super::errors::{engine_context, errno, is_missing};
use super::identity::{belongs_below, identity, is_made};
use super::orphan_scan::stash_if_removed;
use super::resolve::component;
use super::staleness::count_stale;
use super::state::State;

/// Pace of the audit: 1000 lookups a second in a walk, 4000 for nodes that have just been opened. A lookup is some five
/// system calls and as many microseconds.
const SLICE: Duration = Duration::from_millis(100);
const LOOKUPS_PER_SLICE: u32 = 100;
const CHECKS_PER_SLICE: usize = 400;

/// Shortest time between the beginnings of two walks.
const WALK_INTERVAL: Duration = Duration::from_secs(10);

/// How long opened nodes are collected before they are checked: a program opens many at once.
const COLLECT: Duration = Duration::from_millis(500);

/// Most names of a node that are checked, and most components of the path from the nearest directory that this engine
/// has used.
const MAX_NAMES: usize = 64;
const MAX_DEPTH: usize = 256;

/// Slots that are scanned for one that is held, under the lock.
const SLOTS_PER_SCAN: u32 = 256;

/// What the audit does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Check a slice of names.
    Slice,
    /// Wait, at most this long.
    Wait(Duration),
}

/// When the audit checks and when it sleeps. Times are counted from the engine's start.
#[derive(Debug, Default)]
struct Schedule {
    /// Where the walk is; none: it has ended.
    cursor: Option<Slot>,
    walk_began: Duration,
    last_slice: Duration,
}

impl Schedule {
    /// `queued`: a node waits for its check.
    fn next(&mut self, now: Duration, queued: bool) -> Next {
        if self.cursor.is_none() && now >= self.walk_began + WALK_INTERVAL {
            self.cursor = Some(ROOT);
            self.walk_began = now;
        }
        let due = match self.cursor {
            Some(_) => self.last_slice + SLICE,
            None if queued => self.last_slice + COLLECT,
            None => self.walk_began + WALK_INTERVAL,
        };
        if now >= due {
            self.last_slice = now;
            return Next::Slice;
        }
        Next::Wait(due - now)
    }
}

/// A name of a node, with all that is needed to check it without the lock.
#[derive(Debug)]
struct NameCheck {
    slot: Slot,
    /// The guest's id of the node: by the time of the result, the slot may hold another one.
    id: u64,
    /// Changes of names by the guest when the check was put together.
    changes: u64,
    parent: Slot,
    name: Vec<u8>,
    expected: Expected,
    route: Route,
}

/// How to reach a directory.
#[derive(Debug)]
struct Route {
    /// A directory that the library knows: its inode, and its identity.
    start: (u64, Identity),
    /// Names to follow from there, with the identities that they must lead to.
    steps: Vec<(Vec<u8>, Identity)>,
}

/// What the name must lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// A library inode, which is exact.
    Inode(u64),
    /// An identity: the engine has not used the node yet.
    Identity(Identity),
}

/// Checks what the guest holds.
pub(crate) struct Audit<F: FileSystem> {
    library: Arc<F>,
    shared: Arc<SharedState>,
    counters: Arc<Counters>,
}

impl<F: FileSystem> Audit<F> {
    pub(super) fn new(library: Arc<F>, shared: Arc<SharedState>, counters: Arc<Counters>) -> Self {
        Audit { library, shared, counters }
    }
}

impl<F: FileSystem + Send + Sync + 'static> Audit<F> {
    /// Starts the audit on a thread of its own, which ends with the process.
    pub(crate) fn start(self) -> io::Result<()> {
        thread::Builder::new().name("audit".into()).spawn(move || self.run()).map(drop)
    }

    fn run(&self) {
        let (began, mut schedule) = (Instant::now(), Schedule::default());
        loop {
            let state = self.shared.lock();
            let next = match state.takeover.may_audit() {
                true => schedule.next(began.elapsed(), !state.to_check.is_empty()),
                false => Next::Wait(WALK_INTERVAL),
            };
            match next {
                Next::Slice => {
                    drop(state);
                    self.slice(&mut schedule);
                }
                Next::Wait(longest) => drop(self.shared.wake_audit.wait_timeout(state, longest)),
            }
        }
    }

    fn slice(&self, schedule: &mut Schedule) {
        let mut seen = FxHashSet::default();
        for _ in 0..CHECKS_PER_SLICE {
            let Some(slot) = self.shared.lock().to_check.pop() else { break };
            self.check_upwards(slot, &mut seen);
        }
        let mut lookups = 0;
        while let Some(from) = schedule.cursor.filter(|_| lookups < LOOKUPS_PER_SLICE) {
            let (held, next) = self.shared.lock().ledger.next_held(from, SLOTS_PER_SCAN);
            schedule.cursor = next;
            // Skipping slots that are not held takes time under the lock as well.
            lookups += 1 + held.map_or(0, |slot| self.check_node(slot).lookups);
        }
    }

    /// Checks an opened node and the directories above it: any of them may have become stale.
    fn check_upwards(&self, slot: Slot, seen: &mut FxHashSet<Slot>) {
        let mut at = Some(slot);
        while let Some(slot) = at.filter(|slot| *slot != ROOT && seen.insert(*slot)) {
            at = self.check_node(slot).parent;
        }
    }

    fn check_node(&self, slot: Slot) -> Checked {
        let checks = self.shared.lock().name_checks(slot);
        let mut checked = Checked { lookups: 0, parent: checks.first().map(|check| check.parent) };
        for check in checks {
            checked.lookups += 1 + check.route.steps.len() as u32;
            if let Some(cause) = self.run_check(&check) {
                self.apply(&check, cause);
            }
        }
        checked
    }

    /// Looks the name up, without the lock. Returns why the name is stale; none: it is not, or nothing can be said.
    fn run_check(&self, check: &NameCheck) -> Option<Cause> {
        let mut lookups = Vec::new();
        let found = self.follow(check, &mut lookups);
        for inode in lookups {
            self.library.forget(engine_context(), inode.into(), 1);
        }
        found
    }

    fn follow(&self, check: &NameCheck, lookups: &mut Vec<u64>) -> Option<Cause> {
        let (mut at, mut known) = check.route.start;
        for (name, expected) in &check.route.steps {
            let entry = self.library.lookup(engine_context(), at.into(), &component(name).ok()?).ok()?;
            lookups.push(entry.inode);
            if identity(known, name, &entry) != *expected {
                // The directory's own name is stale: that is another check.
                return None;
            }
            (at, known) = (entry.inode, *expected);
        }
        match self.library.lookup(engine_context(), at.into(), &component(&check.name).ok()?) {
            Ok(entry) => {
                lookups.push(entry.inode);
                let same = match check.expected {
                    Expected::Inode(inode) => entry.inode == inode,
                    // Which file system it belongs to is not found out here.
                    Expected::Identity(expected) if is_made(expected) => return None,
                    Expected::Identity(expected) => identity(known, &check.name, &entry) == expected,
                };
                (!same).then_some(Cause::SourceReplaced)
            }
            // With ESTALE the directory does not open by its file handle: that says nothing about the name.
            Err(gone) if errno(&gone) != libc::ESTALE && is_missing(&gone) => Some(Cause::SourceRemoved),
            Err(_) => None,
        }
    }

    /// Counts and drops a stale name, if the guest has changed no name since the check was put together; else the node is
    /// checked again.
    fn apply(&self, check: &NameCheck, cause: Cause) {
        let mut state = self.shared.lock();
        let name = (check.parent, check.name.as_slice());
        let held =
            state.ledger.slot(check.id) == Some(check.slot) && state.ledger.find(name.0, name.1) == Some(check.slot);
        if !held || !state.takeover.may_audit() {
            return;
        }
        if state.name_changes.so_far() != check.changes {
            state.to_check.push(check.slot);
            return;
        }
        count_stale(self.library.as_ref(), &self.counters, &state, name, check.slot, cause);
        stash_if_removed(&*self.library, &mut state, check.slot);
        state.ledger.remove(name.0, name.1);
    }
}

/// What the check of a node took, and a node above it.
struct Checked {
    lookups: u32,
    parent: Option<Slot>,
}

impl State {
    /// The checks of a node's names.
    fn name_checks(&self, slot: Slot) -> Vec<NameCheck> {
        let id = self.ledger.id(slot);
        if self.ledger.slot(id) != Some(slot) {
            return Vec::new();
        }
        let expected = match self.nodes.inode_of(slot) {
            Some(inode) => Expected::Inode(inode),
            None => Expected::Identity(self.ledger.identity(slot)),
        };
        let names = self.ledger.names(slot).into_iter().take(MAX_NAMES);
        names
            .filter_map(|(parent, name)| {
                let route = self.route_to(parent)?;
                let same_root = belongs_below(self.ledger.identity(parent), &name, self.ledger.identity(slot));
                let changes = self.name_changes.so_far();
                same_root.then_some(NameCheck { slot, id, changes, parent, name, expected, route })
            })
            .collect()
    }

    /// From the nearest directory that the library knows to this one; none: it belongs to another root, or is too deep.
    fn route_to(&self, directory: Slot) -> Option<Route> {
        let (mut at, mut steps) = (directory, Vec::new());
        while steps.len() < MAX_DEPTH {
            let known = self.ledger.identity(at);
            if let Some(inode) = self.nodes.inode_of(at) {
                steps.reverse();
                return Some(Route { start: (inode, known), steps });
            }
            let (above, name) = self.ledger.names(at).into_iter().next()?;
            if !belongs_below(self.ledger.identity(above), &name, known) {
                return None;
            }
            steps.push((name, known));
            at = above;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_walk_runs_in_slices_and_pauses_at_its_end() {
        let mut schedule = Schedule::default();
        assert_eq!(schedule.next(seconds(1), false), Next::Wait(seconds(9)), "an engine that has just started");
        assert_eq!(schedule.next(seconds(10), false), Next::Slice);
        schedule.cursor = Some(500);
        assert_eq!(schedule.next(seconds(10), false), Next::Wait(SLICE));
        assert_eq!(schedule.next(seconds(10) + SLICE, false), Next::Slice);
        schedule.cursor = None;
        assert_eq!(schedule.next(seconds(11), false), Next::Wait(seconds(9)));
        assert_eq!(schedule.next(seconds(20), false), Next::Slice);
        // A walk that took longer than the interval is followed by the next one at once.
        schedule.cursor = None;
        assert_eq!(schedule.next(seconds(50), false), Next::Slice);
        assert_eq!(schedule.cursor, Some(ROOT));
    }

    #[test]
    fn opened_nodes_are_checked_soon_and_together() {
        let mut schedule = Schedule { walk_began: seconds(10), last_slice: seconds(10), cursor: None };
        assert_eq!(schedule.next(seconds(11), true), Next::Slice);
        assert_eq!(schedule.next(seconds(11), true), Next::Wait(COLLECT));
        assert_eq!(schedule.next(seconds(11) + COLLECT, true), Next::Slice);
        schedule.cursor = Some(7);
        assert_eq!(schedule.next(seconds(12), true), Next::Slice, "during a walk, with its slices");
        assert_eq!(schedule.next(seconds(12), true), Next::Wait(SLICE));
    }
}
