//! One request of one ring, from the available ring to the used ring.

use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use vhost_user_backend::{VringState, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use virtiofs_contract::counters::InProgress;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::Opcode;
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::request::{Fault, Request};
use super::{AtomicMemory, Device, Vring};
use crate::ledger::RequestStatus;

const INIT: u32 = Opcode::Init as u32;

/// Result of serving a ring once.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// A request was answered.
    Served,
    /// No request is waiting.
    Empty,
    /// The ring must not be touched.
    Stopped,
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// True if the ring is started and enabled, and the device is not paused.
    pub(super) fn may_serve(&self, state: &VringState<AtomicMemory>) -> bool {
        state.is_enabled() && state.get_queue().ready() && !self.paused.load(Ordering::SeqCst)
    }

    /// Takes one request and answers it under the ring's lock, so that GET_VRING_BASE comes between two requests.
    pub(super) fn serve_one(&self, ring: usize, vring: &Vring) -> Progress {
        let _locked = self.request_lock(ring);
        let mut state = vring.get_mut();
        if !self.may_serve(&state) {
            return Progress::Stopped;
        }
        self.take_over();
        let Some(memory) = self.memory.get().map(GuestAddressSpace::memory) else { return Progress::Stopped };
        let chain = match state.get_queue_mut().iter(memory.clone()) {
            Ok(mut chains) => chains.next(),
            Err(error) => {
                // The guest moved its index past the ring's end. Nothing can be served until the driver is reset; a retry
                // would spin.
                tracing::warn!(ring, "reading the available ring: {error}");
                return Progress::Stopped;
            }
        };
        let Some(chain) = chain else { return Progress::Empty };
        let head = chain.head_index();
        let position = state.get_queue().next_avail().wrapping_sub(1);
        let table = GuestAddress(state.get_queue().desc_table());
        let request = Request::new(&memory, table, chain);
        if let Some(missing) = request.unreachable().filter(|missing| !missing.can_complete) {
            // It stays in the ring: whichever engine serves the ring next begins with it.
            state.get_queue_mut().set_next_avail(position);
            self.set_waiting(ring, missing);
            return Progress::Stopped;
        }
        self.clear_waiting(ring);
        let used = self.answer_once(ring, position, request);
        self.publish(ring, &mut state, head, used);
        self.log.published(ring);
        Progress::Served
    }

    /// Answers a request, unless an engine before this one has done so. Returns the length of the reply.
    fn answer_once(&self, ring: usize, position: u16, mut request: Request<'_>) -> u32 {
        let status = self.shared.begin(ring, position, request.unique(), request.opcode());
        let bytes = match status {
            RequestStatus::Answered { bytes } => {
                self.shared.finish(ring);
                return bytes;
            }
            RequestStatus::Interrupted { faults, kills } if is_poisonous(faults, kills) => {
                tracing::warn!(
                    opcode = request.opcode(),
                    faults,
                    kills,
                    "refusing a request during which engines died"
                );
                self.counters.count_malformed();
                request.refuse().bytes
            }
            RequestStatus::New | RequestStatus::Interrupted { .. } => self.answer(ring, &mut request),
        };
        self.log.finish(ring, bytes);
        self.shared.finish(ring);
        self.counters.set_held(self.log.held());
        bytes
    }

    /// Has the request answered by the library and counts it.
    fn answer(&self, ring: usize, request: &mut Request<'_>) -> u32 {
        let start = monotonic_ns();
        let (opcode, node) = (request.opcode(), request.node());
        self.counters.set_in_progress(ring, Some(InProgress { since_ns: start, opcode, node }));
        let reply = match opcode {
            _ if request.unreachable().is_some() => request.refuse(),
            INIT => self.answer_init(request),
            _ => request.answer(&self.server, &self.scratch[ring]),
        };
        match reply.fault {
            Some(Fault::Malformed) => self.counters.count_malformed(),
            Some(Fault::Unreachable(memory)) => self.count_unreachable(memory),
            None => {}
        }
        let duration = monotonic_ns().saturating_sub(start);
        self.counters.count_request(opcode, reply.errno, duration);
        self.counters.set_in_progress(ring, None);
        self.trace(ring, request, &reply, start, duration);
        reply.bytes
    }

    fn publish(&self, ring: usize, state: &mut VringState<AtomicMemory>, head: u16, used: u32) {
        if let Err(error) = state.add_used(head, used) {
            tracing::warn!(ring, "writing the used ring: {error}");
            return;
        }
        // Notify if it is unknown whether the guest wants it.
        let wanted = !self.event_idx.load(Ordering::Relaxed) || state.needs_notification().unwrap_or(true);
        if wanted && let Err(error) = state.signal_used_queue() {
            tracing::warn!(ring, "notifying the guest: {error}");
        }
    }
}

/// True after two deaths by fault during the request, or five by SIGKILL: SIGKILL comes from outside and may hit any
/// request, but not five times without an answer in between.
fn is_poisonous(faults: u32, kills: u32) -> bool {
    faults >= 2 || kills >= 5
}

fn monotonic_ns() -> u64 {
    // The clock cannot fail on Linux; if it did, latencies would be 0.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| Duration::from(now).as_nanos() as u64)
}
