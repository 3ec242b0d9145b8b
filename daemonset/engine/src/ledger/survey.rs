//! The ledger read through from end to end, a little at a time, and in words for people.

use super::Ledger;
use super::change::Change;
use super::layout::header;
use super::names::Name;
use super::nodes::{Node, ROOT, Slot};
use super::removed::is_record;

/// Longest path that is put into words; a longer one loses its beginning.
const MOST_PATH: usize = 4096;

impl Ledger {
    /// The first slot at or after `from` whose node the guest holds.
    ///
    /// Scans at most `looks` slots. The second slot returned is the one to continue at; none at the end of the table.
    pub(crate) fn next_held(&self, from: Slot, looks: u32) -> (Option<Slot>, Option<Slot>) {
        let change = Change::new(&self.words);
        let high = (self.words.get(header::NODES_HIGH) as u32).min(self.geometry.node_capacity);
        let until = from.saturating_add(looks).min(high);
        let held = (from.max(ROOT + 1)..until).find(|slot| {
            Node::at(&self.geometry, *slot).is_some_and(|node| node.is_used(&change) && !node.is_idle(&change))
        });
        let next = held.map_or(until, |slot| slot + 1);
        (held, (next < high).then_some(next))
    }

    /// The path of `name` below `parent`, relative to the root.
    pub(crate) fn path_of(&self, parent: Slot, name: &[u8]) -> Vec<u8> {
        let mut parts = vec![name.to_vec()];
        let mut length = name.len();
        let mut at = parent;
        let change = Change::new(&self.words);
        while at != ROOT && length < MOST_PATH {
            let first = Node::at(&self.geometry, at).and_then(|node| Name::at(&self.geometry, node.names(&change)));
            let Some(first) = first.filter(|first| first.node(&change) == at) else { break };
            let part = first.bytes(&change, &self.words);
            if is_record(&part) {
                break;
            }
            // A cycle, which only a damaged ledger has, ends with the length.
            length += part.len() + 1;
            parts.push(part);
            at = first.parent(&change);
        }
        parts.reverse();
        parts.join(&b'/')
    }

    /// The path of a node by one of its names; empty: no name leads to it.
    pub(crate) fn path(&self, slot: Slot) -> Vec<u8> {
        if slot == ROOT {
            return b".".to_vec();
        }
        self.names(slot).first().map_or_else(Vec::new, |(parent, name)| self.path_of(*parent, name))
    }
}
