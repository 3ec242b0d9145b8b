//! Agent <-> broker: requests and answers on the broker's control socket.
//!
//! One [`Response`] to each [`Request`], in order. The first request of a
//! connection is [`Request::Hello`].

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::EngineConfig;
use crate::counters::{Held, Totals};
use crate::preflight::{Finding, Preflight};
use crate::staleness::StaleEvent;
use crate::trace::TraceEntry;

/// Shortest time, in milliseconds, for which a source may be released.
pub const SHORTEST_RELEASE_MS: u64 = 1000;

/// Longest time, in milliseconds, for which a source may be released.
pub const LONGEST_RELEASE_MS: u64 = 24 * 60 * 60 * 1000;

/// Longest time, in milliseconds, for which a session may be traced.
pub const LONGEST_TRACE_MS: u64 = 60 * 60 * 1000;

/// A place where VMMs connect: one socket, one source, one configuration for all sessions that start there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Endpoint {
    /// Name of the endpoint, unique in this broker: at most 253 of `[a-z0-9.-]`.
    pub name: String,
    /// Canonical path of the directory to serve.
    pub source: PathBuf,
    /// Directory below the source that is served instead of it: a relative path without `.` and `..`. It is
    /// resolved anew at each engine start, without ever leaving the source and without following a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_path: Option<PathBuf>,
    /// The socket to listen on.
    pub socket: SocketSpec,
    /// Configuration of its engines. Sessions that run are handed over to engines of a new one.
    pub engine: EngineConfig,
    /// Is a second session at the same time refused? It counts what is connected at other exclusive endpoints of the
    /// same source too: several endpoints are no way around it.
    #[serde(default)]
    pub exclusive: bool,
    /// For whom it is, in words for people. Nobody acts upon them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consumer: Option<String>,
}

