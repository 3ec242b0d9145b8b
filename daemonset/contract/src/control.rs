//! Agent <-> broker: requests and responses on the broker's control socket.
//!
//! Each [`Request`] gets one [`Response`], in order. The first request of a connection is [`Request::Hello`].

mod session_state;
pub mod store;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::counters::{Held, Totals, UnreachableMemory};
use crate::preflight::{Finding, Preflight};
use crate::staleness::StaleEvent;
use crate::trace::TraceEntry;
use crate::versions::Versions;
use virtiofs_config::EngineConfig;

pub use session_state::SessionState;

/// Shortest time, in milliseconds, for which a source may be released.
pub const SHORTEST_RELEASE_MS: u64 = 1000;

/// Longest time, in milliseconds, for which a source may be released.
pub const LONGEST_RELEASE_MS: u64 = 24 * 60 * 60 * 1000;

/// Longest time, in milliseconds, for which a session may be traced.
pub const LONGEST_TRACE_MS: u64 = 60 * 60 * 1000;

/// A socket where VMMs connect, with one source and one configuration for all sessions that start there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Endpoint {
    /// Name of the endpoint, unique in this broker: at most 253 of `[a-z0-9.-]`.
    pub name: String,
    /// Who requested the endpoint.
    pub kind: EndpointKind,
    /// Canonical path of the directory to serve.
    pub source: PathBuf,
    /// Directory below the source that is served instead of it: a relative path without `.` and `..`. It is
    /// resolved at each engine start, never leaves the source and never follows a symbolic link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_path: Option<PathBuf>,
    /// The socket to listen on.
    pub socket: SocketSpec,
    /// Configuration of its engines. When it changes, running sessions are handed over to engines with the new one.
    pub engine: EngineConfig,
    /// True if at most one session may run at a time. Sessions at other exclusive endpoints of the same source count
    /// too, so a second endpoint is no way around it.
    #[serde(default)]
    pub exclusive: bool,
    /// The consumer, as `GROUP/NAME` (`pod NAMESPACE/NAME`). All endpoints of a consumer share one budget of sessions, and so
    /// do all consumers of a group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consumer: Option<String>,
}

/// Who requested an endpoint. The kind also decides how the directory of its socket is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum EndpointKind {
    /// A share: its own endpoint.
    Share,
    /// A person, with the `socket` command.
    Socket,
    /// A pod, through the CSI driver. The directory of the socket is not looked up by its path: the request carries its
    /// descriptor. The path is for display; its last component names the socket in that directory.
    Volume,
    /// A process that made its socket itself, as `virtiofsd-live` does. The request carries the socket, which listens. The
    /// broker accepts connections at it and leaves its file alone; path, owner and mode are for display.
    Listener,
}

impl EndpointKind {
    /// Descriptors that [`Request::Apply`] carries for an endpoint of this kind.
    pub fn descriptors(self) -> usize {
        match self {
            EndpointKind::Share | EndpointKind::Socket => 0,
            EndpointKind::Volume | EndpointKind::Listener => 1,
        }
    }
}

