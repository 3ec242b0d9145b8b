//! The audit: what the guest holds, looked through in the background, name by name.
//!
//! A guest that caches a name sends no lookup, so nobody would notice that it has become stale. Two things are looked
//! at here: nodes that the guest has just opened by a cached name (within a second), and all others in turn (a *walk*).
//!
//! The guest never waits for it. A question is put together under the lock that requests take, asked of the host
//! without it, and the answer is used under it again, if the guest has changed no name meanwhile. The thread sleeps
//! between slices of bounded size.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustc_hash::FxHashSet;
use virtiofs_contract::counters::Counters;
use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::FileSystem;

use crate::ledger::{Identity, ROOT, Slot};

use super::orphans::park_removed;
use super::resolve::{belongs_below, component, identity, names_nothing};
use super::staleness::count_name;
use super::state::State;
use super::{Core, errno, ourselves};

/// How often names are looked at, and how many at a time: a thousand lookups a second in a walk, and four times as
/// many for what has just been opened. A lookup is some five system calls and as many microseconds.
const SLICE: Duration = Duration::from_millis(100);
const LOOKUPS_PER_SLICE: u32 = 100;
const CHECKS_PER_SLICE: usize = 400;

/// A walk begins no earlier than this after the one before began.
const WALK_EVERY: Duration = Duration::from_secs(10);

/// How long opened nodes are collected before they are checked: a program opens many at once.
const COLLECT: Duration = Duration::from_millis(500);

/// Most nodes that wait for their check. The walk finds what does not fit.
const MOST_TO_CHECK: usize = 16384;

/// Most names of a node that are looked at, and deepest path below the nearest directory that this engine has used.
const MOST_NAMES: usize = 64;
const MOST_DEPTH: usize = 256;

/// Slots looked at in search of one that is held, under the lock.
const SLOTS_PER_LOOK: u32 = 256;

/// Nodes that are to be looked at soon, each once.
#[derive(Debug, Default)]
pub(super) struct ToCheck {
    queue: VecDeque<Slot>,
    waiting: FxHashSet<Slot>,
}

impl ToCheck {
    /// Adds a node. True: it is the first, and somebody must be told.
    pub(super) fn add(&mut self, slot: Slot) -> bool {
        if self.queue.len() < MOST_TO_CHECK && self.waiting.insert(slot) {
            self.queue.push_back(slot);
        }
        self.queue.len() == 1
    }

    fn take(&mut self) -> Option<Slot> {
        let slot = self.queue.pop_front()?;
        self.waiting.remove(&slot);
        Some(slot)
    }
}

/// What the audit does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Look at a slice of names.
    Slice,
    /// Wait, at most so long.
    Wait(Duration),
}

/// When to look, and when to rest. Times are counted from the engine's start.
#[derive(Debug, Default)]
struct Pace {
    /// Where the walk is; none: it has come to its end.
    cursor: Option<Slot>,
    walk_began: Duration,
    last_slice: Duration,
}

impl Pace {
    /// `checks`: does a node wait for its check?
    fn next(&mut self, now: Duration, checks: bool) -> Next {
        if self.cursor.is_none() && now >= self.walk_began + WALK_EVERY {
            self.cursor = Some(ROOT);
            self.walk_began = now;
        }
        let due = match self.cursor {
            Some(_) => self.last_slice + SLICE,
            None if checks => self.last_slice + COLLECT,
            None => self.walk_began + WALK_EVERY,
        };
        if now >= due {
            self.last_slice = now;
            return Next::Slice;
        }
        Next::Wait(due - now)
    }
}

/// A name of a node, and all that must be known to look at it without the lock.
#[derive(Debug)]
struct Question {
    slot: Slot,
    /// The guest's id of the node: the slot might mean another one by the time of the answer.
    id: u64,
    /// [`State::changes`] when it was put.
    changes: u64,
    parent: Slot,
    name: Vec<u8>,
    expected: Expected,
    way: Way,
}

/// How to come to a directory.
#[derive(Debug)]
struct Way {
    /// Where to begin: a directory that the library knows, and what it is known by.
    start: (u64, Identity),
    /// Names to follow from there, with what each is known by.
    steps: Vec<(Vec<u8>, Identity)>,
}

/// What the name ought to lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// An inode of the library's, which is the truth.
    Inode(u64),
    /// What is known by this: the engine has not used the node yet.
    Known(Identity),
}

