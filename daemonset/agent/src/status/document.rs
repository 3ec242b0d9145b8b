//! The answer as a document: `status.virtiofs.dev/v1`. Fields may be added in this version; none is taken
//! away, renamed or given another meaning. Where both know of a share, the agent says how it is doing and the
//! broker what is in force.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::bail;
use schemars::JsonSchema;
use serde::Serialize;
use virtiofs_contract::config::{Access, EngineConfig};
use virtiofs_contract::control::{
    Endpoint, EndpointStatus, EngineBinary, ExchangeOutcome, SessionState, SessionStatus, SocketSpec, Status, Turned,
};
use virtiofs_contract::counters::{Exchanges, Held, OPERATION_NAMES, Pauses, Totals};
use virtiofs_contract::preflight::Preflight;
use virtiofs_contract::staleness::StaleEvent;
use virtiofs_crds::{changes, nearest};

use super::frontends::{Mount, mount};
use crate::broker::client::ClientError;
use crate::desired::Problem;
use crate::errno_names::errno_name;
use crate::notice::{BROKER_UNAVAILABLE, Notice};
use crate::offer::share_name;
use crate::published::Published;
use crate::report::{ShareReport, ShareState};
use crate::runtime_dir::RuntimeDir;
use crate::staleness::ShareStaleness;

/// Version of the document.
const VERSION: &str = "status.virtiofs.dev/v1";

/// One host.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Document {
    /// [`VERSION`].
    api_version: &'static str,
    /// Always `HostStatus`.
    kind: &'static str,
    /// Where the sockets are.
    runtime_dir: PathBuf,
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
    pub(super) refused_connections: u64,
    pub(super) refused_exclusive: u64,
    /// The last connection that was turned away.
    pub(super) last_refusal: Option<Turned>,
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
    /// The request in progress that began first.
    pub(super) oldest_request: Option<Oldest>,
    /// The last time that its engine was replaced, or was to be.
    pub(super) last_exchange: Option<Exchanged>,
    /// What its engine was started from.
    pub(super) engine_binary: Option<EngineBinary>,
    /// How many hand-overs and changes of configuration its engine has, and how many it should have by now.
    pub(super) generation: u64,
    pub(super) wanted_generation: u64,
    /// Until when its requests are traced, in seconds since the Unix epoch.
    pub(super) traced_until: Option<u64>,
    /// Open files of the guest that the broker keeps for it.
    pub(super) parked_files: u64,
    /// Its last stale events, the oldest first.
    pub(super) stale_events: Vec<StaleEvent>,
    /// How the source's path leads to something else than what it serves, if it does.
    pub(super) source_gone: Option<String>,
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
    pub(super) outcome: ExchangeOutcome,
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
    pub(super) requests_by_operation: BTreeMap<&'static str, u64>,
    pub(super) errors_by_errno: BTreeMap<&'static str, u64>,
    /// Stale events by cause; causes that never occurred are left out.
    pub(super) stale_by_cause: BTreeMap<&'static str, u64>,
    /// Engines exchanged under guests.
    pub(super) exchanges: ExchangeCounts,
}

/// How often engines were exchanged, and how long guests waited for it.
#[derive(Debug, Default, PartialEq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ExchangeCounts {
    /// Planned ones.
    pub(super) hand_overs: PauseCounts,
    /// Planned ones that were put off, because the engine did not come to rest or its successor failed.
    pub(super) put_off: u64,
    /// After an engine's death.
    pub(super) recoveries: PauseCounts,
    /// Deaths after which no other engine served before the session ended.
    pub(super) given_up: u64,
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

