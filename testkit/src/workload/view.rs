//! What a lane's guest holds, as its kernel would: names that it has looked up (dentries), their nodes, and lookup
//! counts. A node without a name that is not open is evicted immediately (`generic_delete_inode`), so that the lane
//! sends no request that a kernel could not send.

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

/// Names and node ids by model node, and model nodes by node id.
#[derive(Debug, Default)]
pub(super) struct View {
    dentries: BTreeMap<(Id, Name), Id>,
    aliases: HashMap<Id, usize>,
    held: HashMap<Id, Held>,
    owners: HashMap<u64, Id>,
    deleted: Vec<ForgetOne>,
}

impl View {
    /// The node id of a model node, if the guest holds it.
    pub(super) fn node(&self, id: Id) -> Option<u64> {
        self.held.get(&id).map(|held| held.node)
    }

    /// The node id of a name, if the guest has looked it up.
    pub(super) fn find(&self, parent: Id, name: &Name) -> Option<u64> {
        let id = self.dentries.get(&(parent, name.clone()))?;
        self.node(*id)
    }

    /// Adds a name of a node.
    pub(super) fn enter(&mut self, parent: Id, name: &Name, id: Id) {
        self.leave(parent, name);
        self.dentries.insert((parent, name.clone()), id);
        *self.aliases.entry(id).or_default() += 1;
    }

    /// Removes a name that was deleted, or dropped from the cache. Returns its node.
    pub(super) fn leave(&mut self, parent: Id, name: &Name) -> Option<Id> {
        let id = self.dentries.remove(&(parent, name.clone()))?;
        if let Some(count) = self.aliases.get_mut(&id) {
            *count -= 1;
        }
        Some(id)
    }

    /// True if the node has a name.
    pub(super) fn has_name(&self, id: Id) -> bool {
        self.aliases.get(&id).is_some_and(|count| *count > 0)
    }

    /// All names that were looked up: parent, name, node.
    pub(super) fn names(&self) -> impl Iterator<Item = (Id, &Name, Id)> {
        self.dentries.iter().map(|((parent, name), id)| (*parent, name, *id))
    }

    /// Counts a lookup and checks the node id: a held node keeps its id, and no id is that of two files.
    pub(super) fn learn(&mut self, id: Id, entry: &EntryOut) -> Result<(), Fault> {
        let node = entry.nodeid;
        if node == 0 {
            let what = format!("a negative entry for {id:?}, which exists");
            return Err(Fault::new(Kind::UnexpectedError, what));
        }
        if let Some(owner) = self.owners.get(&node).filter(|owner| **owner != id) {
            let what = format!("node {node:#x} is {owner:?} and {id:?}");
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

    /// Records a lookup of a node that is not in the model.
    pub(super) fn disown(&mut self, node: u64) {
        if node != 0 {
            self.deleted.push(ForgetOne { nodeid: node, nlookup: 1 });
        }
    }

    /// Records that a node was evicted. Its lookups are dropped later.
    pub(super) fn remove_dead(&mut self, id: Id) {
        if let Some(held) = self.held.remove(&id) {
            self.deleted.push(ForgetOne { nodeid: held.node, nlookup: held.lookups });
        }
    }

    /// Drops a node. Returns the FORGET to send.
    pub(super) fn forget(&mut self, id: Id) -> Option<ForgetOne> {
        let held = self.held.remove(&id)?;
        self.owners.remove(&held.node);
        Some(ForgetOne { nodeid: held.node, nlookup: held.lookups })
    }

    /// Drops all evicted nodes. Returns the FORGETs to send.
    pub(super) fn forget_deleted(&mut self) -> Vec<ForgetOne> {
        for one in &self.deleted {
            // The node may have been looked up again, or have been assigned to another file by mistake.
            if self.owners.get(&one.nodeid).is_some_and(|id| !self.held.contains_key(id)) {
                self.owners.remove(&one.nodeid);
            }
        }
        std::mem::take(&mut self.deleted)
    }

    /// Number of evicted nodes whose lookups are not dropped yet.
    pub(super) fn deleted(&self) -> usize {
        self.deleted.len()
    }
}
