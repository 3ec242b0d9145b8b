//! Combines the report of the agent, which has the state of each share, and the status of the broker.

use std::collections::BTreeMap;

use virtiofs_client::broker::ClientError;
use virtiofs_client::endpoint::share_of;
use virtiofs_client::errno::errno_name;
use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::published::Published;
use virtiofs_client::report::{Report, ShareReport, ShareState};
use virtiofs_client::runtime_dir::RuntimeDir;
use virtiofs_config::Access;
use virtiofs_contract::control::{Endpoint, EndpointStatus, SessionStatus, Status};
use virtiofs_contract::counters::{OPERATION_NAMES, Pauses, Replacements, Totals};
use virtiofs_crds::changes;

use super::document::{
    ActiveConfig, Agent, Broker, Counts, Document, Oldest, PauseCounts, Replacement, ReplacementCounts, Session, Share,
    Socket, VERSION,
};
use super::frontends::mount;

/// Combines the broker's status and the agent's published report.
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
        served.entry(share_of(&endpoint.endpoint.name).to_owned()).or_default().push(endpoint);
    }
    let mut report = report.unwrap_or_default();
    let (known, problems) = (report.shares, report.problems);
    let mut shares: Vec<_> = known.into_iter().map(|it| reported_share(it, &mut served, broker.running)).collect();
    for share in &mut shares {
        share.staleness = report.staleness.remove(&share.name);
    }
    shares.extend(served.into_iter().filter_map(|(name, endpoints)| served_share(&name, endpoints)));
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

fn broker_part(status: Result<Status, ClientError>) -> (Broker, Vec<EndpointStatus>) {
    match status {
        Ok(status) => (Broker { running: true, pid: Some(status.pid), error: None }, status.endpoints),
        Err(error) => (Broker { running: false, pid: None, error: Some(error.to_string()) }, Vec::new()),
    }
}

fn agent_part(running: bool, published: Option<Published>) -> (Agent, Option<Report>) {
    match published {
        None => (Agent { running, ..Agent::default() }, None),
        Some(it) => {
            let pid = running.then_some(it.pid);
            (Agent { running, pid, version: Some(it.version), shares_dir: it.shares_dir }, Some(it.report))
        }
    }
}

/// A share that the agent reported.
fn reported_share(report: ShareReport, served: &mut BTreeMap<String, Vec<EndpointStatus>>, broker_runs: bool) -> Share {
    let known = served.remove(&report.name).and_then(|endpoints| served_share(&report.name, endpoints));
    let mut share = known.unwrap_or_else(|| unserved_share(&report, broker_runs));
    let listening = share.active.as_ref().is_some_and(|it| it.listening);
    if broker_runs && (listening || !report.state.serves()) {
        share.state = report.state;
        share.notices = report.notices;
    }
    if !report.source.as_os_str().is_empty() {
        share.source = report.source;
    }
    share
}

/// A share that the broker does not serve, whatever was reported last.
fn unserved_share(report: &ShareReport, broker_runs: bool) -> Share {
    let silent = || {
        let remedy = "start it, for example with `virtiofs-agent up`";
        Notice::new(NoticeReason::BrokerUnavailable, "the broker does not answer", remedy)
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
        active: None,
        sessions: Vec::new(),
        counts: Counts::default(),
        staleness: None,
        mount: mount(&report.name, &report.socket, Access::ReadWrite),
        released_until: None,
        sockets: Vec::new(),
        rejected_connections: 0,
        rejected_exclusive: 0,
        last_rejection: None,
    }
}

/// A share from the broker's endpoints; `None` if there are none.
fn served_share(name: &str, mut endpoints: Vec<EndpointStatus>) -> Option<Share> {
    endpoints.sort_by_key(|it| it.endpoint.name != name);
    let mut totals = Totals::default();
    endpoints.iter().for_each(|it| totals.add(&it.totals));
    let sockets = endpoints.iter().map(socket).collect();
    let (rejected_connections, rejected_exclusive) =
        endpoints.iter().fold((0, 0), |sum, it| (sum.0 + it.rejected_connections, sum.1 + it.rejected_exclusive));
    let last_rejection = endpoints.iter().filter_map(|it| it.last_rejection.clone()).max_by_key(|it| it.at);
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
        active: Some(ActiveConfig {
            listening: own.listening,
            source: wanted.source,
            socket: wanted.socket,
            exclusive: wanted.exclusive,
            engine: wanted.engine,
            preflight: own.preflight,
        }),
        released_until,
        sockets,
        rejected_connections,
        rejected_exclusive,
        last_rejection,
    })
}

fn socket(status: &EndpointStatus) -> Socket {
    Socket {
        name: status.endpoint.name.clone(),
        path: status.endpoint.socket.path.clone(),
        sub_path: status.endpoint.sub_path.clone(),
        consumer: status.endpoint.consumer.clone(),
        listening: status.listening,
    }
}

/// The sessions of an endpoint, taken out of it.
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
        charged_memory_bytes: session.charged_memory,
        open_files: session.open_files,
        open_files_limit: session.preflight.as_ref().map(|preflight| preflight.open_files),
        preflight: session.preflight,
        held: session.held,
        inodes_limit: session.inodes_limit,
        counts: counts(&session.totals),
        endpoint: endpoint.name.clone(),
        sub_path: endpoint.sub_path.clone(),
        consumer: endpoint.consumer.clone(),
        oldest_request: session.oldest_request.map(|it| Oldest {
            operation: operation(it.opcode),
            age_milliseconds: it.age_ms,
            node: it.node,
            path: it.path,
        }),
        last_replacement: session.last_replacement.map(|it| Replacement {
            at: it.at,
            outcome: it.outcome,
            pause_nanoseconds: it.pause_ns,
            notice: it.finding.as_ref().map(Notice::from),
        }),
        engine_binary: session.engine_binary,
        active_generation: session.active_generation,
        desired_generation: session.desired_generation,
        traced_until: session.trace.map(|it| it.until),
        stashed_files: session.stashed_files,
        stale_events: session.stale_events,
        source_gone: session.source_gone,
        unreachable_memory: session.unreachable_memory,
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
        unreachable_memory: totals.unreachable,
        requests_by_operation: totals.operations.iter().map(|it| (operation(it.opcode), it.requests)).collect(),
        stale_by_cause: totals.stale.iter().map(|it| (it.cause.name(), it.events)).collect(),
        errors_by_errno: totals.errnos.iter().map(|it| (errno_name(it.errno), it.replies)).collect(),
        replacements: replacements(&totals.replacements),
    }
}

fn replacements(replacements: &Replacements) -> ReplacementCounts {
    let pauses = |pauses: &Pauses| PauseCounts {
        count: pauses.count,
        nanoseconds: pauses.nanoseconds,
        longest_below_nanoseconds: pauses.longest_below(),
    };
    ReplacementCounts {
        hand_overs: pauses(&replacements.hand_overs),
        aborted: replacements.aborted,
        recoveries: pauses(&replacements.recoveries),
        abandoned: replacements.abandoned,
    }
}
