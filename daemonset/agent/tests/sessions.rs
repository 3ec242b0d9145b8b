//! A guest works on a share: `status` and `/metrics` show what it did.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::{Guest, GuestConfig};
use testkit::host::{Host, manifest, prepare};

const ROOT: u64 = 1;

/// Samples of a page in the text format, by name and labels. Any other line is a failure.
fn samples(page: &str) -> BTreeMap<String, f64> {
    let lines = page.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
        assert!(series.starts_with("virtiofs_"), "{line}");
        (series.to_owned(), value.parse().unwrap_or_else(|_| panic!("no number: {line}")))
    };
    let found: Vec<_> = lines.map(sample).collect();
    let by_series: BTreeMap<_, _> = found.iter().cloned().collect();
    assert_eq!(by_series.len(), found.len(), "a series twice in\n{page}");
    by_series
}

/// The metrics as they are now.
fn scrape(host: &Host) -> BTreeMap<String, f64> {
    // Clients within 200 ms get the same page.
    std::thread::sleep(Duration::from_millis(250));
    let (code, page) = host.get("/metrics");
    assert_eq!(code, 200, "{page}");
    samples(&page)
}

fn guest_on(host: &Host, share: &str) -> Guest {
    host.until_ready(share);
    let config = GuestConfig::new(host.socket(share)).small();
    Guest::boot(config).unwrap_or_else(|error| panic!("{error}\n{}", host.log()))
}

/// Looks a file up, reads it, and looks up a missing one.
fn work(guest: &Guest) {
    let hello = guest.fuse().lookup(ROOT, "hello").unwrap();
    let opened = guest.fuse().open(hello.nodeid, 0).unwrap();
    assert_eq!(guest.fuse().read(hello.nodeid, opened.fh, 0, 4096).unwrap(), b"from the host\n");
    guest.fuse().release(hello.nodeid, opened.fh, 0).unwrap();
    _ = guest.fuse().getattr(ROOT, None).unwrap();
}

#[test]
fn a_session_is_in_status_and_metrics() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, "  content: Shared"));
    let host = host.up();
    let guest = guest_on(&host, "a");
    work(&guest);
    guest.fuse().lookup(ROOT, "nowhere").unwrap_err();

    let share = host.until("a", "in use", |it| it["sessions"][0]["state"] == "Serving");
    let session = &share["sessions"][0];
    assert_eq!(session["vmmPid"], std::process::id());
    assert!(session["guestMemoryBytes"].as_u64().unwrap() >= 64 << 20, "{session}");
    assert!(session["preflight"]["sandbox"].is_string(), "{session}");
    assert_eq!(session["counts"]["errorsByErrno"]["ENOENT"], 1, "{session}");
    assert!(session["counts"]["requestsByOperation"]["lookup"].as_u64().unwrap() >= 2, "{session}");
    assert!(share["mount"]["qemu"].as_str().unwrap().contains(host.socket("a").to_str().unwrap()));

    let found = scrape(&host);
    assert_eq!(found["virtiofs_broker_up"], 1.0);
    assert_eq!(found["virtiofs_share_ready{share=\"a\"}"], 1.0);
    assert_eq!(found["virtiofs_sessions{share=\"a\",state=\"Serving\"}"], 1.0);
    assert!(found["virtiofs_engine_starts_total{share=\"a\"}"] >= 1.0);
    assert_eq!(found["virtiofs_error_replies_total{share=\"a\",errno=\"ENOENT\"}"], 1.0);
    assert_eq!(found["virtiofs_read_bytes_total{share=\"a\"}"], 14.0);
    let count = "virtiofs_request_duration_seconds_count{share=\"a\",operation=\"lookup\"}";
    let buckets = "virtiofs_request_duration_seconds_bucket{share=\"a\",operation=\"lookup\",le=\"+Inf\"}";
    assert_eq!(found[count], found[buckets]);
    assert!(found["virtiofs_fullest_engine_open_files{share=\"a\"}"] > 0.0);
    assert!(found["virtiofs_fullest_engine_open_files_limit{share=\"a\"}"] > 0.0);

    drop(guest);
    host.until("a", "left alone", |it| it["sessions"].as_array().is_some_and(Vec::is_empty));
    let after = scrape(&host);
    assert_eq!(after["virtiofs_read_bytes_total{share=\"a\"}"], 14.0);
    assert_eq!(after["virtiofs_sessions{share=\"a\",state=\"Serving\"}"], 0.0);
}

