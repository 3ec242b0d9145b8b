//! The metrics of a node. Labels are bounded: shares, operations, error names, states and reasons; never a process, a VM
//! or a path.

use std::collections::{BTreeMap, BTreeSet};

use prometheus::TextEncoder;
use prometheus::proto::MetricFamily;
use virtiofs_contract::control::{EndpointStatus, HolderState, SessionState, SessionStatus, Status};
use virtiofs_contract::counters::{BUCKETS, OPERATION_NAMES, OperationTotals, Pauses};

use super::sample::Family;
use super::staleness;
use crate::endpoint::share_of;
use crate::errno::errno_name;
use crate::report::Report;
use crate::totals::{RunningTotals, ShareTotals};

/// All families, from the agent's report, the broker's status (`None`: it does not answer) and the counts by share.
pub fn families(report: &Report, status: Option<&Status>, totals: &BTreeMap<String, ShareTotals>) -> Vec<MetricFamily> {
    let endpoints = status.map_or(&[][..], |status| &status.endpoints);
    let mut families = vec![build_info(), broker_up(status.is_some())];
    families.extend(status.map(holder));
    families.extend(share_states(report));
    families.extend(requests(totals));
    families.extend(transfers(totals));
    families.extend(lives(totals));
    families.push(last_losses(endpoints));
    families.extend(replacements(totals));
    families.extend(staleness::families(report, totals));
    let shares = by_share(endpoints);
    families.extend(sessions(&shares));
    families.extend(holdings(&shares));
    families.into_iter().filter_map(Family::finish).collect()
}

/// The text page for a single status, without an agent. Counts are of this broker alone.
pub fn page(report: Option<&Report>, status: Option<&Status>) -> String {
    let mut totals = RunningTotals::default();
    status.inspect(|status| totals.observe(status));
    let families = families(report.unwrap_or(&Report::default()), status, &totals.all());
    TextEncoder::new().encode_to_string(&families).unwrap_or_else(|error| format!("# {error}\n"))
}

fn build_info() -> Family {
    let mut family = Family::gauge("virtiofs_build_info", "Version of the agent; always 1.");
    family.value(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    family
}

fn broker_up(answers: bool) -> Family {
    let mut family = Family::gauge("virtiofs_broker_up", "1 if the broker answers.");
    family.value(&[], f64::from(u8::from(answers)));
    family
}

fn holder(status: &Status) -> Family {
    let mut family = Family::gauge("virtiofs_sessions_survive_broker", "1 if a keeper or systemd holds all sessions.");
    family.value(&[], f64::from(u8::from(status.holder == HolderState::Connected)));
    family
}

fn share_states(report: &Report) -> [Family; 3] {
    let mut ready = Family::gauge("virtiofs_share_ready", "1 if the share is served to VMs that connect now.");
    let mut state = Family::gauge("virtiofs_share_state", "State of the share: 1 for the one it is in.");
    let mut condition = Family::gauge(
        "virtiofs_share_condition",
        "Reasons why the share is not exactly as declared; 1 while one holds.",
    );
    for share in &report.shares {
        let name = ("share", share.name.as_str());
        ready.value(&[name], f64::from(u8::from(share.state.serves())));
        state.value(&[name, ("state", share.state.as_str())], 1.0);
        let reasons: BTreeSet<_> = share.notices.iter().map(|notice| notice.reason.as_str()).collect();
        for reason in reasons {
            condition.value(&[name, ("reason", reason)], 1.0);
        }
    }
    [ready, state, condition]
}

fn requests(totals: &BTreeMap<String, ShareTotals>) -> [Family; 6] {
    let mut requests = Family::counter("virtiofs_requests_total", "Answered requests of guests.");
    let mut errors = Family::counter(
        "virtiofs_request_errors_total",
        "Requests answered with an error; many are normal, such as for a name that does not exist.",
    );
    let mut replies = Family::counter("virtiofs_error_replies_total", "Replies that carried an error, by its name.");
    let mut latency =
        Family::histogram("virtiofs_request_duration_seconds", "Time from taking a request to answering it.");
    let mut malformed = Family::counter("virtiofs_malformed_requests_total", "Malformed requests.");
    let mut unreachable = Family::counter(
        "virtiofs_unreachable_memory_requests_total",
        "Requests in guest memory that the VMM does not share.",
    );
    for (share, counts) in totals {
        let share = ("share", share.as_str());
        for operation in &counts.totals.operations {
            let labels = [share, ("operation", operation_name(operation))];
            requests.count(&labels, operation.requests);
            errors.count(&labels, operation.errors);
            latency.durations(&labels, &operation.latency, operation.nanoseconds);
        }
        for errno in &counts.totals.errnos {
            replies.count(&[share, ("errno", errno_name(errno.errno))], errno.replies);
        }
        malformed.count(&[share], counts.totals.malformed);
        unreachable.count(&[share], counts.totals.unreachable);
    }
    [requests, errors, replies, latency, malformed, unreachable]
}

fn operation_name(operation: &OperationTotals) -> &'static str {
    OPERATION_NAMES.get(operation.opcode as usize).copied().unwrap_or(OPERATION_NAMES[0])
}

