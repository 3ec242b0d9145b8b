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
    /// which the broker has already connected (vhost-user), the session's counter page, the session's ledger
    /// (a memfd of whole pages, sealed against shrinking, zeros at first), one end of the parking channel, the
    /// session's trace.
    Start {
        /// Must be [`VERSION`](crate::VERSION).
        version: u32,
        /// The session's name, for the engine's log.
        session: String,
        /// What to do.
        config: EngineConfig,
        /// How the engine before this one came to its end.
        #[serde(default)]
        predecessor: Predecessor,
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
    /// Which file is this? Answered with [`FromEngine::Described`].
    Describe {
        /// FUSE's number of the node.
        node: u64,
    },
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
    /// To `Describe`.
    Described {
        /// FUSE's number of the node.
        node: u64,
        /// Its path below the share's root; none: it is not known, or cannot be told at once.
        path: Option<String>,
    },
}

/// How the engine before this one came to its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Predecessor {
    /// There was none, or it has come to rest between two requests.
    #[default]
    AtRest,
    /// It was killed from outside (SIGKILL).
    Killed,
    /// It died of what it was doing (any other signal, or an exit).
    Faulted,
}

/// Engine to broker, on the parking channel: a [`PacketChannel`](crate::channel::PacketChannel) of its own, so
/// that a ring that waits for an answer there never waits for the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToParking {
    /// Keep the open file beside this message for later engines of the session. Answered with
    /// [`FromParking::Parked`].
    Park {
        /// The guest's number of the handle.
        handle: u64,
    },
    /// Give me the file that was parked for this handle. Answered with [`FromParking::Fetched`].
    Fetch {
        /// The guest's number of the handle.
        handle: u64,
    },
    /// The guest has closed this handle. Not answered.
    Release {
        /// The guest's number of the handle.
        handle: u64,
    },
    /// The guest has let go of everything. Not answered.
    ReleaseAll,
}

/// Broker to engine, on the parking channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromParking {
    /// To `Park`.
    Parked {
        /// False: as many files are kept for this session as may be.
        accepted: bool,
    },
    /// To `Fetch`. File descriptor, if found: the file.
    Fetched {
        /// Was a file parked for this handle?
        found: bool,
    },
}