/// Puts together what the broker answered and the agent has published.
pub(super) fn gather(
    runtime_dir: &RuntimeDir,
    agent_runs: bool,
    published: Option<Published>,
    broker: Result<Status, ClientError>,
) -> Document {
    let (broker, endpoints) = broker_part(broker);
    let (agent, report) = agent_part(agent_runs, published);
    let mut served: BTreeMap<String, Vec<EndpointStatus>> = BTreeMap::new();
    for endpoint in endpoints {
        served.entry(share_name(&endpoint.endpoint.name).to_owned()).or_default().push(endpoint);
    }
    let mut report = report.unwrap_or_default();
    let (known, problems) = (report.shares, report.problems);
    let mut shares: Vec<_> = known.into_iter().map(|it| reported(it, &mut served, broker.running)).collect();
    for share in &mut shares {
        share.staleness = report.staleness.remove(&share.name);
    }
    shares.extend(served.into_iter().filter_map(|(name, endpoints)| unreported(&name, endpoints)));
    shares.sort_by(|a, b| a.name.cmp(&b.name));
    Document {
        api_version: VERSION,
        kind: "HostStatus",
        runtime_dir: runtime_dir.root().to_path_buf(),
        agent,
        broker,
        shares,
        problems,
    }
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

fn broker_part(status: Result<Status, ClientError>) -> (Broker, Vec<EndpointStatus>) {
    match status {
        Ok(status) => (Broker { running: true, pid: Some(status.pid), error: None }, status.endpoints),
        Err(error) => (Broker { running: false, pid: None, error: Some(error.to_string()) }, Vec::new()),
    }
}

fn agent_part(running: bool, published: Option<Published>) -> (Agent, Option<crate::report::Report>) {
    match published {
        None => (Agent { running, ..Agent::default() }, None),
        Some(it) => {
            let pid = running.then_some(it.pid);
            (Agent { running, pid, version: Some(it.version), shares_dir: it.shares_dir }, Some(it.report))
        }
    }
}

/// A share that the agent knows, whatever the broker does.
fn reported(report: ShareReport, served: &mut BTreeMap<String, Vec<EndpointStatus>>, broker_runs: bool) -> Share {
    let known = served.remove(&report.name).and_then(|endpoints| unreported(&report.name, endpoints));
    let mut share = known.unwrap_or_else(|| unserved(&report, broker_runs));
    let listening = share.in_force.as_ref().is_some_and(|it| it.listening);
    if broker_runs && (listening || !report.state.serves()) {
        share.state = report.state;
        share.notices = report.notices;
    }
    if !report.source.as_os_str().is_empty() {
        share.source = report.source;
    }
    share
}

/// A share that only the agent knows. A broker that is new or gone serves nothing, whatever was published last.
fn unserved(report: &ShareReport, broker_runs: bool) -> Share {
    let silent = || {
        let remedy = "start it, for instance with `virtiofs-agent up`";
        Notice::new(BROKER_UNAVAILABLE, "the broker does not answer", remedy)
    };
    let (state, notices) = match broker_runs {
        true => (ShareState::Pending, Vec::new()),
        false => (ShareState::NotReady, vec![silent()]),
    };
    Share {
        name: report.name.clone(),
        state,
        notices,
        source: report.source.clone(),
        in_force: None,
        sessions: Vec::new(),
        counts: Counts::default(),
        staleness: None,
        mount: mount(&report.name, &report.socket, Access::ReadWrite),
        released_until: None,
        sockets: Vec::new(),
        refused_connections: 0,
        refused_exclusive: 0,
        last_refusal: None,
    }
}

/// A share that only the broker knows, from its endpoints; none of them is none.
fn unreported(name: &str, mut endpoints: Vec<EndpointStatus>) -> Option<Share> {
    endpoints.sort_by_key(|it| it.endpoint.name != name);
    let mut totals = Totals::default();
    endpoints.iter().for_each(|it| totals.add(&it.totals));
    let sockets = endpoints.iter().map(offered_at).collect();
    let (refused_connections, refused_exclusive) =
        endpoints.iter().fold((0, 0), |sum, it| (sum.0 + it.refused_connections, sum.1 + it.refused_exclusive));
    let last_refusal = endpoints.iter().filter_map(|it| it.last_refusal.clone()).max_by_key(|it| it.at);
    let released_until = endpoints.iter().filter_map(|it| it.released).map(|it| it.until).max();
    let sessions = endpoints.iter_mut().flat_map(sessions).collect();
    let own = endpoints.into_iter().next()?;
    let state = match (own.listening, own.preflight.findings.is_empty()) {
        (false, _) => ShareState::Draining,
        (true, true) => ShareState::Ready,
        (true, false) => ShareState::Degraded,
    };
    let wanted = own.endpoint;
    Some(Share {
        mount: mount(name, &wanted.socket.path, wanted.engine.access),
        name: name.to_owned(),
        state,
        notices: own.preflight.findings.iter().map(Notice::from).collect(),
        source: wanted.source.clone(),
        sessions,
        counts: counts(&totals),
        staleness: None,
        in_force: Some(InForce {
            listening: own.listening,
            source: wanted.source,
            socket: wanted.socket,
            exclusive: wanted.exclusive,
            engine: wanted.engine,
            preflight: own.preflight,
        }),
        released_until,
        sockets,
        refused_connections,
        refused_exclusive,
        last_refusal,
    })
}

fn offered_at(status: &EndpointStatus) -> OfferedAt {
    OfferedAt {
        name: status.endpoint.name.clone(),
        path: status.endpoint.socket.path.clone(),
        sub_path: status.endpoint.sub_path.clone(),
        listening: status.listening,
    }
}

/// The sessions of an endpoint, which are taken out of it.
fn sessions(status: &mut EndpointStatus) -> Vec<Session> {
    let sessions = std::mem::take(&mut status.sessions);
    sessions.into_iter().map(|it| session(it, &status.endpoint)).collect()
}

fn session(session: SessionStatus, endpoint: &Endpoint) -> Session {
    Session {
        differs: changes(&session.engine, &endpoint.engine).into_iter().map(|change| change.field).collect(),
        id: session.id,
        state: session.state,
        notices: session.finding.iter().map(Notice::from).collect(),
        vmm_pid: session.vmm_pid,
        connected_at: session.connected_at,
        engine_pid: session.engine_pid,
        engines: session.engines,
        engine: session.engine,
        guest_memory_bytes: session.guest_memory,
        open_files: session.open_files,
        open_files_limit: session.preflight.as_ref().map(|preflight| preflight.open_files),
        preflight: session.preflight,
        held: session.held,
        inodes_limit: session.inodes_limit,
        counts: counts(&session.totals),
        endpoint: endpoint.name.clone(),
        sub_path: endpoint.sub_path.clone(),
        oldest_request: session.oldest_request.map(|it| Oldest {
            operation: operation(it.opcode),
            age_milliseconds: it.age_ms,
            node: it.node,
            path: it.path,
        }),
        last_exchange: session.last_exchange.map(|it| Exchanged {
            at: it.at,
            outcome: it.outcome,
            pause_nanoseconds: it.pause_ns,
            notice: it.finding.as_ref().map(Notice::from),
        }),
        engine_binary: session.engine_binary,
        generation: session.generation,
        wanted_generation: session.wanted_generation,
        traced_until: session.trace.map(|it| it.until),
        parked_files: session.parked_files,
        stale_events: session.stale_events,
        source_gone: session.source_gone,
    }
}

fn operation(opcode: u32) -> &'static str {
    OPERATION_NAMES.get(opcode as usize).copied().unwrap_or(OPERATION_NAMES[0])
}

fn counts(totals: &Totals) -> Counts {
    Counts {
        requests: totals.requests(),
        errors: totals.errors(),
        read_bytes: totals.bytes_read,
        written_bytes: totals.bytes_written,
        malformed: totals.malformed,
        requests_by_operation: totals.operations.iter().map(|it| (operation(it.opcode), it.requests)).collect(),
        stale_by_cause: totals.stale.iter().map(|it| (it.cause.name(), it.events)).collect(),
        errors_by_errno: totals.errnos.iter().map(|it| (errno_name(it.errno), it.replies)).collect(),
        exchanges: exchanges(&totals.exchanges),
    }
}

fn exchanges(exchanges: &Exchanges) -> ExchangeCounts {
    let pauses = |pauses: &Pauses| PauseCounts {
        count: pauses.count,
        nanoseconds: pauses.nanoseconds,
        longest_below_nanoseconds: pauses.longest_below(),
    };
    ExchangeCounts {
        hand_overs: pauses(&exchanges.hand_overs),
        put_off: exchanges.put_off,
        recoveries: pauses(&exchanges.recoveries),
        given_up: exchanges.given_up,
    }
}