/// Where to listen, and who may connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SocketSpec {
    /// Path of the socket.
    pub path: PathBuf,
    /// Is the socket's directory not looked for at `path`, but the one whose descriptor comes beside the request? The
    /// path then says where that is for whoever asks, and its last part is the socket's name there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub directory_given: bool,
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
    /// twice is doing it once: a socket that is in place, in the same directory, is not bound anew. Answered with
    /// [`Response::Applied`]. Where [`SocketSpec::directory_given`], one descriptor comes beside it: the directory.
    Apply {
        /// The endpoint wanted.
        endpoint: Endpoint,
        /// Name of another endpoint. If that is in force with the same directory and configuration, what its trial
        /// found is taken for this one too, and nothing is tried.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tried_at: Option<String>,
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
    /// Answered with [`Response::Exchanging`] before it is done; [`SessionStatus::generation`] and
    /// [`SessionStatus::last_exchange`] tell how it went.
    Exchange {
        /// Name of the endpoint.
        name: String,
        /// Only this session.
        #[serde(default)]
        session: Option<String>,
    },
    /// End sessions of the endpoint, whatever their guests are doing. The endpoint goes on listening, if it did.
    /// Answered with [`Response::Closed`].
    Close {
        /// Name of the endpoint.
        name: String,
        /// Only this session.
        #[serde(default)]
        session: Option<String>,
    },
    /// Have every session of the endpoint let go of the source, so that the host can unmount it. Engines come to
    /// rest between two requests and end; guests wait, and so do VMMs that connect meanwhile. It ends with
    /// [`Request::Resume`] or by itself after the deadline. All sessions do it or none: answered with
    /// [`Response::Released`] once nothing of the source is open any more, or with [`Response::Refused`] and every
    /// session serving as before (`EngineStuck`: one did not come to rest; `FilesHeld`: guests would lose files).
    /// A source that is released already is released until the new deadline.
    Release {
        /// Name of the endpoint.
        name: String,
        /// After how many milliseconds sessions go on by themselves: [`SHORTEST_RELEASE_MS`] to
        /// [`LONGEST_RELEASE_MS`], letting go included.
        deadline_ms: u64,
        /// Also if guests have files open that no name leads to, which they lose by it.
        #[serde(default)]
        force: bool,
    },
    /// Take a released source up again. Answered with [`Response::Done`], or, where the source is not there, with
    /// [`Response::Refused`]: it stays released then. An endpoint that is not released stays as it is.
    Resume {
        /// Name of the endpoint.
        name: String,
    },
    /// Log the requests of one session for a while. A trace that runs already is prolonged or cut short, and what
    /// it has logged stays. Answered with [`Response::Tracing`].
    Trace {
        /// The session.
        session: String,
        /// For how many milliseconds; at most [`LONGEST_TRACE_MS`], 0: it ends now.
        duration_ms: u64,
        /// Most requests to log in one second, at most [`MAX_RATE`](crate::trace::MAX_RATE); what comes faster is
        /// counted and left out.
        rate: u32,
    },
    /// What has been logged since. Any number of readers may follow one trace, each with its own position.
    /// Answered with [`Response::Traced`].
    ReadTrace {
        /// The session.
        session: String,
        /// Where to go on: [`Traced::next`] of the answer before. 0: with the oldest that is still there.
        after: u64,
    },
    /// Keep this for the agent, which need not keep anything itself. It lasts as long as the broker. Answered with
    /// [`Response::Done`], or [`Response::Invalid`] beyond the limits of [`store`].
    Put {
        /// 1 to [`store::MAX_KEY`] bytes.
        key: String,
        /// At most [`store::MAX_VALUE`] bytes; none: the key is forgotten.
        value: Option<String>,
    },
    /// Answered with [`Response::Value`].
    Get {
        /// The key.
        key: String,
    },
    /// Which keys begin like this? Answered with [`Response::Keys`].
    ListKeys {
        /// How they begin.
        prefix: String,
    },
    /// Try a configuration on a source without serving it. Answered with [`Response::Tried`] or
    /// [`Response::Refused`].
    Preflight {
        /// Canonical path of the directory.
        source: PathBuf,
        /// As in [`Endpoint::sub_path`].
        #[serde(default)]
        sub_path: Option<PathBuf>,
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
    /// To `Remove`, `Resume` and `Put`.
    Done,
    /// To `Exchange`: it is under way.
    Exchanging {
        /// The sessions concerned.
        sessions: Vec<Exchanging>,
    },
    /// To `Close`.
    Closed {
        /// The sessions that were ended.
        sessions: Vec<String>,
    },
    /// To `Release`: nothing of the source is open any more.
    Released {
        /// The sessions that wait.
        sessions: Vec<String>,
        /// When they go on by themselves, in seconds since the Unix epoch.
        until: u64,
    },
    /// To `Trace`.
    Tracing {
        /// When it ends, in seconds since the Unix epoch.
        until: u64,
    },
    /// To `ReadTrace`.
    Traced(Traced),
    /// To `Get`.
    Value {
        /// What was put there; none: nothing.
        value: Option<String>,
    },
    /// To `ListKeys`.
    Keys {
        /// In order.
        keys: Vec<String>,
    },
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

/// A session that is about to have another engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exchanging {
    /// Its name.
    pub session: String,
    /// It is done once [`SessionStatus::generation`] is at least this.
    pub generation: u64,
}

/// A piece of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Traced {
    /// Requests in the order in which they were logged, which is that of their replies.
    pub entries: Vec<TraceEntry>,
    /// Where to go on.
    pub next: u64,
    /// How many between `after` and `next` were lost: overwritten before they were read.
    pub lost: u64,
    /// How many requests were left out since the trace began because they came too fast.
    pub left_out: u64,
    /// Has the time of the trace passed? What was logged can still be read.
    pub over: bool,
}

/// Limits of what the broker keeps for the agent.
pub mod store {
    /// Most bytes of a key.
    pub const MAX_KEY: usize = 256;
    /// Most bytes of a value.
    pub const MAX_VALUE: usize = 1 << 20;
    /// Most keys.
    pub const MAX_KEYS: usize = 4096;
    /// Most bytes of all keys and values.
    pub const MAX_TOTAL: usize = 16 << 20;
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
    /// Does it accept VMMs? Not when somebody has taken its socket away.
    pub listening: bool,
    /// What its last trial found.
    pub preflight: Preflight,
    /// Sessions that are connected.
    pub sessions: Vec<SessionStatus>,
    /// Connections that ended without becoming a session, since the broker started.
    pub refused_connections: u64,
    /// Those of them that were refused because the endpoint is exclusive and has a session.
    pub refused_exclusive: u64,
    /// The last connection that was turned away.
    pub last_refusal: Option<Turned>,
    /// Is the source released, and until when?
    pub released: Option<Released>,
    /// Sessions that began, since the broker started.
    pub sessions_started: u64,
    /// Engines that were started for its sessions, since the broker started; trials do not count.
    pub engines_started: u64,
    /// Counts of all sessions, those that have ended included. Never goes backwards while the broker lives.
    pub totals: Totals,
}

