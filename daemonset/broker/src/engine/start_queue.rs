//! Starts of engines: bounded in parallel, and fair.
//!
//! Every consumer has a queue of its own, and the queues take turns. So one that connects and disconnects in a loop does not
//! delay the VMs of others. A start whose session has ended is dropped.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::persistent::PersistentState;

/// Time after which a start no longer counts among the parallel ones: its source hangs, and others must not wait for it.
const SLOW: Duration = Duration::from_secs(1);

/// Most starts of one consumer, hung ones included. Those of sessions that have ended remain until the source responds.
const MAX_HUNG: usize = 256;

/// A start that waits.
struct Task {
    persistent: Arc<PersistentState>,
    begun: Arc<OnceLock<Instant>>,
    work: Box<dyn FnOnce() + Send>,
}

/// A start that runs.
#[derive(Debug)]
struct Running {
    number: u64,
    payer: String,
    since: Instant,
}

/// Most starts at a time.
#[derive(Clone, Copy, Debug)]
struct Limits {
    total: usize,
    /// Of one consumer. Starts cost processor time, so one consumer gets half of the processors.
    payer: usize,
}

#[derive(Default)]
struct State {
    waiting: BTreeMap<String, VecDeque<Task>>,
    running: Vec<Running>,
    /// Whose turn it was last.
    last: String,
    next_number: u64,
}

/// The starts of all sessions.
pub(crate) struct StartQueue {
    state: Mutex<State>,
    changed: Condvar,
    limits: Limits,
}

impl std::fmt::Debug for StartQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StartQueue").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl StartQueue {
    /// Starts the thread that takes from the queues.
    pub(crate) fn start() -> std::io::Result<Arc<Self>> {
        let processors = thread::available_parallelism().map_or(2, usize::from);
        let limits = Limits { total: processors.max(2), payer: (processors / 2).max(1) };
        let queue = Arc::new(StartQueue { state: Mutex::default(), changed: Condvar::new(), limits });
        let dispatching = queue.clone();
        thread::Builder::new().name("start-queue".into()).spawn(move || dispatching.dispatch())?;
        Ok(queue)
    }

    /// Adds a start. `urgent`: a guest waits for it, so it comes before other starts of its consumer. `begun` is set when it
    /// begins.
    pub(crate) fn add(
        &self,
        payer: &str,
        urgent: bool,
        persistent: Arc<PersistentState>,
        begun: Arc<OnceLock<Instant>>,
        work: impl FnOnce() + Send + 'static,
    ) {
        let task = Task { persistent, begun, work: Box::new(work) };
        let mut state = self.state();
        let queue = state.waiting.entry(payer.to_owned()).or_default();
        if urgent {
            queue.push_front(task);
        } else {
            queue.push_back(task);
        }
        self.changed.notify_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dispatch(self: &Arc<Self>) {
        let mut state = self.state();
        loop {
            while let Some((task, number)) = state.next(self.limits, Instant::now()) {
                drop(state);
                self.run(task, number);
                state = self.state();
            }
            // A start that becomes slow makes room without a notification.
            let waits = !state.waiting.is_empty();
            state = if waits {
                self.changed.wait_timeout(state, SLOW / 10).unwrap_or_else(PoisonError::into_inner).0
            } else {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            };
        }
    }

    fn run(self: &Arc<Self>, task: Task, number: u64) {
        let queue = self.clone();
        let Task { work, begun, .. } = task;
        let run = move || {
            begun.get_or_init(Instant::now);
            work();
            queue.ended(number);
        };
        if let Err(error) = thread::Builder::new().name("engine-start".into()).spawn(run) {
            // The session sees that its start is overdue, and tries again.
            tracing::error!(%error, "no thread to start an engine");
            self.ended(number);
        }
    }

    fn ended(&self, number: u64) {
        self.state().running.retain(|running| running.number != number);
        self.changed.notify_one();
    }
}

impl State {
    /// Takes the next start: of the first consumer after the last one that has room.
    fn next(&mut self, limits: Limits, now: Instant) -> Option<(Task, u64)> {
        for queue in self.waiting.values_mut() {
            queue.retain(|task| !task.persistent.kill_switch.is_thrown());
        }
        self.waiting.retain(|_, queue| !queue.is_empty());
        let quick = |it: &&Running| now.saturating_duration_since(it.since) < SLOW;
        if self.running.iter().filter(quick).count() >= limits.total {
            return None;
        }
        let turn = |payer: &&String| {
            let of_payer: Vec<_> = self.running.iter().filter(|it| it.payer == **payer).collect();
            of_payer.len() < MAX_HUNG && of_payer.iter().filter(|it| quick(it)).count() < limits.payer
        };
        let after = self.waiting.keys().filter(|payer| **payer > self.last).find(turn);
        let payer = after.or_else(|| self.waiting.keys().find(turn))?.clone();
        let task = self.waiting.get_mut(&payer)?.pop_front()?;
        let number = self.next_number;
        self.next_number += 1;
        self.running.push(Running { number, payer: payer.clone(), since: now });
        self.last = payer;
        Some((task, number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { total: 2, payer: 1 };

    fn nobody() -> crate::holder::Hold {
        crate::holder::Holder::default().group(crate::holder::names::Group::Session(1))
    }

    fn state(waiting: &[(&str, usize)]) -> State {
        let task = || Task {
            persistent: Arc::new(PersistentState::new(1, nobody()).unwrap()),
            begun: Arc::default(),
            work: Box::new(|| ()),
        };
        let queue = |(payer, count): &(&str, usize)| ((*payer).to_owned(), (0..*count).map(|_| task()).collect());
        State { waiting: waiting.iter().map(queue).collect(), ..State::default() }
    }

    /// The consumers of the starts that begin one after another, each ending before the next.
    fn order(state: &mut State, count: usize) -> Vec<String> {
        let one = |_| {
            let (_, number) = state.next(LIMITS, Instant::now())?;
            let payer = state.running.iter().find(|it| it.number == number)?.payer.clone();
            state.running.clear();
            Some(payer)
        };
        (0..count).filter_map(one).collect()
    }

    #[test]
    fn consumers_take_turns() {
        let mut state = state(&[("evil", 100), ("good", 2), ("other", 1)]);
        assert_eq!(order(&mut state, 6), ["evil", "good", "other", "evil", "good", "evil"]);
    }

    #[test]
    fn starts_are_bounded_in_all_and_for_each_consumer() {
        let now = Instant::now();
        let mut state = state(&[("a", 5), ("b", 5), ("c", 5)]);
        assert!(state.next(LIMITS, now).is_some() && state.next(LIMITS, now).is_some());
        assert!(state.next(LIMITS, now).is_none());
        assert_eq!(state.running.iter().map(|it| it.payer.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        // Hung sources do not stop the starts of others.
        let later = now + 2 * SLOW;
        assert!(state.next(LIMITS, later).is_some() && state.next(LIMITS, later).is_some());
        assert_eq!((state.running[2].payer.as_str(), state.running[3].payer.as_str()), ("c", "a"));
        assert!(state.next(LIMITS, later).is_none());
    }

    #[test]
    fn start_of_an_ended_session_is_dropped() {
        let mut state = state(&[("a", 3)]);
        for task in state.waiting["a"].iter().take(2) {
            task.persistent.kill_switch.throw();
        }
        assert_eq!(order(&mut state, 3), ["a"]);
        assert!(state.waiting.values().all(VecDeque::is_empty));
    }
}
