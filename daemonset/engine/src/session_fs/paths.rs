//! Paths of nodes, for traces and for reports of slow requests.

use super::SharedState;
use super::state::State;
use crate::ledger::ROOT;

/// Most bytes and most components of a path: it is for people to read, and must not take long.
const MAX_BYTES: usize = 1024;
const MAX_COMPONENTS: usize = 64;

impl SharedState {
    /// The path of a node below the share's root, by names that the guest holds: `/` is the root itself. None for an
    /// unknown id or a node without a name; a long path loses its beginning.
    pub(crate) fn path_of(&self, node: u64) -> Option<Vec<u8>> {
        path_in(&self.lock(), node)
    }

    /// The same, unless a request holds the lock: one that hangs may never release it.
    pub(crate) fn try_path_of(&self, node: u64) -> Option<Vec<u8>> {
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
    while at != ROOT && components.len() < MAX_COMPONENTS && bytes < MAX_BYTES {
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
