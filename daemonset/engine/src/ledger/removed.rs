//! What is known of directories that the guest removed and still holds.
//!
//! It is kept where names are: below the root, as a name that no guest can choose because it begins with a zero byte. So
//! it needs no table of its own, and ends with its node.

use super::Ledger;
use super::change::{Change, pair};
use super::names::Name;
use super::nodes::{Node, ROOT, Slot};

/// Bytes before the record: a zero and the node's id, which distinguishes it from those of other nodes.
const HEAD: usize = 9;

/// True for a record instead of a name.
pub(super) fn is_record(name: &[u8]) -> bool {
    name.first() == Some(&0)
}

impl Ledger {
    /// Records a node that is about to be removed. The next engine has no other way to know of it; if there is no room, it
    /// does not know of it.
    pub(crate) fn record_removed(&mut self, slot: Slot, record: &[u8]) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let Some(node) = Node::at(&self.geometry, slot).filter(|node| node.is_used(&change)) else { return };
        let name = [&[0][..], &pair(node.generation(&change), slot).to_le_bytes(), record].concat();
        let mut freed = Vec::new();
        if let Some(known) = self.record_cell(&change, slot) {
            self.drop_name(&mut change, known, &mut freed);
        }
        if self.set_name(&mut change, ROOT, &name, slot, &mut freed).is_ok() {
            self.commit(&change, freed);
        }
    }

    /// The record of a node.
    pub(crate) fn removed(&self, slot: Slot) -> Option<Vec<u8>> {
        let change = Change::new(&self.words);
        let cell = self.record_cell(&change, slot)?;
        let mut bytes = Name::at(&self.geometry, cell)?.bytes(&change, &self.words);
        (bytes.len() > HEAD).then(|| bytes.split_off(HEAD))
    }

    /// Drops the record of a node that was not removed after all.
    pub(crate) fn forget_removed(&mut self, slot: Slot) {
        let words = self.words.clone();
        let mut change = Change::new(&words);
        let Some(cell) = self.record_cell(&change, slot) else { return };
        let mut freed = Vec::new();
        self.drop_name(&mut change, cell, &mut freed);
        self.commit(&change, freed);
    }

    fn record_cell(&self, change: &Change<'_>, slot: Slot) -> Option<u32> {
        self.name_cells(change, slot).find(|cell| {
            Name::at(&self.geometry, *cell).is_some_and(|name| is_record(&name.bytes(change, &self.words)))
        })
    }
}
