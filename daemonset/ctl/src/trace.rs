//! `virtiofsctl trace`: the requests of one session, as they are answered.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result};
use virtiofs_client::broker::Client;
use virtiofs_client::errno::errno_name;
use virtiofs_client::text::{escaped, print};
use virtiofs_contract::control::TraceReply;
use virtiofs_contract::counters::OPERATION_NAMES;
use virtiofs_contract::trace::TraceEntry;

use crate::args::{OutputFormat, TraceArgs};
use crate::target::session;

/// Time between two reads: the broker stores some thousand requests, more than arrive in it.
const READ_EVERY: Duration = Duration::from_millis(100);

/// Set by Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

/// Prints requests until the time is over, or Ctrl-C.
pub(crate) fn trace(args: &TraceArgs) -> Result<bool> {
    let mut client = crate::broker(&args.location.runtime_dir)?;
    session(&client.status()?, &args.session)?;
    stop_by_signal().context("cannot listen for signals")?;
    // Skip what an earlier trace has left.
    let mut after = client.read_trace(&args.session, u64::MAX)?.next;
    client.trace(&args.session, args.during, args.rate)?;
    let mut lost = 0;
    let rate_limited = loop {
        let stopped = STOP.load(Ordering::Relaxed);
        if stopped {
            client.trace(&args.session, Duration::ZERO, args.rate)?;
        }
        let reply = read(&mut client, args, after)?;
        (after, lost) = (reply.next, lost + reply.lost);
        if stopped || (reply.ended && reply.entries.is_empty()) {
            break reply.rate_limited;
        }
        sleep(READ_EVERY);
    };
    if lost + rate_limited > 0 {
        let said = format!(
            "virtiofsctl: {rate_limited} requests were left out because of --rate, {lost} were not read in time"
        );
        // Standard error may be closed, where `eprintln!` would panic.
        let _ = writeln!(std::io::stderr(), "{said}");
    }
    Ok(true)
}

fn read(client: &mut Client, args: &TraceArgs, after: u64) -> Result<TraceReply> {
    let reply = client.read_trace(&args.session, after)?;
    let lines = reply.entries.iter().map(|entry| match args.output {
        OutputFormat::Table => Ok(line(entry)),
        OutputFormat::Json => serde_json::to_string(entry).map(|text| text + "\n"),
    });
    print(&lines.collect::<Result<String, _>>().context("writing JSON")?)?;
    Ok(reply)
}

/// One request on one line. What the guest chose is escaped.
fn line(entry: &TraceEntry) -> String {
    let at = UNIX_EPOCH + Duration::from_nanos(entry.at_ns);
    let operation = OPERATION_NAMES.get(entry.opcode as usize).copied().unwrap_or(OPERATION_NAMES[0]);
    let path = entry.path.as_deref().map_or_else(|| format!("node {}", entry.node), escaped);
    let name = entry.name.as_deref().map(|name| format!(" {}", escaped(name))).unwrap_or_default();
    let cut = if entry.truncated { " (cut)" } else { "" };
    let result = if entry.errno == 0 { "ok" } else { errno_name(entry.errno.cast_signed()) };
    let micros = entry.duration_ns as f64 / 1e3;
    format!(
        "{}  {operation:<12} {result:<10} {micros:>9.1} us  {path}{name}{cut}\n",
        humantime::format_rfc3339_micros(at)
    )
}

/// Installs handlers that note Ctrl-C and SIGTERM.
fn stop_by_signal() -> std::io::Result<()> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    extern "C" fn note(_: i32) {
        STOP.store(true, Ordering::Relaxed);
    }
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler stores to an atomic, which is safe in a signal handler.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line() {
        let entry = TraceEntry {
            at_ns: 1_700_000_000_123_456_789,
            duration_ns: 45_600,
            node: 7,
            opcode: 1,
            errno: 2,
            path: Some("/dir\u{1b}[2J".into()),
            name: Some("a\nb".into()),
            ..TraceEntry::default()
        };
        let said = line(&entry);
        assert_eq!(said.matches('\n').count(), 1);
        assert!(said.starts_with("2023-11-14T22:13:20.123456Z  lookup       ENOENT          45.6 us  "), "{said}");
        assert!(said.ends_with("/dir\\u{1b}[2J a\\nb\n"), "{said}");
    }
}
