//! Invalid manifests and deaths of the agent do not affect guests, and no count is lost.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use testkit::guest::{Guest, GuestConfig};
use testkit::host::{Host, WORKABLE, has_reason, manifest, prepare, signalled, under_work};
use testkit::processes::Holdings;

fn bad_manifests() -> Vec<PathBuf> {
    let folder: PathBuf =
        [env!("CARGO_MANIFEST_DIR"), "..", "..", "crds", "tests", "manifests", "bad"].iter().collect();
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|it| it.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|it| it == "yaml"));
    files.sort();
    files
}

#[test]
fn invalid_manifests_do_not_affect_a_guest() {
    let files = bad_manifests();
    assert!(files.len() >= 30, "{}", files.len());
    let prepared = prepare();
    let source = prepared.source("works");
    prepared.declare("works.yaml", &manifest("works", &source, WORKABLE));
    let mut host = prepared.run(&[]);
    under_work(&mut host, "works", &source, |host| {
        let engine = |share: &Value| share["sessions"][0]["enginePid"].clone();
        let before = engine(&host.until("works", "in use", |it| it["sessions"][0]["state"] == "Serving"));
        // One after another as edits of one file, then all together.
        for file in files.iter().step_by(9) {
            host.declare("bad.yaml", &fs::read_to_string(file).unwrap());
            let origin = host.path("shares/bad.yaml").display().to_string();
            let rejected =
                |status: Value| status["problems"].as_array().unwrap().iter().any(|it| it["file"] == *origin);
            host.wait(&format!("{} to be rejected", file.display()), || rejected(host.status()).then_some(()));
            fs::remove_file(host.path("shares/bad.yaml")).unwrap();
            host.wait("no problem", || host.status()["problems"].as_array().unwrap().is_empty().then_some(()));
        }
        for file in &files {
            let name = file.file_name().unwrap().to_str().unwrap();
            host.declare(name, &fs::read_to_string(file).unwrap());
        }
        let refused = |status: &Value, file: &PathBuf| {
            let name = file.file_name().unwrap().to_str().unwrap();
            status["problems"].as_array().unwrap().iter().any(|problem| {
                let there = problem["file"].as_str().is_some_and(|path| path.ends_with(&format!("/{name}")));
                there && !problem["message"].as_str().unwrap().is_empty()
            })
        };
        let status = host.wait("all to be rejected", || {
            Some(host.status()).filter(|status| files.iter().all(|file| refused(status, file)))
        });
        let works = status["shares"].as_array().unwrap().iter().find(|it| it["name"] == "works").unwrap();
        assert_eq!((works["state"].as_str().unwrap(), engine(works)), ("Ready", before), "{works}");
    });
}

#[test]
fn killing_the_agent_during_edits_loses_nothing() {
    let prepared = prepare();
    let source = prepared.source("a");
    let version = |inodes: u64| {
        manifest("a", &source, &format!("  access: ReadWrite\n  engine: {{xattr: Enabled, maxInodes: {inodes}}}"))
    };
    prepared.declare("a.yaml", &version(100_000));
    let mut host = prepared.run(&[]);
    host.until_ready("a");
    let before = Holdings::of_tree(host.broker().as_raw()).unwrap();
    let inodes = |share: &Value| share["active"]["engine"]["maxInodes"].as_u64();
    under_work(&mut host, "a", &source, |host| {
        for round in 0..100u64 {
            let text = match round % 4 {
                0 => version(100_000 + round),
                1 => "spec: [".to_owned(),
                2 => manifest("a", &source, "  access: Sometimes"),
                _ => version(200_000 + round),
            };
            host.declare("a.yaml", &text);
            // Long enough for some agents to act, too short for others.
            sleep(Duration::from_millis(round * 37 % 250));
            host.kill_and_run();
        }
        host.declare("a.yaml", &version(300_000));
        host.until("a", "as last declared", |it| it["state"] == "Ready" && inodes(it) == Some(300_000));

        // A document that became invalid before the next agent started keeps its last version.
        assert!(signalled(host.end(Signal::SIGKILL)));
        host.declare("a.yaml", &manifest("a", &source, "  access: Sometimes"));
        host.kill_and_run();
        let kept = host.until("a", "kept", |it| it["state"] == "Degraded" && has_reason(it, "ManifestInvalid"));
        assert_eq!(inodes(&kept), Some(300_000), "{kept}");
        assert_eq!(kept["sessions"].as_array().unwrap().len(), 1, "{kept}");
    });
    host.wait("nothing to be left", || {
        Holdings::of_tree(host.broker().as_raw()).unwrap().leaked_since(&before).is_empty().then_some(())
    });
}