fn transfers(totals: &BTreeMap<String, ShareTotals>) -> [Family; 2] {
    let mut read = Family::counter("virtiofs_read_bytes_total", "Bytes that guests read from files.");
    let mut written = Family::counter("virtiofs_written_bytes_total", "Bytes that guests wrote to files.");
    for (share, counts) in totals {
        read.count(&[("share", share)], counts.totals.bytes_read);
        written.count(&[("share", share)], counts.totals.bytes_written);
    }
    [read, written]
}

fn lives(totals: &BTreeMap<String, ShareTotals>) -> [Family; 6] {
    let mut sessions = Family::counter("virtiofs_sessions_started_total", "Sessions of VMs that began.");
    let mut engines = Family::counter("virtiofs_engine_starts_total", "Engines started for sessions.");
    let mut refused =
        Family::counter("virtiofs_rejected_connections_total", "Connections that did not become a session.");
    let mut memory = Family::counter(
        "virtiofs_rejected_memory_total",
        "Sessions that ended because engines could not share the guest's memory.",
    );
    let mut exclusive = Family::counter(
        "virtiofs_exclusive_rejections_total",
        "Those of them that were refused because one VM at a time may use the share.",
    );
    let mut lost =
        Family::counter("virtiofs_sessions_lost_total", "Sessions that ended with a broker and were not restored.");
    for (share, counts) in totals {
        let labels = [("share", share.as_str())];
        lost.count(&labels, counts.sessions_lost);
        sessions.count(&labels, counts.sessions);
        engines.count(&labels, counts.engines);
        refused.count(&labels, counts.rejected_connections);
        exclusive.count(&labels, counts.rejected_exclusive);
        memory.count(&labels, counts.rejected_memory);
    }
    [sessions, lost, engines, refused, exclusive, memory]
}

/// A time and not a count: it also differs from an earlier loss if broker and agent have forgotten that one.
fn last_losses(endpoints: &[EndpointStatus]) -> Family {
    let mut family = Family::gauge(
        "virtiofs_session_lost_timestamp_seconds",
        "Time of the last loss of a session, in seconds since the Unix epoch; missing if none was lost.",
    );
    let mut shares = BTreeMap::new();
    for endpoint in endpoints {
        if let Some(at) = endpoint.lost.iter().map(|lost| lost.at).max() {
            let last = shares.entry(share_of(&endpoint.endpoint.name)).or_insert(at);
            *last = at.max(*last);
        }
    }
    for (share, at) in shares {
        family.value(&[("share", share)], at as f64);
    }
    family
}

fn replacements(totals: &BTreeMap<String, ShareTotals>) -> [Family; 4] {
    let mut hand_overs = Family::counter(
        "virtiofs_handovers_total",
        "Hand-overs of engines between two requests of a guest, by outcome.",
    );
    let mut hand_over_pauses =
        Family::histogram("virtiofs_handover_pause_seconds", "How long a hand-over kept a guest waiting.");
    let mut recoveries = Family::counter("virtiofs_recoveries_total", "Engines that died under a guest, by outcome.");
    let mut recovery_pauses = Family::histogram(
        "virtiofs_recovery_pause_seconds",
        "Time from the detection of an engine's death until the next one serves.",
    );
    for (share, counts) in totals {
        let share = ("share", share.as_str());
        let replacements = &counts.totals.replacements;
        hand_overs.count(&[share, ("outcome", "Done")], replacements.hand_overs.count);
        hand_overs.count(&[share, ("outcome", "Aborted")], replacements.aborted);
        recoveries.count(&[share, ("outcome", "Done")], replacements.recoveries.count);
        recoveries.count(&[share, ("outcome", "Abandoned")], replacements.abandoned);
        pauses(&mut hand_over_pauses, share, &replacements.hand_overs);
        pauses(&mut recovery_pauses, share, &replacements.recoveries);
    }
    [hand_overs, hand_over_pauses, recoveries, recovery_pauses]
}

/// Buckets exist from the first scrape on, so that the first pause is an increase.
fn pauses(family: &mut Family, share: (&str, &str), pauses: &Pauses) {
    let none = [0; BUCKETS];
    let counts = if pauses.latency.is_empty() { &none[..] } else { &pauses.latency };
    family.durations(&[share], counts, pauses.nanoseconds);
}

/// Sessions of each share, at all its endpoints.
type Sessions<'a> = BTreeMap<&'a str, Vec<&'a SessionStatus>>;

