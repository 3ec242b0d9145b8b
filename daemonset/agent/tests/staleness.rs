//! Staleness under a guest: counted by cause, remedied as the share allows, and verified. The tests change only the source.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use serde_json::Value;
use testkit::guest::{Guest, GuestConfig};
use testkit::host::{Host, Prepared, has_reason, manifest, prepare};

const ROOT: u64 = 1;

/// More files than an engine of `SCARCE` can have open.
const FILES: usize = 1200;

/// An engine that holds a descriptor for each inode and has a low limit.
const SCARCE: &str = "  content: Shared\n  engine: {inodeFileHandles: Never, openFiles: 1024}";

const HEAL: &str = "\n  staleness: {policy: Heal, threshold: 10, window: 10s}";
const REPORT: &str = "\n  staleness: {policy: Report, threshold: 10, window: 10s}";

fn source_of_many(host: &Prepared) -> PathBuf {
    let source = host.source("a");
    for number in 0..FILES {
        fs::write(source.join(format!("file-{number}")), format!("{number}\n")).unwrap();
    }
    source
}

fn guest_on(host: &Host) -> Guest {
    host.until_ready("a");
    let config = GuestConfig::new(host.socket("a")).small();
    Guest::boot(config).unwrap_or_else(|error| panic!("{error}\n{}", host.log()))
}

/// Looks every file up and reads it. Returns how often that failed without free descriptors.
fn read_all(guest: &Guest) -> usize {
    let read = |number: usize| {
        let entry = guest.fuse().lookup(ROOT, format!("file-{number}"))?;
        let opened = guest.fuse().open(entry.nodeid, 0)?;
        let content = guest.fuse().read(entry.nodeid, opened.fh, 0, 64)?;
        assert_eq!(content, format!("{number}\n").into_bytes());
        guest.fuse().release(entry.nodeid, opened.fh, 0)
    };
    let refused = (0..FILES).filter_map(|number| read(number).err());
    let wanting = |errno| matches!(errno, Some(Errno::EMFILE | Errno::ENFILE));
    refused.inspect(|error| assert!(wanting(error.errno()), "{error:?}")).count()
}

fn metric(host: &Host, series: &str) -> f64 {
    let (_, page) = host.get("/metrics");
    let value = page.lines().find_map(|line| line.strip_prefix(series)).map(|value| value.trim().parse().unwrap());
    value.unwrap_or_else(|| panic!("no {series} in\n{page}"))
}

fn condition<'a>(share: &'a Value, kind: &str) -> &'a Value {
    let conditions = share["staleness"]["conditions"].as_array().unwrap();
    conditions.iter().find(|it| it["type"] == kind).unwrap()
}

fn is_stale(share: &Value, reason: &str) -> bool {
    share["staleness"]["conditions"].is_array() && condition(share, "Stale")["reason"] == reason
}

fn outcome(share: &Value) -> &Value {
    &share["staleness"]["lastRemedy"]["outcome"]
}

#[test]
fn file_handles_remedy_an_engine_without_open_files() {
    let host = prepare();
    let source = source_of_many(&host);
    host.declare("a.yaml", &manifest("a", &source, &format!("{SCARCE}{HEAL}")));
    let host = host.up();
    let guest = guest_on(&host);
    let refused = read_all(&guest);
    assert!(refused > 100, "the engine has room for all: {refused}");

    let share = host.until("a", "cured", |it| it["staleness"]["activeRemedies"][0]["remedy"] == "FileHandles");
    assert!(has_reason(&share, "RemedyActive"), "{share}");
    host.until("a", "handed over", |it| it["sessions"][0]["engine"]["inodeFileHandles"] == "Prefer");
    assert_eq!(read_all(&guest), 0);
    let share = host.until("a", "verified", |it| outcome(it) == "Verified");
    assert_eq!(condition(&share, "RemedyFailed")["status"], false, "{share}");
    assert!(metric(&host, "virtiofs_stale_events_total{share=\"a\",cause=\"FdExhausted\"}") >= refused as f64);
    assert_eq!(metric(&host, "virtiofs_remedies_total{share=\"a\",cause=\"FdExhausted\",outcome=\"Verified\"}"), 1.0);

    // The share declares what the remedy set: the amendment ends without a hand-over.
    let engines = share["sessions"][0]["engines"].clone();
    let declared = SCARCE.replace("Never", "Prefer");
    host.declare("a.yaml", &manifest("a", &source, &format!("{declared}{HEAL}")));
    let share = host.until("a", "as declared", |it| !has_reason(it, "RemedyActive"));
    assert_eq!(share["sessions"][0]["engines"], engines);
}

#[test]
fn policy_report_changes_nothing() {
    let host = prepare();
    let source = source_of_many(&host);
    host.declare("a.yaml", &manifest("a", &source, &format!("{SCARCE}{REPORT}")));
    let host = host.up();
    let guest = guest_on(&host);
    let refused = read_all(&guest);

    let share = host.until("a", "reported stale", |it| is_stale(it, "FdExhausted"));
    assert!(has_reason(&share, "FdExhausted"), "{share}");
    // As long as a remedy would take.
    let share = host.until("a", "quiet again", |it| is_stale(it, "None"));
    assert_eq!(share["sessions"][0]["engine"]["inodeFileHandles"], "Never");
    assert_eq!((&share["sessions"][0]["engines"], &share["staleness"]["lastRemedy"]), (&1.into(), &Value::Null));
    assert!(metric(&host, "virtiofs_stale_events_total{share=\"a\",cause=\"FdExhausted\"}") >= refused as f64);
    assert!(read_all(&guest) >= refused, "somebody has cured it");
}

