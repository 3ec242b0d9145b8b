//! What one engine of a session leaves to the next.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use virtiofs_contract::counters::{Counters, Held, InProgress, Totals};
use virtiofs_contract::staleness::{Cause, StaleEvent};
use virtiofs_contract::trace::TraceRing;

use super::parking::ParkingLot;
use crate::engine::mount_point::MountPoint;

/// Bytes of ledger for each node a guest may hold, names and handles included, and for everything that does not
/// depend on their number. Reserved, not used: pages nobody writes cost nothing.
const LEDGER_PER_NODE: u64 = 320;
const LEDGER_FIXED: u64 = 8 << 20;
const PAGE: u64 = 4096;

/// Everything that outlives a session's engines. The broker makes it and looks into the counters alone.
#[derive(Debug)]
pub(crate) struct Estate {
    /// The page that engines count in.
    pub(crate) counter_page: OwnedFd,
    counters: Counters,
    /// What the guest has been told and still holds.
    pub(crate) ledger: OwnedFd,
    /// How many nodes there is room for at the least.
    pub(crate) room: u64,
    /// Its open files without a name.
    pub(crate) parking: Arc<ParkingLot>,
    /// Where its requests are logged while somebody wants that.
    pub(crate) trace_file: OwnedFd,
    pub(crate) trace: TraceRing,
    /// Where the file system of its source was mounted when the last engine was started.
    mounted_at: Mutex<Option<MountPoint>>,
}

impl Estate {
    /// For a guest that may hold `max_inodes` nodes.
    pub(crate) fn new(max_inodes: u64) -> io::Result<Self> {
        let (counter_page, counters) = Counters::create()?;
        let ledger = new_ledger(max_inodes)?;
        let (trace_file, trace) = TraceRing::create()?;
        let parking = Arc::default();
        Ok(Estate {
            counter_page,
            counters,
            ledger,
            room: max_inodes,
            parking,
            trace_file,
            trace,
            mounted_at: Mutex::default(),
        })
    }

    /// How often the guest has mounted, and unmounted.
    pub(crate) fn mounts(&self) -> (u64, u64) {
        self.counters.mounts()
    }

    /// Where the file system of its source was mounted.
    pub(crate) fn mounted_at(&self) -> Option<MountPoint> {
        self.mounted_at.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn was_mounted_at(&self, mount_point: Option<MountPoint>) {
        *self.mounted_at.lock().unwrap_or_else(PoisonError::into_inner) = mount_point;
    }

    /// The request in progress that began first.
    pub(crate) fn oldest_request(&self) -> Option<InProgress> {
        self.counters.oldest_in_progress()
    }

    pub(crate) fn held(&self) -> Held {
        self.counters.held()
    }

    pub(crate) fn totals(&self) -> Totals {
        self.counters.totals()
    }

    /// Counts that the path of the source leads elsewhere. Engines cannot see that.
    pub(crate) fn source_gone(&self) {
        self.counters.count_stale(Cause::SourceGone, b".");
    }

    pub(crate) fn stale_events(&self) -> Vec<StaleEvent> {
        self.counters.stale_events()
    }
}

/// A file of zeros that can neither shrink nor grow under an engine's mapping.
fn new_ledger(max_inodes: u64) -> io::Result<OwnedFd> {
    let size = max_inodes.saturating_mul(LEDGER_PER_NODE).saturating_add(LEDGER_FIXED).next_multiple_of(PAGE);
    let ledger = memfd_create("virtiofs-ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&ledger, size)?;
    fcntl_add_seals(&ledger, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(ledger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_has_its_size_for_good() {
        let ledger = new_ledger(1000).unwrap();
        let size = rustix::fs::fstat(&ledger).unwrap().st_size as u64;
        assert!(size > 1000 * LEDGER_PER_NODE && size.is_multiple_of(PAGE));
        assert!(ftruncate(&ledger, size - PAGE).is_err());
        assert!(ftruncate(&ledger, size + PAGE).is_err());
    }
}
