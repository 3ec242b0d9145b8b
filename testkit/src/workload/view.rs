//! What a lane's guest holds: node ids with their references, as the kernel's inode cache does.

use std::collections::HashMap;

use crate::fuse::wire::{EntryOut, ForgetOne};
use crate::model::Id;

use super::report::{Fault, Kind};

#[derive(Debug, Clone, Copy)]
struct Held {
    node: u64,
    generation: u64,
    lookups: u64,
}

/// Node ids by model node and back.
#[derive(Debug, Default)]
pub(super) struct View {
    held: HashMap<Id, Held>,
    owners: HashMap<u64, Id>,
    deleted: Vec<ForgetOne>,
}

impl View {
    /// The node id under which the guest knows a node.
    pub(super) fn node(&self, id: Id) -> Option<u64> {
        self.held.get(&id).map(|held| held.node)
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

    /// The node was deleted; its references are given back some time later.
    pub(super) fn bury(&mut self, id: Id) {
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

    /// Gives up what was deleted; what to send.
    pub(super) fn forget_deleted(&mut self) -> Vec<ForgetOne> {
        for one in &self.deleted {
            // A wrong node id may have a rightful owner.
            if self.owners.get(&one.nodeid).is_some_and(|id| !self.held.contains_key(id)) {
                self.owners.remove(&one.nodeid);
            }
        }
        std::mem::take(&mut self.deleted)
    }

    /// Number of deleted nodes that are still held.
    pub(super) fn deleted(&self) -> usize {
        self.deleted.len()
    }

    /// All nodes held.
    pub(super) fn ids(&self) -> Vec<Id> {
        let mut ids: Vec<Id> = self.held.keys().copied().collect();
        ids.sort();
        ids
    }
}