/// A connection that was turned away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Turned {
    /// When, in seconds since the Unix epoch.
    pub at: u64,
    /// Why.
    pub message: String,
}

/// A source that its sessions have let go of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Released {
    /// When they go on by themselves, in seconds since the Unix epoch.
    pub until: u64,
}

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum SessionState {
    /// The VMM is setting the device up.
    Connecting,
    /// The guest's driver has started the rings; requests are served.
    Serving,
    /// The rings are stopped (the VM is paused, or its driver is not loaded).
    Stopped,
    /// The engine has died, and another is about to take over.
    Recovering,
    /// The source was released; the guest waits until it is taken up again.
    Released,
    /// There is no engine, and there will not be one soon; see the finding.
    Failed,
}

impl SessionState {
    /// All of them.
    pub const ALL: [SessionState; 6] = [
        SessionState::Connecting,
        SessionState::Serving,
        SessionState::Stopped,
        SessionState::Recovering,
        SessionState::Released,
        SessionState::Failed,
    ];

    /// The word as it stands in status, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            SessionState::Connecting => "Connecting",
            SessionState::Serving => "Serving",
            SessionState::Stopped => "Stopped",
            SessionState::Recovering => "Recovering",
            SessionState::Released => "Released",
            SessionState::Failed => "Failed",
        }
    }
}

/// The file that an engine was started from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EngineBinary {
    /// Its inode number: another file at the same path has another one.
    pub inode: u64,
    /// Its size in bytes.
    pub size: u64,
    /// When it was modified last, in seconds since the Unix epoch.
    pub modified: u64,
}

/// What became of an engine's replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ExchangeOutcome {
    /// Planned: another engine took over between two requests.
    HandedOver,
    /// The engine had died: another has taken over.
    Recovered,
    /// Planned, and put off: the engine did not come to rest, or no other could be had. It serves on.
    PutOff,
}

/// The last replacement of a session's engine, or the last attempt at one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastExchange {
    /// When, in seconds since the Unix epoch.
    pub at: u64,
    /// What became of it.
    pub outcome: ExchangeOutcome,
    /// How long the guest waited, in nanoseconds.
    pub pause_ns: u64,
    /// Why it was put off.
    pub finding: Option<Finding>,
}

/// The request that an engine has been working on longest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OldestRequest {
    /// For how many milliseconds.
    pub age_ms: u64,
    /// Its FUSE opcode; [`OPERATION_NAMES`](crate::counters::OPERATION_NAMES) has its name.
    pub opcode: u32,
    /// FUSE's number of the node it is about.
    pub node: u64,
    /// Path of that node below the share's root, as far as the engine could tell. The guest chose it: it is to be
    /// escaped before a terminal sees it.
    pub path: Option<String>,
}

/// A session's trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace {
    /// When it ends, in seconds since the Unix epoch.
    pub until: u64,
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
    /// What it was started from.
    pub engine_binary: Option<EngineBinary>,
    /// Which order the engine that serves fulfils: each exchange and each change of configuration is one.
    pub generation: u64,
    /// The last order. More than `generation`: it is under way, or put off (see `last_exchange` and `finding`).
    pub wanted_generation: u64,
    /// The last replacement of its engine.
    pub last_exchange: Option<LastExchange>,
    /// The request in progress that began first.
    pub oldest_request: Option<OldestRequest>,
    /// Its trace, while one runs.
    pub trace: Option<Trace>,
    /// Open files of the guest that the broker keeps for it.
    pub parked_files: u64,
    /// Configuration of the engine that serves it.
    pub engine: EngineConfig,
    /// Bytes of guest memory that the VMM shared.
    pub guest_memory: u64,
    /// What that engine found.
    pub preflight: Option<Preflight>,
    /// Why it is `Failed`, or not served as asked.
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
