//! The answer as a document: `status.virtiofs.dev/v1`. Fields may be added in this version; none is taken
//! away, renamed or given another meaning.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::bail;
use schemars::JsonSchema;
use serde::Serialize;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{EngineBinary, Rejection, ReplacementOutcome, SessionState, SocketSpec};
use virtiofs_contract::counters::{Held, UnreachableMemory};
use virtiofs_contract::preflight::Preflight;
use virtiofs_contract::staleness::StaleEvent;
use virtiofs_crds::nearest;

use super::frontends::Mount;
use crate::desired::Problem;
use crate::notice::Notice;
use crate::report::ShareState;
use crate::staleness::ShareStaleness;

/// Version of the document.
pub(super) const VERSION: &str = "status.virtiofs.dev/v1";

/// One host.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    /// [`VERSION`].
    pub(super) api_version: &'static str,
    /// Always `HostStatus`.
    pub(super) kind: &'static str,
    /// Where the sockets are.
    pub(super) runtime_dir: PathBuf,
    /// The agent.
    pub(super) agent: Agent,
    /// The broker.
    pub(super) broker: Broker,
    /// Shares by name.
    pub(super) shares: Vec<Share>,
    /// Documents that were not accepted.
    pub(super) problems: Vec<Problem>,
}

/// The agent, as it last told.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Agent {
    /// Does it run? If not, what is said here about shares that the broker does not know is old.
    pub(super) running: bool,
    pub(super) pid: Option<u32>,
    pub(super) version: Option<String>,
    pub(super) shares_dir: Option<PathBuf>,
}

/// The broker.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Broker {
    pub(super) running: bool,
    pub(super) pid: Option<u32>,
    /// Why it did not answer.
    pub(super) error: Option<String>,
}

/// One share.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Share {
    pub(super) name: String,
    pub(super) state: ShareState,
    /// Why it is not `Ready`.
    pub(super) notices: Vec<Notice>,
    /// The directory as it was declared; the canonical one is in `inForce`.
    pub(super) source: PathBuf,
    /// What the broker serves; none: nothing.
    pub(super) in_force: Option<InForce>,
    /// VMs that are connected.
    pub(super) sessions: Vec<Session>,
    /// Counts of all sessions since the broker started.
    pub(super) counts: Counts,
    /// How it stands with staleness; none: the agent has not said yet, or the share is declared no more.
    pub(super) staleness: Option<ShareStaleness>,
    /// How a VM gets it.
    pub(super) mount: Mount,
    /// Until when its source is released, in seconds since the Unix epoch; null: it is not.
    pub(super) released_until: Option<u64>,
    /// Every socket at which it is offered, its own first.
    pub(super) sockets: Vec<OfferedAt>,
    /// Connections that became no session since the broker started, and those of them that were refused because
    /// the content is exclusive and in use.
    pub(super) rejected_connections: u64,
    pub(super) rejected_exclusive: u64,
    /// The last connection that was turned away.
    pub(super) last_rejection: Option<Rejection>,
}

/// One socket of a share.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct OfferedAt {
    /// Name of the endpoint: the share's, or SHARE.NAME.
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Directory of the share that is offered there; null: all of it.
    pub(super) sub_path: Option<PathBuf>,
    /// For whom it is, such as `pod NAMESPACE/NAME` of a volume; null: for whoever may connect.
    pub(super) consumer: Option<String>,
    /// Does it accept VMs?
    pub(super) listening: bool,
}

/// What the broker serves.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct InForce {
    /// Does it accept VMs?
    pub(super) listening: bool,
    /// Canonical path of the directory.
    pub(super) source: PathBuf,
    pub(super) socket: SocketSpec,
    /// Is a second session at the same time refused?
    pub(super) exclusive: bool,
    /// Configuration of engines that start from now on.
    pub(super) engine: EngineConfig,
    /// What the last trial found.
    pub(super) preflight: Preflight,
}

