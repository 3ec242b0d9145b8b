//! Which slots of a table are free: known to this engine alone, found again by looking.

use super::change::Change;

/// Is there a slot that nobody has used yet?
pub(super) fn has_unused(change: &Change<'_>, high_water: u32, capacity: u32) -> bool {
    (change.get(high_water) as u32) < capacity
}

/// The first slot that nobody has used yet.
pub(super) fn next_unused(change: &mut Change<'_>, high_water: u32, capacity: u32) -> Option<u32> {
    let slot = change.get(high_water) as u32;
    has_unused(change, high_water, capacity).then(|| {
        change.set(high_water, u64::from(slot) + 1);
        slot
    })
}

/// Slots of a table that this engine knows to be free, and those of earlier engines that it has yet to look at.
#[derive(Default)]
pub(super) struct FreeList {
    pub(super) free: Vec<u32>,
    next: u32,
    end: u32,
}

impl FreeList {
    pub(super) fn behind(first: u32, high_water: u32) -> Self {
        FreeList { free: Vec::new(), next: first, end: high_water }
    }

    pub(super) fn look(&mut self) -> Option<u32> {
        (self.next < self.end).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Are there slots that are yet to be looked at?
    pub(super) fn is_behind(&self) -> bool {
        self.next < self.end
    }

    /// The slot is free for good. One that is yet to be looked at will be found then.
    pub(super) fn give_back(&mut self, slot: u32) {
        if !(self.next..self.end).contains(&slot) {
            self.free.push(slot);
        }
    }
}