fn by_share(endpoints: &[EndpointStatus]) -> Sessions<'_> {
    let mut shares = Sessions::new();
    for endpoint in endpoints {
        shares.entry(share_of(&endpoint.endpoint.name)).or_default().extend(&endpoint.sessions);
    }
    shares
}

fn sessions(shares: &Sessions<'_>) -> [Family; 5] {
    let mut sessions = Family::gauge("virtiofs_sessions", "Connected VMs, by state of their session.");
    let mut open = Family::gauge("virtiofs_open_files", "Open files of all engines of the share.");
    let mut fullest =
        Family::gauge("virtiofs_fullest_engine_open_files", "Open files of the engine that is closest to its limit.");
    let mut limit = Family::gauge("virtiofs_fullest_engine_open_files_limit", "Limit of open files of that engine.");
    let mut oldest = Family::gauge(
        "virtiofs_oldest_request_age_seconds",
        "Age of the oldest request in progress; 0 if there is none.",
    );
    for (share, all) in shares {
        let labels = [("share", *share)];
        for state in SessionState::ALL {
            let count = all.iter().filter(|session| session.state == state).count();
            sessions.value(&[labels[0], ("state", state.as_str())], count as f64);
        }
        open.value(&labels, all.iter().map(|session| session.open_files).sum::<u64>() as f64);
        if let Some((files, most)) = all.iter().filter_map(|it| usage(it)).max_by(|a, b| fuller(*a, *b)) {
            fullest.value(&labels, files as f64);
            limit.value(&labels, most as f64);
        }
        let age = all.iter().filter_map(|session| session.oldest_request.as_ref()).map(|it| it.age_ms).max();
        oldest.value(&labels, age.unwrap_or(0) as f64 / 1e3);
    }
    [sessions, open, fullest, limit, oldest]
}

/// What guests hold, and the guest that is closest to its limit.
fn holdings(shares: &Sessions<'_>) -> [Family; 7] {
    let mut inodes = Family::gauge("virtiofs_held_inodes", "Inodes that guests hold.");
    let mut handles = Family::gauge("virtiofs_open_handles", "Files and directories that guests have open.");
    let mut stashed =
        Family::gauge("virtiofs_stashed_files", "Open files of guests without a name, in the broker's fd stash.");
    let mut fullest =
        Family::gauge("virtiofs_fullest_session_held_inodes", "Inodes held by the guest that is closest to its limit.");
    let mut limit = Family::gauge(
        "virtiofs_fullest_session_held_inodes_limit",
        "Inode limit of that guest; beyond it, requests fail with ENFILE.",
    );
    let mut memory = Family::gauge(
        "virtiofs_guest_memory_bytes",
        "Guest memory that VMs share with engines. What engines touch of it first is charged to their sessions' control groups.",
    );
    let mut charged = Family::gauge(
        "virtiofs_charged_memory_bytes",
        "Memory that is charged to the control groups of sessions, page cache included. Missing without such groups.",
    );
    for (share, all) in shares {
        let labels = [("share", *share)];
        let sum = |what: fn(&SessionStatus) -> u64| all.iter().map(|it| what(it)).sum::<u64>() as f64;
        inodes.value(&labels, sum(|session| session.held.inodes));
        handles.value(&labels, sum(|session| session.held.handles));
        stashed.value(&labels, sum(|session| session.stashed_files));
        memory.value(&labels, sum(|session| session.guest_memory));
        if all.iter().any(|session| session.charged_memory.is_some()) {
            charged.value(&labels, sum(|session| session.charged_memory.unwrap_or(0)));
        }
        let usages = all.iter().map(|session| (session.held.inodes, session.inodes_limit));
        if let Some((most, may)) = usages.max_by(|a, b| fuller(*a, *b)) {
            fullest.value(&labels, most as f64);
            limit.value(&labels, may as f64);
        }
    }
    [inodes, handles, stashed, memory, charged, fullest, limit]
}

/// Open files and their limit.
fn usage(session: &SessionStatus) -> Option<(u64, u64)> {
    Some((session.open_files, session.preflight.as_ref()?.open_files))
}

