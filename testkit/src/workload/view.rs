//! What a lane's guest holds, as its kernel would: names it has looked up (dentries) and the nodes they
//! lead to, with references. A node that no name leads to any more and that is not open is evicted
//! at once (`generic_delete_inode`), so that nothing is asked of it which no guest could ask.

use std::collections::{BTreeMap, HashMap};

use crate::fuse::wire::{EntryOut, ForgetOne};
use crate::model::{Id, Name};

use super::report::{Fault, Kind};

#[derive(Debug, Clone, Copy)]
struct Held {
    node: u64,
    generation: u64,
    lookups: u64,
}

/// Names and node ids by model node, and node ids back to it.
#[derive(Debug, Default)]
pub(super) struct View {
    dentries: BTreeMap<(Id, Name), Id>,
    aliases: HashMap<Id, usize>,
    held: HashMap<Id, Held>,
    owners: HashMap<u64, Id>,
    deleted: Vec<ForgetOne>,
}

impl View {
    /// The node id under which the guest knows a node.
    pub(super) fn node(&self, id: Id) -> Option<u64> {
        self.held.get(&id).map(|held| held.node)
    }

    /// The node id a name leads to, if the guest has looked it up.
    pub(super) fn find(&self, parent: Id, name: &Name) -> Option<u64> {
        let id = self.dentries.get(&(parent, name.clone()))?;
        self.node(*id)
    }

    /// A name leads to a node from now on.
    pub(super) fn enter(&mut self, parent: Id, name: &Name, id: Id) {
        self.leave(parent, name);
        self.dentries.insert((parent, name.clone()), id);
        *self.aliases.entry(id).or_default() += 1;
    }

    /// A name leads nowhere any more, or is dropped from the cache; where it led.
    pub(super) fn leave(&mut self, parent: Id, name: &Name) -> Option<Id> {
        let id = self.dentries.remove(&(parent, name.clone()))?;
        if let Some(count) = self.aliases.get_mut(&id) {
            *count -= 1;
        }
        Some(id)
    }

    /// Whether some name leads to the node.
    pub(super) fn has_name(&self, id: Id) -> bool {
        self.aliases.get(&id).is_some_and(|count| *count > 0)
    }

    /// All names that were looked up: parent, name, node.
    pub(super) fn names(&self) -> impl Iterator<Item = (Id, &Name, Id)> {
        self.dentries.iter().map(|((parent, name), id)| (*parent, name, *id))
    }

    /// The server named a node: one more reference, and the id must be the right one. A node that
    /// is held keeps its id; no id stands for two files.
    pub(super) fn learn(&mut self, id: Id, entry: &EntryOut) -> Result<(), Fault> {
        let node = entry.nodeid;
        if node == 0 {
            let what = format!("a negative entry for {id:?}, which exists");
            return Err(Fault::new(Kind::UnexpectedError, what));
        }
        if let Some(owner) = self.owners.get(&node).filter(|owner| **owner != id) {
            let what = format!("node {node:#x} stands for {owner:?} and for {id:?}");
            return Err(Fault::new(Kind::WrongNode, what));
        }
        match self.held.get_mut(&id) {
            Some(held) if (held.node, held.generation) == (node, entry.generation) => {
                held.lookups += 1;
                Ok(())
            }
            Some(held) => {
                let what = format!("{id:?} was node {:#x}, is now {node:#x}", held.node);
                self.deleted.push(ForgetOne { nodeid: node, nlookup: 1 });
                Err(Fault::new(Kind::WrongNode, what))
            }
            None => {
                self.owners.insert(node, id);
                let generation = entry.generation;
                self.held.insert(id, Held { node, generation, lookups: 1 });
                Ok(())
            }
        }
    }

    /// A reference to a node the model does not know.
    pub(super) fn disown(&mut self, node: u64) {
        if node != 0 {
            self.deleted.push(ForgetOne { nodeid: node, nlookup: 1 });
        }
    }

    /// The node was evicted; its references are given back some time later.
    pub(super) fn remove_dead(&mut self, id: Id) {
        if let Some(held) = self.held.remove(&id) {
            self.deleted.push(ForgetOne { nodeid: held.node, nlookup: held.lookups });
        }
    }

    /// Gives up one node; what to send.
    pub(super) fn forget(&mut self, id: Id) -> Option<ForgetOne> {
        let held = self.held.remove(&id)?;
        self.owners.remove(&held.node);
        Some(ForgetOne { nodeid: held.node, nlookup: held.lookups })
    }

    /// Gives up what was evicted; what to send.
    pub(super) fn forget_deleted(&mut self) -> Vec<ForgetOne> {
        for one in &self.deleted {
            // The node may have been looked up again since, or belong to another by mistake.
            if self.owners.get(&one.nodeid).is_some_and(|id| !self.held.contains_key(id)) {
                self.owners.remove(&one.nodeid);
            }
        }
        std::mem::take(&mut self.deleted)
    }

    /// Number of evicted nodes that are not given back yet.
    pub(super) fn deleted(&self) -> usize {
        self.deleted.len()
    }
}