/// Where to listen, and who may connect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    /// The first request. Reply: [`Response::Welcome`].
    Hello {
        /// The oldest version that the sender speaks. A broker of version 4 requires its own here.
        version: u32,
        /// The newest one; none: the same.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        newest: Option<u32>,
    },
    /// Create or change the endpoint of this name. The broker first tries the configuration in a preflight; if that
    /// fails, nothing changes and the reply is [`Response::Refused`]. Idempotent: a socket that already listens in the
    /// same directory is not bound again. Reply: [`Response::Applied`]. Carries [`EndpointKind::descriptors`].
    Apply {
        /// The desired endpoint.
        endpoint: Endpoint,
        /// Name of another endpoint. If that one is active with the same directory and configuration, its preflight
        /// result is used and no preflight runs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reuse_preflight_of: Option<String>,
    },
    /// Stop listening at the endpoint. Its sessions continue until their VMM disconnects; with `force` they end at
    /// once. An unknown name is no error. Reply: [`Response::Done`].
    Remove {
        /// Name of the endpoint.
        name: String,
        /// End its sessions too.
        force: bool,
    },
    /// Hand every session of the endpoint over to a new engine, to use a new binary or as a remedy. The new engine takes
    /// over between two requests. An engine that does not quiesce continues to serve, and the session gets a finding.
    /// Reply: [`Response::HandingOver`], before it is done; [`SessionStatus::active_generation`] and
    /// [`SessionStatus::last_replacement`] report the outcome.
    HandOver {
        /// Name of the endpoint.
        name: String,
        /// Only this session.
        #[serde(default)]
        session: Option<String>,
    },
    /// End sessions of the endpoint, whatever their guests are doing. The endpoint continues to listen. Reply:
    /// [`Response::Closed`].
    Close {
        /// Name of the endpoint.
        name: String,
        /// Only this session.
        #[serde(default)]
        session: Option<String>,
    },
    /// Make every session of the endpoint close the source, so that the host can unmount it. Engines quiesce and end;
    /// guests wait, and so do VMMs that connect meanwhile. Sessions resume on [`Request::Resume`] or at the deadline.
    /// All sessions release the source or none does. Reply: [`Response::Released`] once nothing of the source is open,
    /// or [`Response::Refused`] with every session serving as before (`EngineStuck`: an engine did not quiesce;
    /// `OrphanedFilesOpen`: guests would lose files). Releasing a released source sets a new deadline.
    Release {
        /// Name of the endpoint.
        name: String,
        /// Milliseconds after which sessions resume by themselves, the time to release included:
        /// [`SHORTEST_RELEASE_MS`] to [`LONGEST_RELEASE_MS`].
        deadline_ms: u64,
        /// Release even if guests lose open files to which no name leads.
        #[serde(default)]
        force: bool,
    },
    /// Use a released source again. Reply: [`Response::Done`], or [`Response::Refused`] if the source is not there; it
    /// then stays released. No effect on an endpoint that is not released.
    Resume {
        /// Name of the endpoint.
        name: String,
    },
    /// Log the requests of one session for a while. A trace that is running gets the new duration and keeps its
    /// entries. Reply: [`Response::Tracing`].
    Trace {
        /// The session.
        session: String,
        /// Duration in milliseconds; at most [`LONGEST_TRACE_MS`], 0: the trace ends now.
        duration_ms: u64,
        /// Most requests to log in one second, at most [`MAX_RATE`](crate::trace::MAX_RATE); further requests are only
        /// counted.
        rate: u32,
    },
    /// Read entries of a trace. Any number of readers may follow one trace, each from its own position. Reply:
    /// [`Response::TraceEntries`].
    ReadTrace {
        /// The session.
        session: String,
        /// Position to read from: [`TraceReply::next`] of the previous reply; 0: the oldest entry that is left.
        after: u64,
    },
    /// Store a value for the agent. It lasts as long as the broker. Reply: [`Response::Done`], or
    /// [`Response::InvalidRequest`] beyond the limits of [`store`].
    Put {
        /// 1 to [`store::MAX_KEY`] bytes.
        key: String,
        /// At most [`store::MAX_VALUE`] bytes; none: the key is deleted.
        value: Option<String>,
    },
    /// Read a stored value. Reply: [`Response::Value`].
    Get {
        /// The key.
        key: String,
    },
    /// List stored keys. Reply: [`Response::Keys`].
    ListKeys {
        /// Prefix of the keys.
        prefix: String,
    },
    /// Try a configuration on a source without serving it. Reply: [`Response::PreflightPassed`] or
    /// [`Response::Refused`].
    Preflight {
        /// Canonical path of the directory.
        source: PathBuf,
        /// As in [`Endpoint::sub_path`].
        #[serde(default)]
        sub_path: Option<PathBuf>,
        /// The configuration.
        engine: EngineConfig,
    },
    /// End all sessions for good and serve nothing more, before the broker is stopped or uninstalled. Without it, sessions
    /// outlive a broker that has a holder. Reply: [`Response::Drained`].
    Drain,
    /// Report the broker's status, in pages. Reply: [`Response::Status`].
    Status {
        /// Where the page begins: [`Status::next`] of the page before; none: the first page.
        #[serde(default)]
        after: Option<StatusPosition>,
    },
}

impl Request {
    /// The first request of this program.
    pub fn hello() -> Self {
        Request::Hello { version: Versions::OURS.oldest, newest: Some(Versions::OURS.newest) }
    }
}

