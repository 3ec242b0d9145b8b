//! Agent <-> broker: requests and answers on the broker's control socket.
//!
//! One [`Response`] to each [`Request`], in order. The first request of a
//! connection is [`Request::Hello`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::EngineConfig;
use crate::counters::{Held, Totals};
use crate::preflight::{Finding, Preflight};
use crate::staleness::StaleEvent;

/// A place where VMMs connect: one socket, one source, one configuration for all sessions that start there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Endpoint {
    /// Name of the endpoint, unique in this broker: at most 253 of `[a-z0-9.-]`.
    pub name: String,
    /// Canonical path of the directory to serve.
    pub source: PathBuf,
    /// The socket to listen on.
    pub socket: SocketSpec,
    /// Configuration of its engines. Sessions that run are handed over to engines of a new one.
    pub engine: EngineConfig,
    /// Is a second session at the same time refused?
    #[serde(default)]
    pub exclusive: bool,
}

/// Where to listen, and who may connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SocketSpec {
    /// Path of the socket.
    pub path: PathBuf,
    /// Owner; none: the broker's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<u32>,
    /// Group; none: the broker's group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
    /// Permission bits.
    pub mode: u32,
}

/// Agent to broker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// The first request. Answered with [`Response::Welcome`].
    Hello {
        /// Must be [`VERSION`](crate::VERSION).
        version: u32,
    },
    /// Bring the endpoint of this name into being, or change it. The configuration is tried first
    /// (preflight); where that fails nothing changes and the answer is [`Response::Refused`]. Doing it
    /// twice is doing it once. Answered with [`Response::Applied`].
    Apply {
        /// The endpoint wanted.
        endpoint: Endpoint,
    },
    /// Stop listening at the endpoint. Its sessions run on until their VMM leaves, or end at once with
    /// `force`. An unknown name is no error. Answered with [`Response::Done`].
    Remove {
        /// Name of the endpoint.
        name: String,
        /// End its sessions too.
        force: bool,
    },
    /// Give every session of the endpoint a new engine: of a new binary, or as a remedy. It takes over from the
    /// one that serves, between two requests; one that cannot be brought to rest goes on, with a finding.
    /// Answered with [`Response::Done`] before it is done.
    Exchange {
        /// Name of the endpoint.
        name: String,
    },
    /// Try a configuration on a source without serving it. Answered with [`Response::Tried`] or
    /// [`Response::Refused`].
    Preflight {
        /// Canonical path of the directory.
        source: PathBuf,
        /// What to try.
        engine: EngineConfig,
    },
    /// Answered with [`Response::Status`].
    Status,
}

/// Broker to agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// To `Hello`.
    Welcome {
        /// The broker's version of these messages.
        version: u32,
        /// The broker's process id.
        pid: u32,
    },
    /// The endpoint is as asked.
    Applied {
        /// What the trial engine found.
        preflight: Preflight,
    },
    /// To `Preflight`.
    Tried {
        /// What the trial engine found.
        preflight: Preflight,
    },
    /// To `Remove` and `Exchange`.
    Done,
    /// To `Status`.
    Status(Box<Status>),
    /// Nothing was changed.
    Refused {
        /// Why, and what would help.
        finding: Finding,
    },
    /// The request itself makes no sense; nothing was changed.
    Invalid {
        /// What is wrong with it.
        message: String,
    },
}

/// The broker as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The broker's process id.
    pub pid: u32,
    /// Endpoints that listen, and those removed whose sessions run on.
    pub endpoints: Vec<EndpointStatus>,
}

/// One endpoint as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    /// The endpoint in force.
    pub endpoint: Endpoint,
    /// Does it accept VMMs?
    pub listening: bool,
    /// What its last trial found.
    pub preflight: Preflight,
    /// Sessions that are connected.
    pub sessions: Vec<SessionStatus>,
    /// Connections that ended without becoming a session, since the broker started.
    pub refused_connections: u64,
    /// Sessions that began, since the broker started.
    pub sessions_started: u64,
    /// Engines that were started for its sessions, since the broker started; trials do not count.
    pub engines_started: u64,
    /// Counts of all sessions, those that have ended included. Never goes backwards while the broker lives.
    pub totals: Totals,
}

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionState {
    /// The VMM is setting the device up.
    Connecting,
    /// The guest's driver has started the rings; requests are served.
    Serving,
    /// The rings are stopped (the VM is paused, or its driver is not loaded).
    Stopped,
    /// The engine could not be started or has died; see the finding.
    Failed,
}

/// One session as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionStatus {
    /// Name of the session, unique in this broker.
    pub id: String,
    /// What it is doing.
    pub state: SessionState,
    /// Process that connected, as the kernel recorded it; a record, not an authority. 0: a process outside the
    /// broker's PID namespace.
    pub vmm_pid: i32,
    /// Seconds since the Unix epoch at which it connected.
    pub connected_at: u64,
    /// Process that serves it.
    pub engine_pid: Option<u32>,
    /// How many engines have served it so far.
    pub engines: u64,
    /// Configuration of the engine that serves it.
    pub engine: EngineConfig,
    /// Bytes of guest memory that the VMM shared.
    pub guest_memory: u64,
    /// What that engine found.
    pub preflight: Option<Preflight>,
    /// Why it is `Failed`.
    pub finding: Option<Finding>,
    /// Open file descriptors of the engine process.
    pub open_files: u64,
    /// What the guest holds, after its last request.
    pub held: Held,
    /// How many inodes it may hold: no more than `engine.maxInodes`, nor than was allowed when it connected, for
    /// which the session's ledger was made.
    pub inodes_limit: u64,
    /// Counts of this session.
    pub totals: Totals,
    /// Its last stale events, the oldest first.
    #[serde(default)]
    pub stale_events: Vec<StaleEvent>,
    /// The path of the source leads to another directory than the one that is served, or to none: how so. None: it
    /// leads to what is served.
    #[serde(default)]
    pub source_gone: Option<String>,
}