/// Compares `a.0 / a.1` with `b.0 / b.1` without dividing.
fn fuller(a: (u64, u64), b: (u64, u64)) -> std::cmp::Ordering {
    (u128::from(a.0) * u128::from(b.1)).cmp(&(u128::from(b.0) * u128::from(a.1)))
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::counters::{ErrnoTotal, Totals};

    use super::*;
    use crate::notice::{Notice, NoticeReason};
    use crate::report::{ShareReport, ShareState};

    fn page(report: &Report, totals: &BTreeMap<String, ShareTotals>) -> String {
        let status = crate::fixtures::status(1, Vec::new());
        TextEncoder::new().encode_to_string(&families(report, Some(&status), totals)).unwrap()
    }

    fn counts() -> ShareTotals {
        let mut latency = vec![0; BUCKETS];
        (latency[0], latency[3], latency[BUCKETS - 1]) = (1, 2, 1);
        let lookup = OperationTotals { opcode: 1, requests: 4, errors: 1, nanoseconds: 1_500_000_000, latency };
        let totals = Totals {
            operations: vec![lookup],
            errnos: vec![ErrnoTotal { errno: 116, replies: 1 }, ErrnoTotal { errno: 0, replies: 2 }],
            bytes_read: 4096,
            ..Totals::default()
        };
        ShareTotals { totals, engines: 3, ..ShareTotals::default() }
    }

    #[test]
    fn last_loss_of_a_share_is_a_time() {
        use crate::fixtures::{endpoint, listening, status};
        let lost = |at| virtiofs_contract::control::LostSession { at, session: "a-1".into() };
        let of = |name: &str, lost| EndpointStatus { lost, ..listening(endpoint(name)) };
        let endpoints = vec![
            of("images", vec![lost(1_764_500_000), lost(1_764_561_600)]),
            of("images.vm-1", vec![lost(1_764_500_001)]),
            of("other", vec![]),
        ];
        let page = super::page(None, Some(&status(1, endpoints)));
        let lines: Vec<_> = page.lines().filter(|it| it.starts_with("virtiofs_session_lost_timestamp")).collect();
        assert_eq!(lines, ["virtiofs_session_lost_timestamp_seconds{share=\"images\"} 1764561600"]);
    }

    #[test]
    fn counts_are_labelled_and_histograms_cumulative() {
        let page = page(&Report::default(), &[("images".to_owned(), counts())].into());
        for line in [
            "# TYPE virtiofs_requests_total counter",
            "virtiofs_requests_total{share=\"images\",operation=\"lookup\"} 4",
            "virtiofs_request_errors_total{share=\"images\",operation=\"lookup\"} 1",
            "virtiofs_error_replies_total{share=\"images\",errno=\"ESTALE\"} 1",
            "virtiofs_error_replies_total{share=\"images\",errno=\"other\"} 2",
            "virtiofs_request_duration_seconds_bucket{share=\"images\",operation=\"lookup\",le=\"0.000002\"} 1",
            "virtiofs_request_duration_seconds_bucket{share=\"images\",operation=\"lookup\",le=\"0.00002\"} 3",
            "virtiofs_request_duration_seconds_bucket{share=\"images\",operation=\"lookup\",le=\"10\"} 3",
            "virtiofs_request_duration_seconds_bucket{share=\"images\",operation=\"lookup\",le=\"+Inf\"} 4",
            "virtiofs_request_duration_seconds_sum{share=\"images\",operation=\"lookup\"} 1.5",
            "virtiofs_request_duration_seconds_count{share=\"images\",operation=\"lookup\"} 4",
            "virtiofs_read_bytes_total{share=\"images\"} 4096",
            "virtiofs_engine_starts_total{share=\"images\"} 3",
            "virtiofs_broker_up 1",
        ] {
            assert!(page.lines().any(|it| it == line), "{line} in\n{page}");
        }
    }

    #[test]
    fn a_share_has_one_state_and_each_reason_once() {
        let notice = Notice::new(NoticeReason::SessionFailed, "one", "r");
        let share = ShareReport {
            name: "images".into(),
            state: ShareState::Degraded,
            notices: vec![notice.clone(), Notice { message: "two".into(), ..notice }],
            source: "/srv".into(),
            socket: "/run/s".into(),
        };
        let page = page(&Report { broker: true, shares: vec![share], ..Report::default() }, &BTreeMap::new());
        assert!(page.contains("virtiofs_share_ready{share=\"images\"} 1\n"), "{page}");
        assert!(page.contains("virtiofs_share_state{share=\"images\",state=\"Degraded\"} 1\n"));
        assert_eq!(page.matches("virtiofs_share_condition{share=\"images\",reason=\"SessionFailed\"} 1\n").count(), 1);
    }

    #[test]
    fn the_fullest_engine_is_closest_to_its_limit() {
        assert!(fuller((10, 100), (500, 10_000)).is_gt());
        assert!(fuller((0, 0), (1, 2)).is_le());
    }

    #[test]
    fn every_metric_is_in_the_manual() {
        let manual = include_str!("../../../../docs/MANUAL.md");
        let source = [include_str!("families.rs"), include_str!("staleness.rs")].concat();
        let names = source.split('"').filter(|word| word.starts_with("virtiofs_") && !word.contains(['{', ' ', '\\']));
        for name in names {
            let short = name.replace("virtiofs_fullest_engine_open_files_limit", "`..._limit`");
            assert!(manual.contains(&short), "{name} is not in docs/MANUAL.md");
        }
    }
}
