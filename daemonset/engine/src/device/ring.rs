//! One request of one ring, from the available ring to the used ring.

use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use vhost_user_backend::{VringState, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use virtiofsd::filesystem::FileSystem;
use vm_memory::{GuestAddressSpace, GuestMemoryLoadGuard};

use super::request::Request;
use super::{AtomicMemory, Device, Memory, Vring};

/// What became of one look at a ring.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// A request was answered.
    Served,
    /// Nothing is waiting.
    Empty,
    /// The ring is not to be touched.
    Stopped,
}

pub(super) type Chain = DescriptorChain<GuestMemoryLoadGuard<Memory>>;

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// Is the ring started and enabled, and nobody has asked for rest?
    pub(super) fn may_serve(&self, state: &VringState<AtomicMemory>) -> bool {
        state.is_enabled() && state.get_queue().ready() && !self.paused.load(Ordering::SeqCst)
    }

    /// Takes one request and answers it. The ring's lock is held all the while, so that GET_VRING_BASE finds it
    /// between two requests.
    pub(super) fn serve_one(&self, ring: usize, vring: &Vring) -> Progress {
        let _turn = self.turn(ring);
        let mut state = vring.get_mut();
        if !self.may_serve(&state) {
            return Progress::Stopped;
        }
        let Some(memory) = self.memory.get().map(GuestAddressSpace::memory) else { return Progress::Stopped };
        let chain = match state.get_queue_mut().iter(memory.clone()) {
            Ok(mut chains) => chains.next(),
            Err(error) => {
                // The guest moved its index past the ring's end. It is the guest's ring: nothing can be served
                // from it until the driver is reset, and looking again would only spin.
                tracing::warn!(ring, "available ring: {error}");
                return Progress::Stopped;
            }
        };
        let Some(chain) = chain else { return Progress::Empty };
        let head = chain.head_index();
        let used = self.answer(ring, &memory, chain);
        self.publish(ring, &mut state, head, used);
        Progress::Served
    }

    /// Has the request answered in guest memory and counts it. Returns the bytes written.
    fn answer(&self, ring: usize, memory: &Memory, chain: Chain) -> u32 {
        let start = monotonic_ns();
        self.counters.in_progress(ring, start);
        let request = Request::new(memory, chain);
        let reply = request.answer(&self.server);
        if reply.malformed {
            self.counters.malformed();
        }
        self.counters.finished(request.opcode(), reply.errno, monotonic_ns().saturating_sub(start));
        self.counters.in_progress(ring, 0);
        reply.bytes
    }

    fn publish(&self, ring: usize, state: &mut VringState<AtomicMemory>, head: u16, used: u32) {
        if let Err(error) = state.add_used(head, used) {
            tracing::warn!(ring, "used ring: {error}");
            return;
        }
        // Where it cannot be told whether the guest wants to be told, it is told.
        let wanted = !self.event_idx.load(Ordering::Relaxed) || state.needs_notification().unwrap_or(true);
        if wanted && let Err(error) = state.signal_used_queue() {
            tracing::warn!(ring, "call: {error}");
        }
    }
}

fn monotonic_ns() -> u64 {
    // The clock cannot fail on Linux; a latency of zero would be the worst of it.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| Duration::from(now).as_nanos() as u64)
}