#[test]
fn a_guest_near_its_limit_is_reported() {
    const MOST: u64 = 1024;
    let host = prepare();
    let source = host.source("a");
    for number in 0..=MOST {
        std::fs::write(source.join(format!("file-{number}")), "").unwrap();
    }
    host.declare("a.yaml", &manifest("a", &source, "  engine: {maxInodes: 1024}"));
    let host = host.up();
    let guest = guest_on(&host, "a");
    let look_up = |number: u64| guest.fuse().lookup(ROOT, format!("file-{number}")).map(|entry| entry.nodeid);
    let held: Vec<_> = (0..900).map(|number| look_up(number).unwrap()).collect();
    let opened = guest.fuse().open(held[0], 0).unwrap();

    let fullest = |found: &BTreeMap<String, f64>| {
        let value = |name| found[&format!("virtiofs_fullest_session_held_inodes{name}{{share=\"a\"}}")];
        value("") / value("_limit")
    };
    let near = scrape(&host);
    assert_eq!(near["virtiofs_held_inodes{share=\"a\"}"], 900.0);
    assert_eq!(near["virtiofs_open_handles{share=\"a\"}"], 1.0);
    assert!(fullest(&near) > 0.8 && fullest(&near) < 1.0, "{near:?}");
    assert!(!near.contains_key("virtiofs_error_replies_total{share=\"a\",errno=\"ENFILE\"}"));
    let session = &host.share("a")["sessions"][0];
    assert_eq!(session["held"], serde_json::json!({"inodes": 900, "handles": 1}), "{session}");
    assert_eq!(session["inodesLimit"], MOST, "{session}");
    let table = String::from_utf8(host.status_output(&[]).stdout).unwrap();
    assert!(table.contains("900 of 1024"), "{table}");

    let refused: Vec<_> = (900..=MOST).filter_map(|number| look_up(number).err()).collect();
    assert!(!refused.is_empty() && refused.iter().all(|error| error.errno() == Some(Errno::ENFILE)), "{refused:?}");
    let full = scrape(&host);
    assert_eq!(fullest(&full), 1.0);
    assert_eq!(full["virtiofs_error_replies_total{share=\"a\",errno=\"ENFILE\"}"], refused.len() as f64);

    guest.fuse().release(held[0], opened.fh, 0).unwrap();
    guest.fuse().forget(held[0], 1).unwrap();
    look_up(MOST).unwrap();
    assert_eq!(scrape(&host)["virtiofs_open_handles{share=\"a\"}"], 0.0);
}

#[test]
fn replacements_are_counted_with_their_pause() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, "  content: Shared"));
    let host = host.up();
    let guest = guest_on(&host, "a");
    work(&guest);
    let before = scrape(&host);
    for (family, outcome) in
        [("handovers", "Done"), ("handovers", "Aborted"), ("recoveries", "Done"), ("recoveries", "Abandoned")]
    {
        assert_eq!(before[&format!("virtiofs_{family}_total{{share=\"a\",outcome=\"{outcome}\"}}")], 0.0);
    }
    let engine = host.share("a")["sessions"][0]["enginePid"].as_i64().unwrap();
    kill(Pid::from_raw(engine as i32), Signal::SIGKILL).unwrap();
    work(&guest);
    host.declare("a.yaml", &manifest("a", &source, "  content: Shared\n  engine: {maxInodes: 5000}"));
    let share = host.until("a", "handed over", |it| it["counts"]["replacements"]["handOvers"]["count"] == 1);
    work(&guest);

    assert_eq!(share["counts"]["replacements"]["recoveries"]["count"], 1, "{share}");
    assert!(share["counts"]["replacements"]["recoveries"]["nanoseconds"].as_u64().unwrap() > 0, "{share}");
    let found = scrape(&host);
    assert_eq!(found["virtiofs_handovers_total{share=\"a\",outcome=\"Done\"}"], 1.0);
    assert_eq!(found["virtiofs_recoveries_total{share=\"a\",outcome=\"Done\"}"], 1.0);
    for family in ["virtiofs_handover_pause_seconds", "virtiofs_recovery_pause_seconds"] {
        assert_eq!(found[&format!("{family}_count{{share=\"a\"}}")], 1.0);
        assert!(found[&format!("{family}_sum{{share=\"a\"}}")] > 0.0);
    }
    let table = String::from_utf8(host.status_output(&[]).stdout).unwrap();
    assert!(table.contains("engine replacements: 1 handed over ("), "{table}");
}

