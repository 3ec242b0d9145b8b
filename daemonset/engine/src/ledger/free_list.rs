//! Free slots of a table. Only this engine knows them; the next one finds them again by a scan.

use super::change::Change;

/// True if there is a slot that was never used.
pub(super) fn has_unused(change: &Change<'_>, high_water: u32, capacity: u32) -> bool {
    (change.get(high_water) as u32) < capacity
}

/// The first slot that was never used.
pub(super) fn next_unused(change: &mut Change<'_>, high_water: u32, capacity: u32) -> Option<u32> {
    let slot = change.get(high_water) as u32;
    has_unused(change, high_water, capacity).then(|| {
        change.set(high_water, u64::from(slot) + 1);
        slot
    })
}

/// Slots of a table that are known to be free, and slots of earlier engines that have not been scanned.
#[derive(Default)]
pub(super) struct FreeList {
    pub(super) free: Vec<u32>,
    next: u32,
    end: u32,
}

impl FreeList {
    pub(super) fn with_unscanned(first: u32, high_water: u32) -> Self {
        FreeList { free: Vec::new(), next: first, end: high_water }
    }

    pub(super) fn next_unscanned(&mut self) -> Option<u32> {
        (self.next < self.end).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// True if there are slots that have not been scanned.
    pub(super) fn has_unscanned(&self) -> bool {
        self.next < self.end
    }

    /// The slot is free. One that has not been scanned will be found by the scan.
    pub(super) fn release(&mut self, slot: u32) {
        if !(self.next..self.end).contains(&slot) {
            self.free.push(slot);
        }
    }
}