/// One VM that is connected.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Session {
    pub(super) id: String,
    pub(super) state: SessionState,
    /// Why it failed.
    pub(super) notices: Vec<Notice>,
    /// Process that connected, as the kernel recorded it: a record, not an authority. 0: one that the broker, in
    /// a container, cannot see.
    pub(super) vmm_pid: i32,
    /// Seconds since the Unix epoch.
    pub(super) connected_at: u64,
    pub(super) engine_pid: Option<u32>,
    /// How many engines have served it so far.
    pub(super) engines: u64,
    /// Configuration of the engine that serves it.
    pub(super) engine: EngineConfig,
    /// Fields in which that differs from the share's configuration in force: the share was changed meanwhile.
    pub(super) differs: Vec<&'static str>,
    /// What that engine found.
    pub(super) preflight: Option<Preflight>,
    pub(super) guest_memory_bytes: u64,
    /// Open file descriptors of the engine, and how many it may have.
    pub(super) open_files: u64,
    pub(super) open_files_limit: Option<u64>,
    /// What the guest holds, and how many inodes it may hold.
    pub(super) held: Held,
    pub(super) inodes_limit: u64,
    pub(super) counts: Counts,
    /// Name of the socket that it came by.
    pub(super) endpoint: String,
    /// Directory of the share that it has; null: all of it.
    pub(super) sub_path: Option<PathBuf>,
    /// For whom that socket is, such as `pod NAMESPACE/NAME` of a volume; null: for whoever may connect.
    pub(super) consumer: Option<String>,
    /// The request in progress that began first.
    pub(super) oldest_request: Option<Oldest>,
    /// The last time that its engine was replaced, or was to be.
    pub(super) last_replacement: Option<Exchanged>,
    /// What its engine was started from.
    pub(super) engine_binary: Option<EngineBinary>,
    /// How many hand-overs and changes of configuration its engine has, and how many it should have by now.
    pub(super) active_generation: u64,
    pub(super) desired_generation: u64,
    /// Until when its requests are traced, in seconds since the Unix epoch.
    pub(super) traced_until: Option<u64>,
    /// Open files of the guest that the broker keeps for it.
    pub(super) stashed_files: u64,
    /// Its last stale events, the oldest first.
    pub(super) stale_events: Vec<StaleEvent>,
    /// How the source's path leads to something else than what it serves, if it does.
    pub(super) source_gone: Option<String>,
    /// Guest memory that requests needed and the VMM does not share.
    pub(super) unreachable_memory: Option<UnreachableMemory>,
}

/// A request in progress.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Oldest {
    pub(super) operation: &'static str,
    pub(super) age_milliseconds: u64,
    /// FUSE's number of the node it is about, and its path below the share's root as far as it is known. The guest
    /// chose that: it may hold anything.
    pub(super) node: u64,
    pub(super) path: Option<String>,
}

/// What became of a replacement of an engine.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Exchanged {
    /// Seconds since the Unix epoch.
    pub(super) at: u64,
    pub(super) outcome: ReplacementOutcome,
    /// How long the guest waited.
    pub(super) pause_nanoseconds: u64,
    /// Why it was put off.
    pub(super) notice: Option<Notice>,
}

/// What was counted.
#[derive(Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Counts {
    pub(super) requests: u64,
    /// Replies that carried an error. Many are answers like any other: a name that does not exist.
    pub(super) errors: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    /// Requests that were not well formed.
    pub(super) malformed: u64,
    /// Requests that need guest memory which the VMM does not share.
    pub(super) unreachable_memory: u64,
    pub(super) requests_by_operation: BTreeMap<&'static str, u64>,
    pub(super) errors_by_errno: BTreeMap<&'static str, u64>,
    /// Stale events by cause; causes that never occurred are left out.
    pub(super) stale_by_cause: BTreeMap<&'static str, u64>,
    /// Engines exchanged under guests.
    pub(super) replacements: ReplacementCounts,
}

/// How often engines were exchanged, and how long guests waited for it.
#[derive(Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReplacementCounts {
    /// Planned ones.
    pub(super) hand_overs: PauseCounts,
    /// Planned ones that were put off, because the engine did not come to rest or its successor failed.
    pub(super) aborted: u64,
    /// After an engine's death.
    pub(super) recoveries: PauseCounts,
    /// Deaths after which no other engine served before the session ended.
    pub(super) abandoned: u64,
}

/// Pauses of one kind.
#[derive(Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct PauseCounts {
    pub(super) count: u64,
    /// Their sum.
    pub(super) nanoseconds: u64,
    /// A bound that the longest did not exceed; null: there was none, or one beyond all bounds.
    pub(super) longest_below_nanoseconds: Option<u64>,
}

impl Document {
    /// Keeps the shares of these names; all where none is given.
    pub(super) fn select(&mut self, names: &[String]) -> anyhow::Result<()> {
        let known = || self.shares.iter().map(|share| share.name.as_str());
        if let Some(unknown) = names.iter().find(|name| !known().any(|it| it == **name)) {
            let guess = nearest(unknown, known()).map(|near| format!(" Did you mean {near:?}?")).unwrap_or_default();
            bail!("there is no share {unknown:?} here.{guess} `virtiofs-agent status` lists all");
        }
        if !names.is_empty() {
            self.shares.retain(|share| names.contains(&share.name));
        }
        Ok(())
    }
}
