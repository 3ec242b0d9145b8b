//! Broker <-> engine: the control channel of one engine.
//!
//! The broker starts `virtiofs-engine` with one end of a [`PacketChannel`](crate::channel::PacketChannel)
//! as file descriptor [`CONTROL_FD`] and sends [`ToEngine::Start`]; everything else the engine needs
//! arrives beside that message. The vhost-user protocol runs on a socket of its own.
//!
//! Standard output and standard error are one non-blocking pipe, so that logging never blocks a guest: a write may fail
//! with `EAGAIN`, and the line is lost. Do not use `eprintln!` in an engine, which panics on that error.

use serde::{Deserialize, Serialize};

use crate::preflight::{Finding, Preflight};
use virtiofs_config::{EngineConfig, REQUEST_QUEUES};

/// File descriptor of the control channel in a new engine.
pub const CONTROL_FD: i32 = 3;

/// Queues of the device: the high-priority queue and the request queues.
pub const QUEUES: usize = 1 + REQUEST_QUEUES;

/// Most descriptors a queue may have.
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Most memory regions of a guest that an engine maps, and the broker therefore accepts.
pub const MAX_MEMORY_REGIONS: usize = 32;

/// Broker to engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum ToEngine {
    /// The first message. File descriptors: the source directory (`O_PATH`), a listening socket on
    /// which the broker has already connected (vhost-user), the session's counter page, the session's ledger
    /// (a memfd of whole pages, sealed against shrinking, all zeros at first), one end of the fd stash channel, the
    /// session's trace.
    Start {
        /// The oldest version that the broker speaks. An engine of version 4 requires its own here.
        version: u32,
        /// The newest one; none: the same.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        newest: Option<u32>,
        /// The session's name, for the engine's log.
        session: String,
        /// The engine's configuration.
        config: EngineConfig,
        /// How the previous engine of the session ended.
        #[serde(default)]
        predecessor: Predecessor,
    },
    /// The first message instead of `Start`: try the configuration, report and exit. File descriptor: the
    /// source directory (`O_PATH`).
    Preflight {
        /// As in `Start`.
        version: u32,
        /// As in `Start`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        newest: Option<u32>,
        /// The configuration to try.
        config: EngineConfig,
    },
    /// Stop each ring at the next request boundary and do not touch it. Reply: one [`FromEngine::Quiesced`] for each
    /// ring, as soon as that ring is quiesced.
    Quiesce,
    /// Serve the rings again.
    Resume,
    /// Serve what waits in the rings, and notify the guest of each ring: an earlier engine may have replied without
    /// notifying the guest, or consumed a kick without serving it. The broker itself never writes to an eventfd of a VMM,
    /// because a VMM can make that write block.
    Kick,
    /// Report the path of a node. Reply: [`FromEngine::Described`].
    Describe {
        /// FUSE node id.
        node: u64,
    },
}

/// Engine to broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromEngine {
    /// The engine is in its sandbox and waits for vhost-user messages, or (after `Preflight`) exits.
    Ready {
        /// Result of its preflight.
        preflight: Preflight,
        /// The version that both sides speak from now on; none: the broker's oldest one, which an engine of version 4 requires.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        version: Option<u32>,
    },
    /// The engine cannot serve this configuration, and exits.
    Failed {
        /// The reason, and the remedy.
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
        /// FUSE node id.
        node: u64,
        /// Its path below the share's root; none: the path is unknown, or the engine is busy.
        path: Option<String>,
    },
}

/// How the previous engine of the session ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Predecessor {
    /// There was none, or it was quiesced between two requests.
    #[default]
    Quiesced,
    /// It was killed from outside (SIGKILL).
    Killed,
    /// It died by a fault of its own (any other signal, or an exit).
    Faulted,
}

/// Engine to broker, on the fd stash channel. It is a [`PacketChannel`](crate::channel::PacketChannel) of its own, so
/// that a ring that waits for a reply there never waits for the session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StashRequest {
    /// Stash the open file that this message carries, for later engines of the session. Reply:
    /// [`StashReply::Stashed`].
    Stash {
        /// Number of the request on this channel.
        request: u64,
        /// The guest's file handle.
        handle: u64,
    },
    /// Send the file that is stashed for this handle. Reply: [`StashReply::Fetched`].
    Fetch {
        /// Number of the request on this channel.
        request: u64,
        /// The guest's file handle.
        handle: u64,
    },
    /// The guest has closed this handle. No reply.
    Release {
        /// The guest's file handle.
        handle: u64,
    },
    /// The guest has closed all handles. No reply.
    ReleaseAll,
}

/// Broker to engine, on the fd stash channel. A broker that is restarted may answer a request again, so the engine ignores
/// replies to other requests than its last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StashReply {
    /// To `Stash`.
    Stashed {
        /// Number of the request.
        request: u64,
        /// False: the session's stash is full.
        accepted: bool,
    },
    /// To `Fetch`. File descriptor, if found: the file.
    Fetched {
        /// Number of the request.
        request: u64,
        /// True if a file was stashed for this handle.
        found: bool,
    },
}

impl StashReply {
    /// Number of the request that it answers.
    pub fn request(&self) -> u64 {
        match self {
            StashReply::Stashed { request, .. } | StashReply::Fetched { request, .. } => *request,
        }
    }
}
