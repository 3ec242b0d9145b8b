//! The state of a session that outlives its engines: counters, ledger, stashed files, trace.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use virtiofs_contract::counters::{Counters, Held, InProgress, Totals, UnreachableMemory};
use virtiofs_contract::staleness::{Cause, StaleEvent};
use virtiofs_contract::trace::TraceRing;

use super::fd_stash::FdStash;
use super::mount_point::MountPoint;

/// Size of the ledger in bytes: for each inode that the guest may hold, names and handles included, and for everything
/// that does not depend on their number. The file is sparse: pages that are never written use no memory.
const LEDGER_PER_INODE: u64 = 320;
const LEDGER_FIXED: u64 = 8 << 20;
const PAGE: u64 = 4096;

/// The persistent state of one session. The broker creates it; it reads only the counters and the trace.
#[derive(Debug)]
pub(crate) struct PersistentState {
    /// The counter page that engines write.
    pub(crate) counter_page: OwnedFd,
    counters: Counters,
    /// The ledger: nodes, names and handles that the guest holds.
    pub(crate) ledger: OwnedFd,
    /// Number of inodes that the ledger has room for at least.
    pub(crate) max_inodes: u64,
    /// Open files without a name.
    pub(crate) stash: Arc<FdStash>,
    /// The trace ring that engines write while tracing is enabled.
    pub(crate) trace_file: OwnedFd,
    pub(crate) trace: TraceRing,
    /// Mount point of the source when the last engine was started.
    mounted_at: Mutex<Option<MountPoint>>,
}

impl PersistentState {
    /// Creates the state for a guest that may hold `max_inodes` inodes.
    pub(crate) fn new(max_inodes: u64) -> io::Result<Self> {
        let (counter_page, counters) = Counters::create()?;
        let ledger = new_ledger(max_inodes)?;
        let (trace_file, trace) = TraceRing::create()?;
        let stash = Arc::new(FdStash::create()?);
        Ok(PersistentState {
            counter_page,
            counters,
            ledger,
            max_inodes,
            stash,
            trace_file,
            trace,
            mounted_at: Mutex::default(),
        })
    }

    /// Number of mounts and unmounts of the guest.
    pub(crate) fn mounts(&self) -> (u64, u64) {
        self.counters.mounts()
    }

    /// Mount point of the source when the last engine was started.
    pub(crate) fn mounted_at(&self) -> Option<MountPoint> {
        self.mounted_at.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_mounted_at(&self, mount_point: Option<MountPoint>) {
        *self.mounted_at.lock().unwrap_or_else(PoisonError::into_inner) = mount_point;
    }

    /// The oldest request in progress.
    pub(crate) fn oldest_request(&self) -> Option<InProgress> {
        self.counters.oldest_in_progress()
    }

    pub(crate) fn held(&self) -> Held {
        self.counters.held()
    }

    pub(crate) fn totals(&self) -> Totals {
        self.counters.totals()
    }

    pub(crate) fn unreachable_memory(&self) -> Option<UnreachableMemory> {
        self.counters.unreachable_memory()
    }

    /// Counts that the path of the source leads elsewhere, which engines cannot detect.
    pub(crate) fn count_source_gone(&self) {
        self.counters.count_stale(Cause::SourceGone, b".");
    }

    pub(crate) fn stale_events(&self) -> Vec<StaleEvent> {
        self.counters.stale_events()
    }
}

/// A memfd of zeros, sealed so that it cannot shrink or grow under a mapping.
fn new_ledger(max_inodes: u64) -> io::Result<OwnedFd> {
    let size = max_inodes.saturating_mul(LEDGER_PER_INODE).saturating_add(LEDGER_FIXED).next_multiple_of(PAGE);
    let ledger = memfd_create("virtiofs-ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&ledger, size)?;
    fcntl_add_seals(&ledger, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(ledger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ledger_size_is_sealed() {
        let ledger = new_ledger(1000).unwrap();
        let size = rustix::fs::fstat(&ledger).unwrap().st_size as u64;
        assert!(size > 1000 * LEDGER_PER_INODE && size.is_multiple_of(PAGE));
        assert!(ftruncate(&ledger, size - PAGE).is_err());
        assert!(ftruncate(&ledger, size + PAGE).is_err());
    }
}