#[test]
fn counters_never_go_backwards() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let host = host.up();
    let guest = guest_on(&host, "a");
    work(&guest);
    let before = scrape(&host);

    let broker = host.status()["broker"]["pid"].as_i64().unwrap();
    kill(Pid::from_raw(broker as i32), Signal::SIGKILL).unwrap();
    host.wait("another broker", || host.status()["broker"]["pid"].as_i64().filter(|pid| *pid != broker));
    // Its session continues.
    work(&guest);
    drop(guest);
    host.until("a", "left alone", |it| it["sessions"].as_array().is_some_and(Vec::is_empty));
    let guest = guest_on(&host, "a");
    work(&guest);
    let after = scrape(&host);

    let counters = before.iter().filter(|(series, _)| series.contains("_total") || series.contains("_count"));
    for (series, value) in counters {
        let now = after.get(series).unwrap_or_else(|| panic!("{series} is gone"));
        assert!(now >= value, "{series}: {value}, then {now}");
    }
    let read = "virtiofs_read_bytes_total{share=\"a\"}";
    assert_eq!((before[read], after[read]), (14.0, 42.0));
}

#[test]
fn one_failed_share_does_not_make_the_agent_unready() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source.with_file_name("missing"), ""));
    let host = host.up();
    host.until_not_ready("a", "SourceMissing");
    host.wait("readiness", || (host.get("/readyz").0 == 200).then_some(()));
    assert_eq!(host.get("/healthz").0, 200);
    let found = scrape(&host);
    assert_eq!(found["virtiofs_share_ready{share=\"a\"}"], 0.0);
    assert_eq!(found["virtiofs_share_condition{share=\"a\",reason=\"SourceMissing\"}"], 1.0);
}

#[test]
fn a_session_of_a_removed_share_continues() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let host = host.up();
    let guest = guest_on(&host, "a");
    std::fs::remove_file(host.path("shares/a.yaml")).unwrap();
    host.until("a", "draining", |it| it["state"] == "Draining");
    work(&guest);
    drop(guest);
    host.until("a", "gone", |it| it.is_null());
}

#[test]
fn a_share_with_another_source_waits_for_old_vms() {
    let host = prepare();
    let (old, new) = (host.source("old"), host.source("new"));
    host.declare("a.yaml", &manifest("a", &old, ""));
    let host = host.up();
    let guest = guest_on(&host, "a");
    std::fs::remove_file(host.path("shares/a.yaml")).unwrap();
    host.until("a", "draining", |it| it["state"] == "Draining");
    host.declare("a.yaml", &manifest("a", &new, ""));
    host.until_not_ready("a", "BrokerRejected");
    work(&guest);
    drop(guest);
    let share = host.until_ready("a");
    assert_eq!(share["active"]["source"], std::fs::canonicalize(&new).unwrap().display().to_string());
}

#[test]
fn a_session_shows_how_its_configuration_differs() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, "  content: Shared"));
    let host = host.up();
    let guest = guest_on(&host, "a");
    host.declare("a.yaml", &manifest("a", &source, "  engine: {killpriv: Enabled}"));
    let share = host.until("a", "reconfigured", |it| it["active"]["engine"]["killpriv"] == true);
    assert_eq!(share["sessions"][0]["differs"], serde_json::json!(["killpriv"]), "{share}");
    let table = String::from_utf8(host.status_output(&[]).stdout).unwrap();
    assert!(table.contains("still runs with another killpriv"), "{table}");
    work(&guest);
}

#[test]
fn status_is_a_table_or_a_versioned_document() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let host = host.up();
    host.until_ready("a");
    let status = host.status();
    assert_eq!(status["apiVersion"], "status.virtiofs.dev/v1");
    assert_eq!(status["kind"], "HostStatus");
    assert_eq!(status["agent"]["running"], true);
    assert_eq!(status["agent"]["pid"], host.agent().as_raw());

    let table = host.status_output(&["a"]);
    let text = String::from_utf8(table.stdout).unwrap();
    for word in ["NAME", "QEMU", "libvirt", "cloud-hypervisor", "crosvm", "mount -t virtiofs -o ro a /mnt"] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
    let unknown = host.status_output(&["nowhere"]);
    assert!(!unknown.status.success());
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("nowhere"));
}
