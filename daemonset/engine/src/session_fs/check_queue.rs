//! Nodes whose names the audit is to check soon, and whether an observation of names is still current.

use std::collections::VecDeque;

use rustc_hash::FxHashSet;

use crate::ledger::Slot;

/// Most nodes that wait for their check. The walk of the audit finds those for which there is no room.
const MAX_QUEUED: usize = 16384;

/// Nodes that are to be checked soon, each at most once.
#[derive(Debug, Default)]
pub(super) struct CheckQueue {
    queue: VecDeque<Slot>,
    queued: FxHashSet<Slot>,
}

impl CheckQueue {
    /// Queues a node. True if it is the only one in the queue, so that the audit must be woken.
    pub(super) fn push(&mut self, slot: Slot) -> bool {
        if self.queue.len() < MAX_QUEUED && self.queued.insert(slot) {
            self.queue.push_back(slot);
        }
        self.queue.len() == 1
    }

    /// Takes the node that has waited longest.
    pub(super) fn pop(&mut self) -> Option<Slot> {
        let slot = self.queue.pop_front()?;
        self.queued.remove(&slot);
        Some(slot)
    }

    /// True if no node waits.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

/// Counts the changes of names that the guest itself makes: what was observed before a change says nothing after it.
#[derive(Debug, Default)]
pub(super) struct NameChanges(u64);

impl NameChanges {
    /// The guest changes a name.
    pub(super) fn count(&mut self) {
        self.0 += 1;
    }

    /// The number of changes so far, to compare with a later one.
    pub(super) fn so_far(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_queued_once() {
        let mut queue = CheckQueue::default();
        assert!(queue.push(5), "the audit must be woken for the first one");
        assert!(!queue.push(6));
        queue.push(5);
        assert_eq!([queue.pop(), queue.pop(), queue.pop()], [Some(5), Some(6), None]);
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut queue = CheckQueue::default();
        for slot in 0..2 * MAX_QUEUED as u32 {
            queue.push(slot);
        }
        assert_eq!((queue.queue.len(), queue.queued.len()), (MAX_QUEUED, MAX_QUEUED));
    }
}