/// What was found instead of what was expected; none where nothing is wrong, or nothing could be told.
type Found = Option<Cause>;

/// Looks through what the guest holds.
pub(crate) struct Audit<F: FileSystem> {
    inner: Arc<F>,
    core: Arc<Core>,
    counters: Arc<Counters>,
}

impl<F: FileSystem> Audit<F> {
    pub(super) fn new(inner: Arc<F>, core: Arc<Core>, counters: Arc<Counters>) -> Self {
        Audit { inner, core, counters }
    }
}

impl<F: FileSystem + Send + Sync + 'static> Audit<F> {
    /// Begins, on a thread of its own that ends with the process.
    pub(crate) fn start(self) -> io::Result<()> {
        thread::Builder::new().name("audit".into()).spawn(move || self.run()).map(drop)
    }

    fn run(&self) {
        let (began, mut pace) = (Instant::now(), Pace::default());
        loop {
            let state = self.core.lock();
            let next = match state.may_be_audited() {
                true => pace.next(began.elapsed(), !state.to_check.queue.is_empty()),
                false => Next::Wait(WALK_EVERY),
            };
            match next {
                Next::Slice => {
                    drop(state);
                    self.slice(&mut pace);
                }
                Next::Wait(longest) => drop(self.core.wake.wait_timeout(state, longest)),
            }
        }
    }

    fn slice(&self, pace: &mut Pace) {
        let mut seen = FxHashSet::default();
        for _ in 0..CHECKS_PER_SLICE {
            let Some(slot) = self.core.lock().to_check.take() else { break };
            self.examine_upwards(slot, &mut seen);
        }
        let mut lookups = 0;
        while let Some(from) = pace.cursor.filter(|_| lookups < LOOKUPS_PER_SLICE) {
            let (held, next) = self.core.lock().ledger.next_held(from, SLOTS_PER_LOOK);
            pace.cursor = next;
            // Stepping over slots that are not held takes time under the lock as well.
            lookups += 1 + held.map_or(0, |slot| self.examine(slot).lookups);
        }
    }

    /// A node that was opened, and the directories above it: any of them may lead elsewhere by now.
    fn examine_upwards(&self, slot: Slot, seen: &mut FxHashSet<Slot>) {
        let mut at = Some(slot);
        while let Some(slot) = at.filter(|slot| *slot != ROOT && seen.insert(*slot)) {
            at = self.examine(slot).parent;
        }
    }

    fn examine(&self, slot: Slot) -> Examined {
        let questions = self.core.lock().questions(slot);
        let mut examined = Examined { lookups: 0, parent: questions.first().map(|question| question.parent) };
        for question in questions {
            examined.lookups += 1 + question.way.steps.len() as u32;
            if let Some(cause) = self.ask(&question) {
                self.use_answer(&question, cause);
            }
        }
        examined
    }

    /// Asks the host, without a lock.
    fn ask(&self, question: &Question) -> Found {
        let mut taken = Vec::new();
        let found = self.follow(question, &mut taken);
        for inode in taken {
            self.inner.forget(ourselves(), inode.into(), 1);
        }
        found
    }

    fn follow(&self, question: &Question, taken: &mut Vec<u64>) -> Found {
        let (mut at, mut known) = question.way.start;
        for (name, expected) in &question.way.steps {
            let entry = self.inner.lookup(ourselves(), at.into(), &component(name).ok()?).ok()?;
            taken.push(entry.inode);
            if identity(known, &entry) != *expected {
                // It is the directory's own name that leads elsewhere: that is another question.
                return None;
            }
            (at, known) = (entry.inode, *expected);
        }
        match self.inner.lookup(ourselves(), at.into(), &component(&question.name).ok()?) {
            Ok(entry) => {
                taken.push(entry.inode);
                let same = match question.expected {
                    Expected::Inode(inode) => entry.inode == inode,
                    Expected::Known(expected) => identity(known, &entry) == expected,
                };
                (!same).then_some(Cause::SourceReplaced)
            }
            // Not where the directory does not open by its file handle: that says nothing of the name.
            Err(gone) if errno(&gone) != libc::ESTALE && names_nothing(&gone) => Some(Cause::SourceRemoved),
            Err(_) => None,
        }
    }

    /// Counts what was found, if the guest has changed nothing since it was asked for; else it is asked once more.
    fn use_answer(&self, question: &Question, cause: Cause) {
        let mut state = self.core.lock();
        let name = (question.parent, question.name.as_slice());
        let held = state.ledger.slot(question.id) == Some(question.slot)
            && state.ledger.find(name.0, name.1) == Some(question.slot);
        if !held || !state.may_be_audited() {
            return;
        }
        if state.changes != question.changes {
            state.to_check.add(question.slot);
            return;
        }
        count_name(self.inner.as_ref(), &self.counters, &state, name, question.slot, cause);
        park_removed(&*self.inner, &mut state, question.slot);
        state.ledger.remove(name.0, name.1);
    }
}

