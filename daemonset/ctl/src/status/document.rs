//! The status as a document: `status.virtiofs.dev/v1`. This version may gain fields; no field is removed, renamed or given
//! another meaning.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::bail;
use schemars::JsonSchema;
use serde::Serialize;
use virtiofs_client::notice::Notice;
use virtiofs_client::report::{Problem, ShareState};
use virtiofs_client::staleness::ShareStaleness;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{EngineBinary, Rejection, ReplacementOutcome, SessionState, SocketSpec};
use virtiofs_contract::counters::{Held, UnreachableMemory};
use virtiofs_contract::preflight::Preflight;
use virtiofs_contract::staleness::StaleEvent;
use virtiofs_crds::nearest;

use super::frontends::Mount;

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
    /// Directory of the sockets.
    pub(super) runtime_dir: PathBuf,
    /// The agent.
    pub(super) agent: Agent,
    /// The broker.
    pub(super) broker: Broker,
    /// Shares by name.
    pub(super) shares: Vec<Share>,
    /// Rejected documents.
    pub(super) problems: Vec<Problem>,
}

/// The agent, from its last report.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Agent {
    /// True if it runs. If not, the state of shares that the broker does not serve is from its last report.
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
    /// The source as declared; `active` has the canonical path.
    pub(super) source: PathBuf,
    /// What the broker serves; null: nothing.
    pub(super) active: Option<ActiveConfig>,
    /// VMs that are connected.
    pub(super) sessions: Vec<Session>,
    /// Counts of all sessions since the broker started.
    pub(super) counts: Counts,
    /// Its staleness; null: the agent has not reported it yet, or the share is not declared any more.
    pub(super) staleness: Option<ShareStaleness>,
    /// How to attach it to a VM.
    pub(super) mount: Mount,
    /// Until when its source is released, in seconds since the Unix epoch; null: not released.
    pub(super) released_until: Option<u64>,
    /// All its sockets, its own first.
    pub(super) sockets: Vec<Socket>,
    /// Connections that did not become a session since the broker started, and those of them that were rejected because the
    /// content is exclusive and in use.
    pub(super) rejected_connections: u64,
    pub(super) rejected_exclusive: u64,
    /// The last rejected connection.
    pub(super) last_rejection: Option<Rejection>,
}

/// One socket of a share.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Socket {
    /// Name of the endpoint: SHARE, SHARE.NAME, or SHARE.volume.KEY.
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Directory of the share that is served there; null: all of it.
    pub(super) sub_path: Option<PathBuf>,
    /// Its consumer, such as `pod NAMESPACE/NAME` of a volume; null: any VM that may connect.
    pub(super) consumer: Option<String>,
    /// True if VMs can connect.
    pub(super) listening: bool,
}

/// What the broker serves.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ActiveConfig {
    /// True if VMs can connect.
    pub(super) listening: bool,
    /// Canonical path of the directory.
    pub(super) source: PathBuf,
    pub(super) socket: SocketSpec,
    /// True if a second session is rejected while one runs.
    pub(super) exclusive: bool,
    /// Configuration of new engines.
    pub(super) engine: EngineConfig,
    /// What the last trial engine found.
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
    /// Process that connected, as recorded by the kernel; not a proof of identity. 0: a process outside of the broker's PID
    /// namespace.
    pub(super) vmm_pid: i32,
    /// Seconds since the Unix epoch.
    pub(super) connected_at: u64,
    pub(super) engine_pid: Option<u32>,
    /// Number of engines that have served it.
    pub(super) engines: u64,
    /// Configuration of the engine that serves it.
    pub(super) engine: EngineConfig,
    /// Fields in which that differs from the share's active configuration, because the share was changed meanwhile.
    pub(super) differs: Vec<&'static str>,
    /// What that engine found.
    pub(super) preflight: Option<Preflight>,
    pub(super) guest_memory_bytes: u64,
    /// Memory that is charged to the session's control group; null if it has none.
    pub(super) charged_memory_bytes: Option<u64>,
    /// Open file descriptors of the engine, and their limit.
    pub(super) open_files: u64,
    pub(super) open_files_limit: Option<u64>,
    /// What the guest holds, and its limit of inodes.
    pub(super) held: Held,
    pub(super) inodes_limit: u64,
    pub(super) counts: Counts,
    /// Endpoint of its connection.
    pub(super) endpoint: String,
    /// Directory of the share that is served to it; null: all of it.
    pub(super) sub_path: Option<PathBuf>,
    /// Consumer of that endpoint, such as `pod NAMESPACE/NAME` of a volume; null: any VM that may connect.
    pub(super) consumer: Option<String>,
    /// The request in progress that began first.
    pub(super) oldest_request: Option<Oldest>,
    /// The last replacement of its engine, or the last attempt.
    pub(super) last_replacement: Option<Replacement>,
    /// The binary of its engine.
    pub(super) engine_binary: Option<EngineBinary>,
    /// Generation of its engine, and the desired one; each hand-over and each change of the configuration raises it.
    pub(super) active_generation: u64,
    pub(super) desired_generation: u64,
    /// Until when its requests are traced, in seconds since the Unix epoch.
    pub(super) traced_until: Option<u64>,
    /// Open files of the guest in the broker's fd stash.
    pub(super) stashed_files: u64,
    /// Its last stale events, the oldest first.
    pub(super) stale_events: Vec<StaleEvent>,
    /// How the source's path leads to something other than what it serves; null: it does not.
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
    /// FUSE node id it is about, and its path relative to the share's root as far as known. The guest chose the path: it may
    /// contain anything.
    pub(super) node: u64,
    pub(super) path: Option<String>,
}

/// A replacement of an engine.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Replacement {
    /// Seconds since the Unix epoch.
    pub(super) at: u64,
    pub(super) outcome: ReplacementOutcome,
    /// How long the guest waited.
    pub(super) pause_nanoseconds: u64,
    /// Why it was aborted.
    pub(super) notice: Option<Notice>,
}

/// Counts.
#[derive(Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Counts {
    pub(super) requests: u64,
    /// Replies with an error. Many are normal, such as for a missing name.
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
    /// Replacements of engines under guests.
    pub(super) replacements: ReplacementCounts,
}

/// Counts of engine replacements, and how long guests waited.
#[derive(Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReplacementCounts {
    /// Hand-overs.
    pub(super) hand_overs: PauseCounts,
    /// Hand-overs that were aborted, because the engine could not be quiesced or its successor failed.
    pub(super) aborted: u64,
    /// Recoveries after an engine's death.
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
    /// An upper bound of the longest; null: there was none, or it exceeds the largest bound.
    pub(super) longest_below_nanoseconds: Option<u64>,
}

impl Document {
    /// Keeps the shares of these names; all if none is given.
    pub(super) fn select(&mut self, names: &[String]) -> anyhow::Result<()> {
        let known = || self.shares.iter().map(|share| share.name.as_str());
        if let Some(unknown) = names.iter().find(|name| !known().any(|it| it == **name)) {
            let guess = nearest(unknown, known()).map(|near| format!(" Did you mean {near:?}?")).unwrap_or_default();
            bail!("there is no share {unknown:?} on this host.{guess} `virtiofsctl status` lists all");
        }
        if !names.is_empty() {
            self.shares.retain(|share| names.contains(&share.name));
        }
        Ok(())
    }
}
