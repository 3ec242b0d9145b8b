//! Reports guest memory that the device does not have: counted for each request, logged once.

use std::sync::atomic::{AtomicBool, Ordering};

use virtiofs_contract::engine::QUEUES;
use virtiofsd::filesystem::FileSystem;

use super::Device;
use super::reach::Unreachable;

/// Remedy, for the log.
const REMEDY: &str = "have the VMM share all of the guest's memory (QEMU: a memory-backend-memfd with share=on for each \
                      DIMM), and restart the VM";

/// Reports that this engine has logged.
#[derive(Default)]
pub(super) struct Reported {
    /// Requests fail.
    failing: AtomicBool,
    /// The ring waits, by ring.
    waiting: [AtomicBool; QUEUES],
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// Counts a request that failed with `EIO` or has no reply. Logs the first.
    pub(super) fn count_unreachable(&self, memory: Unreachable) {
        self.counters.count_unreachable(memory.start, memory.end);
        if !self.reported.failing.swap(true, Ordering::Relaxed) {
            let Unreachable { start, end, .. } = memory;
            tracing::warn!(
                "requests fail with EIO: their buffers are in guest memory that the VMM does not share, first at \
                 {start:#x} to {end:#x}; {REMEDY}"
            );
        }
    }

    /// Records and logs that `ring` waits at a request that cannot even be answered with an error.
    pub(super) fn set_waiting(&self, ring: usize, memory: Unreachable) {
        if self.reported.waiting[ring].swap(true, Ordering::Relaxed) {
            return;
        }
        self.counters.count_unreachable(memory.start, memory.end);
        self.counters.set_waiting_for_memory(ring, true);
        let Unreachable { start, end, .. } = memory;
        tracing::warn!(
            ring,
            "the ring waits: a reply's header is in guest memory that the VMM does not share, {start:#x} to {end:#x}; \
             {REMEDY}"
        );
    }

    /// Records that the next request of `ring` can be answered.
    pub(super) fn clear_waiting(&self, ring: usize) {
        if self.reported.waiting[ring].swap(false, Ordering::Relaxed) {
            self.counters.set_waiting_for_memory(ring, false);
            tracing::info!(ring, "the ring is served again");
        }
    }
}