/// What looking at a node took, and a node above it.
struct Examined {
    lookups: u32,
    parent: Option<Slot>,
}

impl State {
    /// Is the ledger this engine's, and does it say of every name what the guest has done to it?
    fn may_be_audited(&self) -> bool {
        !self.resting && !self.unsettled.contains(&true)
    }

    /// What there is to ask about the names of a node.
    fn questions(&self, slot: Slot) -> Vec<Question> {
        let id = self.ledger.id(slot);
        if self.ledger.slot(id) != Some(slot) {
            return Vec::new();
        }
        let expected = match self.bindings.inode_of(slot) {
            Some(inode) => Expected::Inode(inode),
            None => Expected::Known(self.ledger.identity(slot)),
        };
        let names = self.ledger.names(slot).into_iter().take(MOST_NAMES);
        names
            .filter_map(|(parent, name)| {
                let way = self.way_to(parent)?;
                let belongs = belongs_below(self.ledger.identity(parent), self.ledger.identity(slot));
                let changes = self.changes;
                belongs.then_some(Question { slot, id, changes, parent, name, expected, way })
            })
            .collect()
    }

    /// From the nearest directory that the library knows to this one; none: it is of another root, or out of reach.
    fn way_to(&self, directory: Slot) -> Option<Way> {
        let (mut at, mut steps) = (directory, Vec::new());
        while steps.len() < MOST_DEPTH {
            let known = self.ledger.identity(at);
            if let Some(inode) = self.bindings.inode_of(at) {
                steps.reverse();
                return Some(Way { start: (inode, known), steps });
            }
            let (above, name) = self.ledger.names(at).into_iter().next()?;
            if !belongs_below(self.ledger.identity(above), known) {
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
    fn a_walk_goes_on_in_slices_and_rests_at_its_end() {
        let mut pace = Pace::default();
        assert_eq!(pace.next(seconds(1), false), Next::Wait(seconds(9)), "an engine that has just begun");
        assert_eq!(pace.next(seconds(10), false), Next::Slice);
        pace.cursor = Some(500);
        assert_eq!(pace.next(seconds(10), false), Next::Wait(SLICE));
        assert_eq!(pace.next(seconds(10) + SLICE, false), Next::Slice);
        pace.cursor = None;
        assert_eq!(pace.next(seconds(11), false), Next::Wait(seconds(9)));
        assert_eq!(pace.next(seconds(20), false), Next::Slice);
        // One that took longer than the pause between two begins again at once.
        pace.cursor = None;
        assert_eq!(pace.next(seconds(50), false), Next::Slice);
        assert_eq!(pace.cursor, Some(ROOT));
    }

    #[test]
    fn what_was_opened_is_looked_at_soon_but_together() {
        let mut pace = Pace { walk_began: seconds(10), last_slice: seconds(10), cursor: None };
        assert_eq!(pace.next(seconds(11), true), Next::Slice);
        assert_eq!(pace.next(seconds(11), true), Next::Wait(COLLECT));
        assert_eq!(pace.next(seconds(11) + COLLECT, true), Next::Slice);
        pace.cursor = Some(7);
        assert_eq!(pace.next(seconds(12), true), Next::Slice, "in the course of a walk, with its slices");
        assert_eq!(pace.next(seconds(12), true), Next::Wait(SLICE));
    }

    #[test]
    fn a_node_waits_once_for_its_check_and_not_all_find_room() {
        let mut waiting = ToCheck::default();
        assert!(waiting.add(5), "the first is to be told");
        assert!(!waiting.add(6));
        waiting.add(5);
        assert_eq!([waiting.take(), waiting.take(), waiting.take()], [Some(5), Some(6), None]);
        for slot in 0..2 * MOST_TO_CHECK as u32 {
            waiting.add(slot);
        }
        assert_eq!((waiting.queue.len(), waiting.waiting.len()), (MOST_TO_CHECK, MOST_TO_CHECK));
    }
}