/// Broker to agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// To `Hello`.
    Welcome {
        /// The version that both sides speak from now on: the highest common one.
        version: u32,
        /// The broker's process id.
        pid: u32,
    },
    /// To `Apply`: the endpoint is active.
    Applied {
        /// Result of the preflight.
        preflight: Preflight,
    },
    /// To `Preflight`.
    PreflightPassed {
        /// Result of the preflight.
        preflight: Preflight,
    },
    /// To `Remove`, `Resume` and `Put`.
    Done,
    /// To `HandOver`: it has begun.
    HandingOver {
        /// The sessions concerned.
        sessions: Vec<PendingHandOver>,
    },
    /// To `Close`.
    Closed {
        /// The sessions that were ended.
        sessions: Vec<String>,
    },
    /// To `Release`: nothing of the source is open.
    Released {
        /// The sessions that wait.
        sessions: Vec<String>,
        /// When they resume by themselves, in seconds since the Unix epoch.
        until: u64,
    },
    /// To `Trace`.
    Tracing {
        /// When it ends, in seconds since the Unix epoch.
        until: u64,
    },
    /// To `ReadTrace`.
    TraceEntries(TraceReply),
    /// To `Get`.
    Value {
        /// The stored value; none: the key does not exist.
        value: Option<String>,
    },
    /// To `ListKeys`.
    Keys {
        /// In order.
        keys: Vec<String>,
    },
    /// To `Drain`: nothing is served any more.
    Drained {
        /// Sessions that were ended.
        sessions: u64,
    },
    /// To `Status`.
    Status(Box<Status>),
    /// The request cannot be fulfilled; nothing was changed.
    Refused {
        /// The reason, and the remedy.
        finding: Finding,
    },
    /// The request is not valid; nothing was changed.
    InvalidRequest {
        /// What is wrong with it.
        message: String,
    },
}

/// A session that is being handed over to a new engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PendingHandOver {
    /// Name of the session.
    pub session: String,
    /// The hand-over is done once [`SessionStatus::active_generation`] is at least this.
    pub generation: u64,
}

/// Entries of a trace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceReply {
    /// Requests in the order in which they were logged, which is the order of their replies.
    pub entries: Vec<TraceEntry>,
    /// Position of the next entry.
    pub next: u64,
    /// Entries between `after` and `next` that were overwritten before they were read.
    pub lost: u64,
    /// Requests since the trace began that exceeded the rate and were not logged.
    pub rate_limited: u64,
    /// True if the trace has ended. Its entries can still be read.
    pub ended: bool,
}

/// The broker as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The broker's process id.
    pub pid: u32,
    /// Identity of the counts: a broker that continues the sessions of an earlier one has the same. If it differs, all
    /// counts began at zero.
    pub instance: u64,
    /// Whether sessions outlive the broker.
    pub holder: HolderState,
    /// Endpoints that listen, and removed ones with sessions left, in the order of their names.
    pub endpoints: Vec<EndpointStatus>,
    /// Where the next page begins; none: this is the last one.
    #[serde(default)]
    pub next: Option<StatusPosition>,
}

impl Status {
    /// Adds the page that follows. An endpoint whose sessions are on several pages has all of them then.
    pub fn append(&mut self, page: Status) {
        self.next = page.next;
        for endpoint in page.endpoints {
            match self.endpoints.last_mut().filter(|last| last.endpoint.name == endpoint.endpoint.name) {
                Some(last) => last.sessions.extend(endpoint.sessions),
                None => self.endpoints.push(endpoint),
            }
        }
    }
}

/// A position in the status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusPosition {
    /// Name of the last endpoint of a page.
    pub endpoint: String,
    /// The last session, if sessions of that endpoint follow.
    pub session: Option<String>,
}

/// Who holds the descriptors of sessions while no broker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HolderState {
    /// Nobody: sessions end with the broker.
    None,
    /// A keeper or systemd has everything.
    Connected,
    /// There is no keeper at the moment: sessions would end with the broker.
    Missing,
}

/// One endpoint as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointStatus {
    /// The active endpoint.
    pub endpoint: Endpoint,
    /// Number of the endpoint within [`Status::instance`]. An endpoint that is removed and applied again has another one, and
    /// its counts begin at zero.
    #[serde(default)]
    pub serial: u64,
    /// True if it accepts VMMs. False if the socket was removed from its directory.
    pub listening: bool,
    /// Result of its last preflight.
    pub preflight: Preflight,
    /// Sessions that are connected.
    pub sessions: Vec<SessionStatus>,
    /// Connections that ended without becoming a session, since the broker started.
    pub rejected_connections: u64,
    /// Those of them that were rejected because the endpoint is exclusive and has a session.
    pub rejected_exclusive: u64,
    /// Sessions that ended because engines could not share their guests' memory. The guests' mounts hang.
    #[serde(default)]
    pub rejected_memory: u64,
    /// The last connection that was rejected.
    pub last_rejection: Option<Rejection>,
    /// Present while the source is released.
    pub released: Option<Released>,
    /// Sessions that began, under this broker and those before it that it continues.
    pub sessions_started: u64,
    /// Sessions that were lost with an earlier broker: it ended, and they could not be restored.
    #[serde(default)]
    pub sessions_lost: u64,
    /// The last [`LOST_LISTED`] of them, oldest first.
    #[serde(default)]
    pub lost: Vec<LostSession>,
    /// Engines that were started for its sessions, since the broker started; preflights do not count.
    pub engines_started: u64,
    /// Counts of all sessions, ended ones included. They never decrease while the broker runs.
    pub totals: Totals,
}

