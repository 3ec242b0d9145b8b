//! Errors of a queue, and the ring state that explains a hang.

use std::time::Duration;

use crate::memory::MemoryError;

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The device put the request on the used ring but did not call: a guest would wait for ever.
    #[error("lost wake-up on ring {ring}: used.idx moved, but no call came for {waited:?}")]
    LostWakeup {
        /// Number of the ring.
        ring: u32,
        /// How long the driver waited.
        waited: Duration,
    },
    /// The device did not return the request in time.
    #[error("ring {ring} hung for {waited:?}: {state}")]
    Hung {
        /// Number of the ring.
        ring: u32,
        /// How long the driver waited.
        waited: Duration,
        /// Both indexes and the device's wish, for the post-mortem.
        state: RingState,
    },
    /// The back-end hung up while the request was in flight.
    #[error("the back-end hung up with a request in flight on ring {ring}")]
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
        /// Which part of the request.
        what: &'static str,
        /// Its length.
        len: u64,
        /// The room there is.
        room: u64,
    },
    /// All descriptors or buffers stayed in use until the deadline.
    #[error("ring {ring} has no free buffers: {in_flight} requests in flight")]
    Full {
        /// Number of the ring.
        ring: u32,
        /// Requests in flight.
        in_flight: usize,
    },
    /// Guest memory was addressed wrongly.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An eventfd failed.
    #[error("{what}: {source}")]
    Event {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: nix::Error,
    },
}

/// Where both sides stand in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingState {
    /// avail.idx.
    pub available: u16,
    /// used.idx.
    pub used: u16,
    /// How far the driver has taken chains back.
    pub last_used: u16,
    /// Where the device wants the next kick.
    pub avail_event: u16,
}

impl std::fmt::Display for RingState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "avail.idx {}, used.idx {}, taken back {}, avail_event {}",
            self.available, self.used, self.last_used, self.avail_event
        )
    }
}
