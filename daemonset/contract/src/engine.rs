//! Broker <-> engine: the control channel of one engine.
//!
//! The broker starts `virtiofs-engine` with one end of a [`PacketChannel`](crate::channel::PacketChannel)
//! as file descriptor [`CONTROL_FD`] and sends [`ToEngine::Start`]; everything else the engine needs
//! arrives beside that message. The vhost-user protocol runs on a socket of its own.
//!
//! Standard output and error are one pipe that never makes a guest wait: it does not block, so a write may
//! fail with `EAGAIN` and its line is lost. An engine must not mind (`eprintln!` would panic).

use serde::{Deserialize, Serialize};

use crate::config::EngineConfig;
use crate::preflight::{Finding, Preflight};

/// File descriptor of the control channel in a new engine.
pub const CONTROL_FD: i32 = 3;

/// The engine's queues: the high-priority queue and one request queue.
pub const QUEUES: usize = 2;

/// Most descriptors a queue may have.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Most memory regions of a guest that an engine maps, and the broker therefore accepts.
pub const MAX_MEMORY_REGIONS: usize = 32;

/// Broker to engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToEngine {
    /// The first message. File descriptors: the source directory (`O_PATH`), a listening socket on
    /// which the broker has already connected (vhost-user), the session's counter page.
    Start {
        /// Must be [`VERSION`](crate::VERSION).
        version: u32,
        /// The session's name, for the engine's log.
        session: String,
        /// What to do.
        config: EngineConfig,
    },
    /// The first message instead of `Start`: try the configuration, report, end. File descriptor: the
    /// source directory (`O_PATH`).
    Preflight {
        /// Must be [`VERSION`](crate::VERSION).
        version: u32,
        /// What to try.
        config: EngineConfig,
    },
    /// Stop each ring at the next request boundary and leave it alone. Answered with one
    /// [`FromEngine::Quiesced`] per ring, each as soon as that ring has come to rest.
    Quiesce,
    /// Serve the rings again.
    Resume,
}

/// Engine to broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromEngine {
    /// The engine is in its sandbox and waits for vhost-user messages, or (after `Preflight`) ends.
    Ready {
        /// What it found.
        preflight: Preflight,
    },
    /// The engine cannot do what it was asked to, and ends.
    Failed {
        /// Why, and what would help.
        finding: Finding,
    },
    /// This ring is not touched until `Resume`.
    Quiesced {
        /// Index of the ring.
        ring: u16,
    },
    /// The rings are served again.
    Resumed,
}