/// Most lost sessions that an endpoint lists.
pub const LOST_LISTED: usize = 16;

/// A session that was lost with an earlier broker.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LostSession {
    /// When the broker found that it is lost, in seconds since the Unix epoch.
    pub at: u64,
    /// Name of the session.
    pub session: String,
}

/// A connection that was rejected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rejection {
    /// Time of the rejection, in seconds since the Unix epoch.
    pub at: u64,
    /// Reason of the rejection.
    pub message: String,
}

/// A source that its sessions have released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Released {
    /// When they resume by themselves, in seconds since the Unix epoch.
    pub until: u64,
}

/// The file that an engine was started from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EngineBinary {
    /// Its inode number, which differs for another file at the same path.
    pub inode: u64,
    /// Its size in bytes.
    pub size: u64,
    /// When it was modified last, in seconds since the Unix epoch.
    pub modified: u64,
}

/// Outcome of an engine's replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReplacementOutcome {
    /// Planned: another engine took over between two requests.
    HandedOver,
    /// The engine had died; another one took over.
    Recovered,
    /// Planned and aborted: the engine did not quiesce, or no other one could be started. It continues to serve.
    Aborted,
}

/// The last replacement of a session's engine, or the last attempt at one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastReplacement {
    /// Time of the outcome, in seconds since the Unix epoch.
    pub at: u64,
    /// The outcome.
    pub outcome: ReplacementOutcome,
    /// Pause of the guest, in nanoseconds.
    pub pause_ns: u64,
    /// Why it was aborted.
    pub finding: Option<Finding>,
}

/// The oldest request in progress.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OldestRequest {
    /// Its age, in milliseconds.
    pub age_ms: u64,
    /// Its FUSE opcode; [`OPERATION_NAMES`](crate::counters::OPERATION_NAMES) has its name.
    pub opcode: u32,
    /// FUSE node id that it is about.
    pub node: u64,
    /// Path of that node below the share's root, if the engine knows it. The guest chose it: escape it before printing
    /// it on a terminal.
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
    /// Its state.
    pub state: SessionState,
    /// Process that connected, as the kernel recorded it; for information, not for access control. 0: a process outside the
    /// broker's PID namespace.
    pub vmm_pid: i32,
    /// Seconds since the Unix epoch at which it connected.
    pub connected_at: u64,
    /// Process id of the engine that serves it.
    pub engine_pid: Option<u32>,
    /// Number of engines that have served it so far.
    pub engines: u64,
    /// The file that the serving engine was started from.
    pub engine_binary: Option<EngineBinary>,
    /// Generation of the serving engine. Each requested hand-over and each change of configuration begins a new one.
    pub active_generation: u64,
    /// The last requested generation. If it is above `active_generation`, a hand-over is in progress or was aborted
    /// (see `last_replacement` and `finding`).
    pub desired_generation: u64,
    /// The last replacement of its engine, or the last attempt at one.
    pub last_replacement: Option<LastReplacement>,
    /// The oldest request in progress.
    pub oldest_request: Option<OldestRequest>,
    /// Its trace, while one runs.
    pub trace: Option<Trace>,
    /// Open files of the guest in the fd stash.
    pub stashed_files: u64,
    /// Configuration of the engine that serves it.
    pub engine: EngineConfig,
    /// Bytes of guest memory that the VMM shared.
    pub guest_memory: u64,
    /// Bytes that its engines have used first and that are charged to its control group: of the guest's memory, of their
    /// own, and of the page cache. None: it has no group, and they are charged to the broker's.
    #[serde(default)]
    pub charged_memory: Option<u64>,
    /// What that engine found in its preflight.
    pub preflight: Option<Preflight>,
    /// Why it is `Failed`, or not served with the desired configuration.
    pub finding: Option<Finding>,
    /// Open file descriptors of the engine process.
    pub open_files: u64,
    /// What the guest holds after its last request.
    pub held: Held,
    /// Limit of inodes that it may hold: the smaller of `engine.maxInodes` now and when it connected, because the size of
    /// the session's ledger is fixed.
    pub inodes_limit: u64,
    /// Counts of this session.
    pub totals: Totals,
    /// The last stale events, the oldest first.
    #[serde(default)]
    pub stale_events: Vec<StaleEvent>,
    /// Set if the path of the source no longer leads to the directory that is served: says where it leads.
    #[serde(default)]
    pub source_gone: Option<String>,
    /// Guest memory that requests needed and the VMM does not share.
    #[serde(default)]
    pub unreachable_memory: Option<UnreachableMemory>,
}
