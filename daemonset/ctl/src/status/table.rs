//! The status as a table for people.

use std::fmt::Write;
use std::time::{Duration, UNIX_EPOCH};

use virtiofs_client::text::{escaped, name};

use super::document::{Document, PauseCounts, ReplacementCounts, Session, Share};

/// The whole text: processes, a table of shares, and details of each.
pub(super) fn render(document: &Document) -> String {
    let mut text = processes(document);
    if document.shares.is_empty() {
        text.push_str("no shares\n");
    } else {
        text.push_str(&shares(&document.shares));
    }
    for share in &document.shares {
        text.push_str(&details(share));
    }
    for problem in document.problems.iter().filter(|problem| problem.share.is_none()) {
        _ = writeln!(text, "\nrejected: {}", escaped(&problem.to_string()));
    }
    text
}

fn processes(document: &Document) -> String {
    let agent = match (document.agent.running, document.agent.pid) {
        (true, Some(pid)) => format!("agent runs (pid {pid})"),
        (true, None) => "agent runs".to_owned(),
        (false, _) => "agent does not run".to_owned(),
    };
    let broker = match (&document.broker.pid, &document.broker.error) {
        (Some(pid), _) => format!("broker runs (pid {pid})"),
        (None, Some(error)) => format!("broker does not run: {error}"),
        (None, None) => "broker does not run".to_owned(),
    };
    format!("{agent}, {broker}\n\n")
}

fn shares(shares: &[Share]) -> String {
    let mut rows = vec![
        ["NAME", "STATE", "ACCESS", "CACHE", "HANDLES", "SESSIONS", "REQUESTS", "ERRORS", "SOURCE"].map(str::to_owned),
    ];
    rows.extend(shares.iter().map(row));
    aligned(&rows)
}

fn row(share: &Share) -> [String; 9] {
    let engine = share.active.as_ref().map(|it| &it.engine);
    let shown = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    [
        share.name.clone(),
        share.state.as_str().to_owned(),
        shown(engine.map(|it| name(&it.access))),
        shown(engine.map(|it| name(&it.cache))),
        shown(share.active.as_ref().map(|it| name(&it.preflight.inode_file_handles))),
        share.sessions.len().to_string(),
        share.counts.requests.to_string(),
        share.counts.errors.to_string(),
        shown((!share.source.as_os_str().is_empty()).then(|| escaped(&share.source.display().to_string()))),
    ]
}

fn details(share: &Share) -> String {
    let mut text = format!("\n{}: {}\n", share.name, share.state.as_str());
    for notice in &share.notices {
        _ = writeln!(
            text,
            "  {}: {}\n    -> {}",
            notice.reason.as_str(),
            escaped(&notice.message),
            escaped(&notice.remedy)
        );
    }
    if let Some(until) = share.released_until {
        _ = writeln!(text, "  released until {}; guests wait", time(until));
    }
    for socket in share.sockets.iter().filter(|socket| socket.name != share.name) {
        let part = socket.sub_path.as_ref().map(|it| format!(" {}", escaped(&it.display().to_string())));
        let consumer = socket.consumer.as_ref().map(|it| format!(" for {}", escaped(it)));
        let closed = if socket.listening { "" } else { " (removed; VMs that use it continue)" };
        _ = writeln!(
            text,
            "  socket {}{}:{} at {}{closed}",
            socket.name,
            consumer.unwrap_or_default(),
            part.unwrap_or_default(),
            socket.path.display()
        );
    }
    if !share.sessions.is_empty() {
        let rows: Vec<_> =
            std::iter::once(SESSION_COLUMNS.map(str::to_owned)).chain(share.sessions.iter().map(session_row)).collect();
        for line in aligned(&rows).lines() {
            _ = writeln!(text, "  {line}");
        }
    }
    for session in share.sessions.iter().filter(|session| !session.differs.is_empty()) {
        let fields = session.differs.join(", ");
        _ = writeln!(text, "  {} still runs with another {fields}", session.id);
    }
    share.sessions.iter().for_each(|session| text.push_str(&session_lines(session)));
    text.push_str(&replacements(&share.counts.replacements));
    if share.rejected_exclusive > 0 {
        let times = share.rejected_exclusive;
        _ = writeln!(text, "  rejected {times} VMs because one VM at a time may use it");
    }
    text.push_str(&limits(share));
    text.push_str(&staleness(share));
    if share.state.serves() {
        text.push_str(&lines(share));
    }
    text
}

const SESSION_COLUMNS: [&str; 10] =
    ["SESSION", "STATE", "VMM", "ENGINE", "ENGINES", "REQUESTS", "ERRORS", "OPEN FILES", "INODES", "HANDLES"];

fn session_row(session: &Session) -> [String; 10] {
    let limit = session.open_files_limit.map_or_else(|| "?".to_owned(), |limit| limit.to_string());
    [
        session.id.clone(),
        name(&session.state),
        if session.vmm_pid == 0 { "-".to_owned() } else { session.vmm_pid.to_string() },
        session.engine_pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
        session.engines.to_string(),
        session.counts.requests.to_string(),
        session.counts.errors.to_string(),
        format!("{} of {limit}", session.open_files),
        format!("{} of {}", session.held.inodes, session.inodes_limit),
        session.held.handles.to_string(),
    ]
}

