//! Open files that other processes removed.
//!
//! No name leads to such a file, and the file system frees it once no process has it open: `open_by_handle_at` finds it
//! only while this engine lives. So before a quiesced engine is replaced, the broker receives a descriptor.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{AtFlags, StatxFlags, statx};
use virtiofsd::filesystem::FileSystem;

use crate::ledger::{OpenKind, Slot};

use super::SharedState;
use super::handles::OpenFile;
use super::library_io::probe_file;
use super::state::State;

/// Files that are checked before requests get the lock again.
const SLICE: usize = 64;

/// Most files that are checked while the guest waits. Each takes microseconds.
const MAX_WHILE_QUIESCED: usize = 4096;

/// Finds removed files among those that this engine has open.
pub(crate) struct OrphanScan<F> {
    library: Arc<F>,
    shared: Arc<SharedState>,
}

impl<F: FileSystem> OrphanScan<F> {
    pub(super) fn new(library: Arc<F>, shared: Arc<SharedState>) -> Self {
        OrphanScan { library, shared }
    }

    /// Stashes them while the guest is served.
    pub(crate) fn stash_while_serving(&self) {
        let open = self.shared.lock().handles.slots();
        for slice in open.chunks(SLICE) {
            self.stash(&mut self.shared.lock(), slice);
        }
    }

    /// Stashes those that were removed since, with all rings quiesced.
    pub(crate) fn stash_while_quiesced(&self) {
        let mut state = self.shared.lock();
        let open = state.handles.slots();
        if open.len() <= MAX_WHILE_QUIESCED {
            self.stash(&mut state, &open);
        }
    }

    fn stash(&self, state: &mut State, handles: &[u32]) {
        for handle in handles {
            let fh = state.ledger.fh(*handle);
            let open = state.handles.get(*handle);
            let file = state.ledger.opened(fh).is_some_and(|opened| opened.kind == OpenKind::File);
            if let (true, Some(open)) = (file, open) {
                stash_handle_if_removed(&*self.library, state, fh, &open);
            }
        }
    }
}

/// Stashes what the guest has open of a node if another process has removed it.
pub(super) fn stash_if_removed<F: FileSystem>(library: &F, state: &mut State, node: Slot) {
    for opened in state.ledger.handles_of(node) {
        if let (OpenKind::File, Some(open)) = (opened.kind, state.handles.get(opened.slot)) {
            stash_handle_if_removed(library, state, state.ledger.fh(opened.slot), &open);
        }
    }
}

/// Stashes an open file if it has no link.
fn stash_handle_if_removed<F: FileSystem>(library: &F, state: &mut State, fh: u64, open: &OpenFile) {
    let stash = |file: &File| {
        // From the kernel's cache: a source that hangs must not block this.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        if statx(file, c"", flags, StatxFlags::NLINK)?.stx_nlink == 0 {
            state.stash.stash(fh, file);
        }
        Ok(())
    };
    if let Err(error) = probe_file(library, open, stash) {
        tracing::warn!("checking the links of an open file: {error}");
    }
}
