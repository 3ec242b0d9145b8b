//! Names: each is below a node and leads to a node.

use super::change::{Change, pair};
use super::index::Entries;
use super::layout::Geometry;
use super::nodes::Slot;
use super::{cells, words::Words};

/// Words of a cell before its bytes.
const HEAD: u32 = 3;

/// Longest name, NAME_MAX.
pub(crate) const MAX_NAME: usize = 255;

/// A name's words.
#[derive(Clone, Copy)]
pub(super) struct Name {
    at: u32,
}

/// Words that a name of this length needs.
pub(super) fn words_for(length: usize) -> u32 {
    HEAD + length.div_ceil(8) as u32
}

impl Name {
    pub(super) fn at(geometry: &Geometry, cell: u32) -> Option<Name> {
        cells::word_of(geometry, cell).map(|at| Name { at })
    }

    /// The node that it is below.
    pub(super) fn parent(self, change: &Change<'_>) -> Slot {
        change.high(self.at)
    }

    /// The node that it leads to; 0: the cell is free.
    pub(super) fn node(self, change: &Change<'_>) -> Slot {
        change.low(self.at)
    }

    fn length(self, change: &Change<'_>) -> usize {
        (change.low(self.at + 1) as usize).min(MAX_NAME)
    }

    /// The next name of the same node.
    pub(super) fn next_of_node(self, change: &Change<'_>) -> u32 {
        change.low(self.at + 2)
    }

    pub(super) fn set_next_of_node(self, change: &mut Change<'_>, cell: u32) {
        change.set_low(self.at + 2, cell);
    }

    pub(super) fn bytes(self, change: &Change<'_>, words: &Words) -> Vec<u8> {
        let mut bytes = Vec::new();
        words.get_bytes(self.at + HEAD, self.length(change), &mut bytes);
        bytes
    }

    /// True if it is `name`, which has this hash, below `parent`.
    pub(super) fn is(self, change: &Change<'_>, words: &Words, hash: u32, (parent, name): (Slot, &[u8])) -> bool {
        self.parent(change) == parent
            && self.node(change) != 0
            && change.get(self.at + 1) == pair(hash, name.len() as u32)
            && words.bytes_equal(self.at + HEAD, name)
    }

    /// Writes the bytes at once, ahead of the change: the cell is free until the change is made.
    pub(super) fn write_bytes(self, words: &Words, name: &[u8]) {
        words.set_bytes(self.at + HEAD, name);
    }

    pub(super) fn begin(self, change: &mut Change<'_>, parent: Slot, node: Slot, hash: u32, length: usize) {
        change.set(self.at, pair(parent, node));
        change.set(self.at + 1, pair(hash, length as u32));
        change.set(self.at + 2, 0);
    }

    pub(super) fn end(self, change: &mut Change<'_>) {
        change.set(self.at, 0);
    }
}

/// Names as entries of the index by parent and name.
pub(super) struct ByName {
    pub(super) geometry: Geometry,
}

impl Entries for ByName {
    fn next_word(&self, cell: u32) -> Option<u32> {
        Name::at(&self.geometry, cell).map(|name| name.at + 2)
    }

    fn hash(&self, change: &Change<'_>, cell: u32) -> u32 {
        Name::at(&self.geometry, cell).map_or(0, |name| change.high(name.at + 1))
    }
}