#[test]
fn without_a_remedy_the_requirement_is_reported() {
    let host = prepare();
    let source = source_of_many(&host);
    host.declare("a.yaml", &manifest("a", &source, &format!("{SCARCE}{HEAL}")));
    // Neither file handles nor more open files are possible here.
    let host = host.up_limited(&["dac_read_search", "sys_resource"], 1024);
    let guest = guest_on(&host);
    let refused = read_all(&guest);

    let share = host.until("a", "given up", |it| has_reason(it, "RemedyFailed"));
    let notices = share["notices"].as_array().unwrap();
    let failed = notices.iter().find(|it| it["reason"] == "RemedyFailed").unwrap();
    for word in ["CAP_DAC_READ_SEARCH", "Kubernetes", "Podman", "systemd", "LimitNOFILE"] {
        assert!(failed["remedy"].as_str().unwrap().contains(word), "{word} in {failed}");
    }
    assert_eq!(share["sessions"][0]["engines"], 1, "no guest is touched by what cannot help: {share}");
    // What the guest holds is still served.
    let held = guest.fuse().lookup(ROOT, "file-0").unwrap();
    assert_eq!(guest.fuse().getattr(held.nodeid, None).unwrap().size, 2);
    assert!(read_all(&guest) >= refused);
    assert_eq!(condition(&host.share("a"), "RemedyFailed")["reason"], "FdExhausted");
}

#[test]
fn a_replaced_source_is_followed() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, &format!("  content: Shared{HEAL}")));
    let host = host.up();
    let guest = guest_on(&host);
    let hello = |guest: &Guest| {
        let entry = guest.fuse().lookup(ROOT, "hello").ok()?;
        let opened = guest.fuse().open(entry.nodeid, 0).ok()?;
        guest.fuse().read(entry.nodeid, opened.fh, 0, 64).ok()
    };
    assert_eq!(hello(&guest).unwrap(), b"from the host\n");

    fs::rename(&source, source.with_file_name("old")).unwrap();
    fs::create_dir(&source).unwrap();
    fs::write(source.join("hello"), "another\n").unwrap();
    host.until("a", "handed over onto it", |it| outcome(it) == "Verified");
    assert_eq!(hello(&guest).unwrap(), b"another\n");
    let share = host.share("a");
    assert_eq!(share["staleness"]["lastRemedy"]["cause"], "SourceGone", "{share}");
    assert_eq!(metric(&host, "virtiofs_remedies_total{share=\"a\",cause=\"SourceGone\",outcome=\"Verified\"}"), 1.0);
}

#[test]
fn a_content_violation_is_reported_without_hand_over() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, &format!("  content: Immutable{HEAL}")));
    let host = host.up();
    let guest = guest_on(&host);
    let entry = guest.fuse().lookup(ROOT, "hello").unwrap();

    replace(&source.join("hello"));
    _ = guest.fuse().open(entry.nodeid, 0);
    let share = host.until("a", "reported stale", |it| is_stale(it, "SourceReplaced"));
    let notice = share["notices"].as_array().unwrap().iter().find(|it| it["reason"] == "SourceReplaced").unwrap();
    assert!(notice["message"].as_str().unwrap().contains("hello"), "{notice}");
    assert!(notice["remedy"].as_str().unwrap().contains("stop changing the source"), "{notice}");
    assert_eq!(share["staleness"]["lastStale"]["path"], "hello", "{share}");
    let table = String::from_utf8(host.status_output(&[]).stdout).unwrap();
    assert!(table.contains("1 SourceReplaced; last path: hello (SourceReplaced)"), "{table}");
    assert_eq!((&share["sessions"][0]["engines"], &share["staleness"]["lastRemedy"]), (&1.into(), &Value::Null));
}

fn replace(file: &Path) {
    let new = file.with_extension("new");
    fs::write(&new, "replaced\n").unwrap();
    fs::rename(new, file).unwrap();
}

#[test]
fn a_remedy_outlives_its_agent() {
    let host = prepare();
    let source = source_of_many(&host);
    host.declare("a.yaml", &manifest("a", &source, &format!("{SCARCE}{HEAL}")));
    let mut host = host.run(&[]);
    let guest = guest_on(&host);
    read_all(&guest);
    let share = host.until("a", "handed over", |it| it["sessions"][0]["engine"]["inodeFileHandles"] == "Prefer");
    let engines = share["sessions"][0]["engines"].clone();

    host.kill_and_run();
    let share = host.until("a", "verified by the next agent", |it| outcome(it) == "Verified");
    assert_eq!(share["sessions"][0]["engines"], engines, "{share}");
    assert_eq!(read_all(&guest), 0);
}

/// How long a recovery takes: `cargo test --release -p virtiofs-agent --test staleness -- --ignored --show-output`.
#[test]
#[ignore = "20 guests one after another: minutes"]
fn time_from_the_first_event_to_recovery() {
    let (mut in_force, mut verified) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let host = prepare();
        let source = source_of_many(&host);
        host.declare("a.yaml", &manifest("a", &source, &format!("{SCARCE}{HEAL}")));
        let host = host.up();
        let guest = guest_on(&host);
        // The reading begins before the first event, by the time that the limit takes to fill.
        let begin = now_ms();
        read_all(&guest);
        let share = host.until("a", "verified", |it| outcome(it) == "Verified");
        let last = &share["staleness"]["lastRemedy"];
        in_force.push(last["applied"].as_u64().unwrap().saturating_sub(begin));
        verified.push(last["ended"].as_u64().unwrap().saturating_sub(begin));
    }
    for (what, mut times) in [("in force", in_force), ("verified, with a window of 10 s", verified)] {
        times.sort_unstable();
        println!(
            "{what}: median {} ms, worst {} ms of {}",
            times[times.len() / 2],
            times[times.len() - 1],
            times.len()
        );
    }
}

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}