/// Details of a session.
fn session_lines(session: &Session) -> String {
    let mut text = String::new();
    let late = session.oldest_request.as_ref().filter(|it| it.age_milliseconds >= REPORT_AFTER_MS);
    if let Some(oldest) = late {
        let at = oldest.path.as_deref().map_or_else(|| format!("node {}", oldest.node), escaped);
        let seconds = oldest.age_milliseconds as f64 / 1e3;
        _ = writeln!(
            text,
            "  {} waits for the source: {} for {seconds:.1} s, oldest request at {at}",
            session.id, oldest.operation
        );
    }
    if let Some(notice) = session.last_replacement.as_ref().and_then(|it| it.notice.as_ref()) {
        _ = writeln!(
            text,
            "  {} was not handed over: {}: {}",
            session.id,
            notice.reason.as_str(),
            escaped(&notice.message)
        );
    }
    if let Some(until) = session.traced_until {
        _ = writeln!(text, "  {} is traced until {}", session.id, time(until));
    }
    if session.stashed_files > 0 {
        _ = writeln!(text, "  {} has {} open files without a name", session.id, session.stashed_files);
    }
    text
}

/// Lines about stale events and the last remedy, if any.
fn staleness(share: &Share) -> String {
    let mut text = String::new();
    let counts: Vec<_> = share.counts.stale_by_cause.iter().map(|(cause, count)| format!("{count} {cause}")).collect();
    if !counts.is_empty() {
        let last = share.sessions.iter().flat_map(|session| &session.stale_events).max_by_key(|event| event.at_ms);
        let last = last.map(|event| format!("; last path: {} ({})", named(&event.path), event.cause));
        _ = writeln!(text, "  stale: {}{}", counts.join(", "), last.unwrap_or_default());
    }
    if let Some(remedy) = share.staleness.as_ref().and_then(|staleness| staleness.last_remedy.as_ref()) {
        let outcome = remedy.outcome.as_deref().unwrap_or("being tried");
        _ = writeln!(text, "  last remedy: {} against {}: {outcome}", remedy.remedy, remedy.cause);
    }
    text
}

/// Resource limits of an engine, if any.
fn limits(share: &Share) -> String {
    let limits = share.active.as_ref().and_then(|it| serde_json::to_value(&it.preflight.limits).ok());
    let limits = limits.as_ref().and_then(|it| it.as_object()).into_iter().flatten();
    let limits: Vec<_> = limits.map(|(name, value)| format!("{name} {value}")).collect();
    if limits.is_empty() { String::new() } else { format!("  limits of each engine: {}\n", limits.join(", ")) }
}

/// A request that takes longer than this is shown.
const REPORT_AFTER_MS: u64 = 1000;

fn time(seconds: u64) -> impl std::fmt::Display {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds))
}

fn named(path: &str) -> &str {
    if path.is_empty() { "unknown" } else { path }
}

/// A line about engine replacements, if any.
fn replacements(counts: &ReplacementCounts) -> String {
    let with_pauses = |what: &str, pauses: &PauseCounts| {
        let mean = pauses.nanoseconds.checked_div(pauses.count)?;
        Some(format!("{} {what} ({:.1} ms on average)", pauses.count, mean as f64 / 1e6))
    };
    let plain = |what: &str, count: u64| (count > 0).then(|| format!("{count} {what}"));
    let parts = [
        with_pauses("handed over", &counts.hand_overs),
        plain("aborted", counts.aborted),
        with_pauses("recovered", &counts.recoveries),
        plain("abandoned", counts.abandoned),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    if parts.is_empty() { String::new() } else { format!("  engine replacements: {}\n", parts.join(", ")) }
}

fn lines(share: &Share) -> String {
    let mount = &share.mount;
    format!(
        "  QEMU              {}\n  libvirt           {}\n                    {}\n  cloud-hypervisor  {}\n  crosvm            {}\n  in the guest      {}\n",
        mount.qemu,
        mount.libvirt.memory_backing,
        mount.libvirt.filesystem,
        mount.cloud_hypervisor,
        mount.crosvm,
        mount.guest,
    )
}

/// Rows with aligned columns, two spaces apart.
fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let line: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        _ = writeln!(text, "{}", line.join("  ").trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["A".to_owned(), "B".to_owned()], ["long".to_owned(), "x".to_owned()]];
        assert_eq!(aligned(&rows), "A     B\nlong  x\n");
    }

    #[test]
    fn exchanges_are_one_line_and_none_are_none() {
        let mut counts = ReplacementCounts::default();
        assert_eq!(replacements(&counts), "");
        counts.recoveries = PauseCounts { count: 2, nanoseconds: 7_000_000, ..PauseCounts::default() };
        counts.aborted = 1;
        assert_eq!(replacements(&counts), "  engine replacements: 1 aborted, 2 recovered (3.5 ms on average)\n");
    }
}
