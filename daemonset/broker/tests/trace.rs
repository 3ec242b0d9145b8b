//! The request trace of one session.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use common::{Broker, boot, read_hello, until};
use virtiofs_contract::control::{LONGEST_TRACE_MS, Request, Response, SessionState, TraceReply};
use virtiofs_contract::counters::OPERATION_NAMES;
use virtiofs_contract::trace::{MAX_RATE, TraceEntry};

fn start(broker: &Broker, session: &str, duration_ms: u64, rate: u32) {
    let answer = broker.control().request(&Request::Trace { session: session.into(), duration_ms, rate });
    assert!(matches!(answer, Response::Tracing { .. }), "{answer:?}");
}

fn read(broker: &Broker, session: &str, after: u64) -> TraceReply {
    match broker.control().request(&Request::ReadTrace { session: session.into(), after }) {
        Response::TraceEntries(traced) => traced,
        other => panic!("{other:?}"),
    }
}

fn operation(entry: &TraceEntry) -> &'static str {
    OPERATION_NAMES[entry.opcode as usize]
}

#[test]
fn requests_are_logged_while_the_trace_runs() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let id = broker.session_of("data").id;
    read_hello(&guest);
    assert_eq!(read(&broker, &id, 0), TraceReply { ended: true, ..TraceReply::default() }, "nobody asked for it");
    start(&broker, &id, LONGEST_TRACE_MS, MAX_RATE);
    assert!(broker.session_of("data").trace.is_some());
    let fuse = guest.fuse();
    let dir = fuse.mkdir(1, "a\u{1b}[2J\n", 0o755).unwrap().nodeid;
    fuse.mkdir(dir, "b", 0o755).unwrap();
    assert!(fuse.lookup(dir, "missing").is_err());
    read_hello(&guest);
    let traced = read(&broker, &id, 0);
    let lines: Vec<_> = traced
        .entries
        .iter()
        .map(|entry| (operation(entry), entry.path.as_deref().unwrap_or("?"), entry.name.as_deref(), entry.errno))
        .collect();
    assert_eq!(
        lines,
        [
            ("mkdir", "/", Some("a\u{1b}[2J\n"), 0),
            ("mkdir", "/a\u{1b}[2J\n", Some("b"), 0),
            ("lookup", "/a\u{1b}[2J\n", Some("missing"), libc::ENOENT as u32),
            ("lookup", "/", Some("hello"), 0),
            ("open", "/hello", None, 0),
            ("read", "/hello", None, 0),
            ("release", "/hello", None, 0),
        ]
    );
    assert!(traced.entries.iter().all(|entry| entry.duration_ns > 0 && entry.unique > 0 && entry.at_ns > 0));
    assert!(!traced.ended && traced.lost == 0);
    start(&broker, &id, 0, MAX_RATE);
    read_hello(&guest);
    assert_eq!(read(&broker, &id, traced.next), TraceReply { next: traced.next, ended: true, ..TraceReply::default() });
    assert!(broker.session_of("data").trace.is_none());
}

#[test]
fn trace_continues_across_engines_and_limits_its_rate() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let session = broker.until_state("data", SessionState::Serving);
    start(&broker, &session.id, LONGEST_TRACE_MS, MAX_RATE);
    read_hello(&guest);
    let before = read(&broker, &session.id, 0);
    let wanted = broker.control().hand_over("data").remove(0).generation;
    until("another engine serves", || broker.session_of("data").active_generation >= wanted);
    read_hello(&guest);
    let after = read(&broker, &session.id, before.next);
    let names: Vec<_> = after.entries.iter().map(operation).collect();
    assert_eq!(names, ["lookup", "open", "read", "release"]);
    start(&broker, &session.id, LONGEST_TRACE_MS, 1);
    (0..100).for_each(|_| drop(read_hello(&guest)));
    let slow = read(&broker, &session.id, after.next);
    assert!(slow.rate_limited > 0 && (slow.entries.len() as u64) < 400);
    assert_eq!(guest.violations(), []);
}
