//! Paths of nodes, for people who ask what a guest is doing.

use super::Core;
use super::state::State;
use crate::ledger::ROOT;

/// Most bytes of a path, and most components: it is for people, and must not take long.
const MOST_BYTES: usize = 1024;
const MOST_COMPONENTS: usize = 64;

impl Core {
    /// The path of a node below the share's root, by names that the guest was told: `/` is the root itself. None
    /// for a number that means nothing, or a node without a name; the beginning is left out of a long one.
    pub(crate) fn path_of(&self, node: u64) -> Option<Vec<u8>> {
        path_in(&self.lock(), node)
    }

    /// The same, unless a request is just using the ledger: one that hangs may never let go of it.
    pub(crate) fn path_at_once(&self, node: u64) -> Option<Vec<u8>> {
        path_in(&*self.state.try_lock().ok()?, node)
    }
}

fn path_in(state: &State, node: u64) -> Option<Vec<u8>> {
    let mut at = state.ledger.slot(node)?;
    if at == ROOT {
        return Some(b"/".to_vec());
    }
    let mut components = Vec::new();
    let mut bytes = 0;
    while at != ROOT && components.len() < MOST_COMPONENTS && bytes < MOST_BYTES {
        let (above, name) = state.ledger.names(at).into_iter().next()?;
        bytes += name.len() + 1;
        components.push(name);
        at = above;
    }
    if at != ROOT {
        components.push(b"...".to_vec());
    }
    Some(components.iter().rev().flat_map(|name| [b"/", name.as_slice()].concat()).collect())
}