#[test]
fn counters_outlive_agents_and_brokers() {
    let prepared = prepare();
    let source = prepared.source("a");
    prepared.declare("a.yaml", &manifest("a", &source, ""));
    let mut host = prepared.run(&[]);
    let counted = |host: &Host| {
        let (_, page) = host.get("/metrics");
        let line = page.lines().find(|it| it.starts_with("virtiofs_sessions_started_total{share=\"a\"}"));
        line.and_then(|it| it.rsplit_once(' ')).and_then(|(_, value)| value.parse::<f64>().ok()).unwrap_or(0.0)
    };
    for sessions in 1..=2 {
        host.until_ready("a");
        let config = GuestConfig::new(host.socket("a")).small();
        drop(Guest::boot(config).unwrap());
        host.wait("the session to be counted", || (counted(&host) == f64::from(sessions)).then_some(()));
        host.new_broker();
    }
    // This broker has counted nothing itself; it stores what the agent knew.
    host.until_ready("a");
    host.wait("the new broker to be seen", || (counted(&host) == 2.0).then_some(()));
    host.kill_and_run();
    host.until_ready("a");
    assert_eq!(counted(&host), 2.0);
}

#[test]
fn a_hanging_request_is_reported_and_other_sessions_continue() {
    let prepared = prepare();
    let source = prepared.source("a");
    prepared.declare("a.yaml", &manifest("a", &source, WORKABLE));
    let mut host = prepared.run(&[]);
    under_work(&mut host, "a", &source, |host| {
        let session = |host: &Host| host.share("a")["sessions"][0].clone();
        host.until("a", "in use", |it| it["sessions"][0]["state"] == "Serving");
        // An engine stopped during a request looks to its guest like a source that hangs.
        let engine = host.wait("the engine to be at a request", || {
            let engine = Pid::from_raw(session(host)["enginePid"].as_i64()? as i32);
            kill(engine, Signal::SIGSTOP).ok()?;
            sleep(Duration::from_millis(20));
            let caught = session(host)["oldestRequest"].is_object();
            if !caught {
                kill(engine, Signal::SIGCONT).unwrap();
            }
            caught.then_some(engine)
        });
        let hung = host.until("a", "hung", |it| has_reason(it, "SourceHung"));
        let oldest = &hung["sessions"][0]["oldestRequest"];
        assert!(oldest["ageMilliseconds"].as_u64().unwrap() >= 10_000, "{hung}");
        assert!(!oldest["operation"].as_str().unwrap().is_empty(), "{hung}");
        let page = host.get("/metrics").1;
        let age =
            page.lines().find_map(|it| it.strip_prefix("virtiofs_oldest_request_age_seconds{share=\"a\"} ")).unwrap();
        assert!(age.parse::<f64>().unwrap() >= 10.0, "{age}");
        assert!(page.contains("virtiofs_share_condition{share=\"a\",reason=\"SourceHung\"} 1\n"));
        host.wait("the log to say so", || host.log().contains("SourceHung").then_some(()));
        assert!(host.run_ctl(&["status", "a"]).1.contains("waits for the source"));

        let other = Guest::boot(GuestConfig::new(host.socket("a")).small()).unwrap();
        other.fuse().lookup(1, "hello").unwrap();
        kill(engine, Signal::SIGCONT).unwrap();
        host.until("a", "well", |it| it["state"] == "Ready");
    });
}
