//! Errors of a queue, and the ring state that explains a hang.

use std::time::Duration;

use crate::memory::MemoryError;

/// Reason why a request was not completed.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The device put the request on the used ring but sent no call: a guest would wait forever.
    #[error("lost wake-up on ring {ring}: used.idx moved, but no call was received for {waited:?}")]
    LostWakeup {
        /// Number of the ring.
        ring: u32,
        /// Time that the driver waited.
        waited: Duration,
    },
    /// The device did not return the request in time.
    #[error("ring {ring} hung for {waited:?}: {state}")]
    Hung {
        /// Number of the ring.
        ring: u32,
        /// Time that the driver waited.
        waited: Duration,
        /// Indexes of both sides.
        state: RingState,
    },
    /// The back-end closed the connection while the request was in flight.
    #[error("the back-end closed the connection with a request in flight on ring {ring}")]
    Disconnected {
        /// Number of the ring.
        ring: u32,
    },
    /// The guest reset the device while the request was in flight.
    #[error("ring {ring} was reset with the request in flight")]
    Reset {
        /// Number of the ring.
        ring: u32,
    },
    /// The request does not fit its buffers.
    #[error("{what} of {len} bytes does not fit into {room}")]
    TooLong {
        /// The part of the request.
        what: &'static str,
        /// Length of that part in bytes.
        len: u64,
        /// Size of the buffer in bytes.
        room: u64,
    },
    /// All descriptors or buffers were in use until the deadline.
    #[error("ring {ring} has no free buffers: {in_flight} requests in flight")]
    Full {
        /// Number of the ring.
        ring: u32,
        /// Requests in flight.
        in_flight: usize,
    },
    /// An invalid access to guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An eventfd failed.
    #[error("{what}: {source}")]
    Event {
        /// The operation.
        what: &'static str,
        /// The kernel's error.
        source: nix::Error,
    },
}

/// Indexes of both sides of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingState {
    /// avail.idx.
    pub available: u16,
    /// used.idx.
    pub used: u16,
    /// Index up to which the driver has processed used chains.
    pub last_used: u16,
    /// Index at which the device requests the next kick.
    pub avail_event: u16,
}

impl std::fmt::Display for RingState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "avail.idx {}, used.idx {}, processed {}, avail_event {}",
            self.available, self.used, self.last_used, self.avail_event
        )
    }
}
