//! Open files that others have removed.
//!
//! No name leads to such a file, and once nobody has it open the file system frees it: `open_by_handle_at` finds it
//! only as long as this engine lives. So before an engine goes that is at rest, the broker gets a descriptor.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofsd::filesystem::FileSystem;

use crate::ledger::{OpenKind, Slot};

use super::Core;
use super::files::look_at;
use super::state::{Live, State};

/// How many files are looked at between two looks at what the guest wants.
const SLICE: usize = 64;

/// Most files that are looked at while the guest waits. It takes microseconds for each.
const MOST_AT_REST: usize = 4096;

/// Finds them among what this engine has open.
pub(crate) struct Orphans<F> {
    inner: Arc<F>,
    core: Arc<Core>,
}

impl<F: FileSystem> Orphans<F> {
    pub(super) fn new(inner: Arc<F>, core: Arc<Core>) -> Self {
        Orphans { inner, core }
    }

    /// Has the broker keep them, while the guest is served.
    pub(crate) fn park_meanwhile(&self) {
        let open = self.core.lock().bindings.open();
        for some in open.chunks(SLICE) {
            self.park(&mut self.core.lock(), some);
        }
    }

    /// Has the broker keep those that were removed since, the guest being at rest.
    pub(crate) fn park_at_rest(&self) {
        let mut state = self.core.lock();
        let open = state.bindings.open();
        if open.len() <= MOST_AT_REST {
            self.park(&mut state, &open);
        }
    }

    fn park(&self, state: &mut State, handles: &[u32]) {
        for handle in handles {
            let fh = state.ledger.fh(*handle);
            let live = state.bindings.live(*handle);
            let file = state.ledger.opened(fh).is_some_and(|opened| opened.kind == OpenKind::File);
            if let (true, Some(live)) = (file, live) {
                park_if_removed(&*self.inner, state, fh, &live);
            }
        }
    }
}

/// Has the broker keep what the guest has open of a node that others have removed: this engine is the last to have it.
pub(super) fn park_removed<F: FileSystem>(inner: &F, state: &mut State, node: Slot) {
    for opened in state.ledger.handles_of(node) {
        if let (OpenKind::File, Some(live)) = (opened.kind, state.bindings.live(opened.slot)) {
            park_if_removed(inner, state, state.ledger.fh(opened.slot), &live);
        }
    }
}

/// Has the broker keep an open file if no name leads to it.
fn park_if_removed<F: FileSystem>(inner: &F, state: &mut State, fh: u64, live: &Live) {
    let look = |file: &File| {
        // Of what the kernel knows: a source that hangs must not hold up whoever only asks.
        let asked = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        if statx(file, c"", asked, StatxFlags::NLINK)?.stx_nlink == 0 {
            state.parking.park(fh, file);
        }
        Ok(())
    };
    if let Err(error) = look_at(inner, live, look) {
        tracing::warn!("an open file cannot be looked at: {error}");
    }
}
