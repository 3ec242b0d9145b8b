//! Atomic changes of the ledger: all or nothing, whenever the process is killed.
//!
//! A change is a list of words and their new values. It is written to the redo record, made valid by its count, applied,
//! and made void again. An engine that finds a valid record applies it again: values are absolute, so this is idempotent.

use smallvec::SmallVec;

use super::layout::{REDO, REDO_PAIRS};
use super::words::Words;

/// A change that is being put together. Reads see its own stores.
pub(super) struct Change<'a> {
    words: &'a Words,
    stored: Stored,
    /// On the stack for all but the largest changes: most requests make one, many only read.
    stores: SmallVec<[(u32, u64); 64]>,
}

/// Words that a change may have stored: a bit for each remainder of their numbers. Most reads are of other words, and need
/// not go through all stores.
#[derive(Default)]
struct Stored([u64; 4]);

impl Stored {
    fn place(at: u32) -> (usize, u64) {
        ((at / 64 % 4) as usize, 1 << (at % 64))
    }

    fn may_contain(&self, at: u32) -> bool {
        let (word, bit) = Stored::place(at);
        self.0[word] & bit != 0
    }

    fn insert(&mut self, at: u32) {
        let (word, bit) = Stored::place(at);
        self.0[word] |= bit;
    }
}

impl<'a> Change<'a> {
    pub(super) fn new(words: &'a Words) -> Self {
        Change { words, stored: Stored::default(), stores: SmallVec::new() }
    }

    /// A change of other words, to be made before this one.
    pub(super) fn another(&self) -> Change<'a> {
        Change::new(self.words)
    }

    pub(super) fn get(&self, at: u32) -> u64 {
        if self.stored.may_contain(at)
            && let Some((_, value)) = self.stores.iter().find(|(word, _)| *word == at)
        {
            return *value;
        }
        self.words.get(at)
    }

    /// The word without this change.
    pub(super) fn committed(&self, at: u32) -> u64 {
        self.words.get(at)
    }

    pub(super) fn set(&mut self, at: u32, value: u64) {
        if self.stored.may_contain(at)
            && let Some((_, old)) = self.stores.iter_mut().find(|(word, _)| *word == at)
        {
            *old = value;
            return;
        }
        self.stored.insert(at);
        self.stores.push((at, value));
    }

    pub(super) fn add(&mut self, at: u32, amount: u64) {
        self.set(at, self.get(at).saturating_add(amount));
    }

    pub(super) fn subtract(&mut self, at: u32, amount: u64) {
        self.set(at, self.get(at).saturating_sub(amount));
    }

    pub(super) fn high(&self, at: u32) -> u32 {
        (self.get(at) >> 32) as u32
    }

    pub(super) fn low(&self, at: u32) -> u32 {
        self.get(at) as u32
    }

    pub(super) fn set_high(&mut self, at: u32, value: u32) {
        self.set(at, pair(value, self.low(at)));
    }

    pub(super) fn set_low(&mut self, at: u32, value: u32) {
        self.set(at, pair(self.high(at), value));
    }

    /// Entry `index` of a table of half words that begins at word `table`.
    pub(super) fn half(&self, table: u32, index: u32) -> u32 {
        let word = self.get(table + index / 2);
        if index.is_multiple_of(2) { word as u32 } else { (word >> 32) as u32 }
    }

    pub(super) fn set_half(&mut self, table: u32, index: u32, value: u32) {
        let at = table + index / 2;
        if index.is_multiple_of(2) { self.set_low(at, value) } else { self.set_high(at, value) }
    }

    /// True if there is room for `more` stores.
    pub(super) fn has_room(&self, more: usize) -> bool {
        self.stores.len() + more <= REDO_PAIRS
    }

    /// Makes the change.
    pub(super) fn commit(&self) {
        debug_assert!(self.stores.len() <= REDO_PAIRS);
        match self.stores.as_slice() {
            [] => {}
            // The store of one word is atomic.
            [(at, value)] => self.words.set(*at, *value),
            stores => {
                for (pair, (at, value)) in (0u32..).zip(stores) {
                    self.words.set(REDO + 1 + 2 * pair, u64::from(*at));
                    self.words.set(REDO + 2 + 2 * pair, *value);
                }
                self.words.set(REDO, stores.len() as u64);
                apply_redo(self.words);
            }
        }
    }
}

/// A word of two halves.
pub(super) fn pair(high: u32, low: u32) -> u64 {
    (u64::from(high) << 32) | u64::from(low)
}

/// Applies the redo record, if it is valid, and makes it void.
pub(super) fn apply_redo(words: &Words) {
    let count = words.get(REDO);
    if count == 0 {
        return;
    }
    for pair in 0..count.min(REDO_PAIRS as u64) as u32 {
        let at = words.get(REDO + 1 + 2 * pair);
        // A damaged record must not reach itself, or anything outside.
        if let Ok(at) = u32::try_from(at)
            && !(REDO..REDO + 1 + 2 * REDO_PAIRS as u32).contains(&at)
        {
            words.set(at, words.get(REDO + 2 + 2 * pair));
        }
    }
    words.set(REDO, 0);
}
