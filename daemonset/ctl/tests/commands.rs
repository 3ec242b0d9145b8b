//! Commands that act on shares, under a guest that must notice nothing.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use testkit::guest::{Guest, GuestConfig};
use testkit::host::{Host, WORKABLE, has_reason, manifest, prepare, under_work};

const ROOT: u64 = 1;

/// A host with one writable share.
fn host_with(share: &str, more: &str) -> (Host, std::path::PathBuf) {
    let prepared = prepare();
    let source = prepared.source(share);
    prepared.declare("share.yaml", &manifest(share, &source, more));
    let host = prepared.run(&[]);
    host.until_ready(share);
    (host, source)
}

fn guest_at(host: &Host, socket: &str) -> Guest {
    Guest::boot(GuestConfig::new(host.socket(socket)).small()).unwrap_or_else(|error| panic!("{error}\n{}", host.log()))
}

fn session(host: &Host, share: &str) -> serde_json::Value {
    host.until(share, "in use", |it| it["sessions"][0]["state"] == "Serving")["sessions"][0].clone()
}

#[test]
fn a_new_engine_takes_over_on_demand() {
    let (mut host, source) = host_with("a", WORKABLE);
    let (good, output) = host.run_ctl(&["handover", "a"]);
    assert!(good && output.contains("no VM uses it"), "{output}");
    under_work(&mut host, "a", &source, |host| {
        for _ in 0..5 {
            let before = session(host, "a");
            let (good, output) = host.run_ctl(&["handover", "a"]);
            let after = session(host, "a");
            assert!(good, "{output}\n{}", host.log());
            assert_ne!(before["enginePid"], after["enginePid"]);
            assert!(output.contains(&format!("engine {} -> {}", before["enginePid"], after["enginePid"])), "{output}");
            assert_eq!(after["lastReplacement"]["outcome"], "HandedOver", "{after}");
            assert_eq!(after["activeGeneration"], after["desiredGeneration"], "{after}");
        }
        let id = session(host, "a")["id"].as_str().unwrap().to_owned();
        let (good, output) = host.run_ctl(&["handover", "a", "--session", &id]);
        assert!(good && output.starts_with(&id), "{output}");
    });
}

#[test]
fn a_source_is_released_and_resumed() {
    let (mut host, source) = host_with("a", WORKABLE);
    under_work(&mut host, "a", &source, |host| {
        // Rejected while the guest has a file open that no name leads to.
        let output = host.wait("the source to be released", || {
            let (good, output) = host.run_ctl(&["release", "a", "--for", "5m"]);
            assert!(good || output.contains("OrphanedFilesOpen"), "{output}\n{}", host.log());
            good.then_some(output)
        });
        assert!(output.contains("1 VMs wait") && output.contains("virtiofsctl resume a"), "{output}");
        let share = host.until("a", "released", |it| it["state"] == "Degraded" && has_reason(it, "SourceReleased"));
        assert!(share["releasedUntil"].as_u64().is_some(), "{share}");
        assert_eq!(share["sessions"][0]["state"], "Released", "{share}");
        assert_eq!(share["sessions"][0]["enginePid"], serde_json::Value::Null, "{share}");
        let table = host.run_ctl(&["status"]).1;
        assert!(table.contains("released until"), "{table}");

        let (good, output) = host.run_ctl(&["resume", "a"]);
        assert!(good, "{output}");
        let share = host.until("a", "resumed", |it| it["state"] == "Ready" && it["sessions"][0]["state"] == "Serving");
        assert_eq!(share["releasedUntil"], serde_json::Value::Null);
    });
    let (good, output) = host.run_ctl(&["release", "a", "--for", "100h"]);
    assert!(!good && output.contains("a is not released"), "{output}");
}

#[test]
fn close_needs_force() {
    let (host, _source) = host_with("images", "");
    let guest = guest_at(&host, "images");
    let id = session(&host, "images")["id"].as_str().unwrap().to_owned();

    let (good, output) = host.run_ctl(&["close", "images"]);
    assert!(!good && output.contains("--force") && output.contains(&id), "{output}");
    guest.fuse().lookup(ROOT, "hello").unwrap();
    for words in
        [&["close", "imgaes", "--force"][..], &["handover", "imgaes"], &["release", "imgaes"], &["status", "imgaes"]]
    {
        let (good, output) = host.run_ctl(words);
        assert!(!good && output.contains("Did you mean \"images\"?"), "{words:?}: {output}");
    }
    let (good, output) = host.run_ctl(&["close", "images", "--session", "images-0", "--force"]);
    assert!(!good && output.contains(&format!("Did you mean {id:?}?")), "{output}");

    let (good, output) = host.run_ctl(&["close", "images", "--session", &id, "--force"]);
    assert!(good && output.contains(&format!("{id}: ended")), "{output}");
    guest.fuse().lookup(ROOT, "hello").unwrap_err();
    host.until("images", "left alone", |it| it["sessions"].as_array().is_some_and(Vec::is_empty));
    drop(guest);
    guest_at(&host, "images").fuse().lookup(ROOT, "hello").unwrap();
}

#[test]
fn a_trace_shows_requests() {
    let (host, _source) = host_with("a", "");
    let guest = guest_at(&host, "a");
    let id = session(&host, "a")["id"].as_str().unwrap().to_owned();
    let mut trace = host.command(&["trace", &id, "--for", "5m"]).stdout(Stdio::piped()).spawn().unwrap();
    host.until("a", "traced", |it| it["sessions"][0]["tracedUntil"].is_u64());
    guest.fuse().lookup(ROOT, "no\u{1b}[31m\nsuch").unwrap_err();
    guest.fuse().lookup(ROOT, "hello").unwrap();

    let (mut output, mut stdout) = (String::new(), trace.stdout.take().unwrap());
    let mut buffer = [0; 4096];
    while !output.contains(" hello\n") {
        let length = stdout.read(&mut buffer).unwrap();
        assert_ne!(length, 0, "it ended early: {output}");
        output.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
    }
    let pid = nix::unistd::Pid::from_raw(trace.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(trace.wait().unwrap().success());
    assert!(
        output.contains("lookup") && output.contains("ENOENT") && output.contains(r"no\u{1b}[31m\nsuch"),
        "{output}"
    );
    assert!(!output.contains('\u{1b}'));
    host.until("a", "traced no more", |it| it["sessions"][0]["tracedUntil"].is_null());

    let (good, output) = host.run_ctl(&["trace", &id, "--for", "1s", "-o", "json"]);
    assert!(good && output.is_empty(), "nothing was asked meanwhile: {output}");
}

#[test]
fn a_socket_serves_a_directory_of_a_share() {
    let (mut host, source) = host_with("a", "  access: ReadWrite");
    for (name, content) in [("vm-1/secret", "one"), ("vm-2/secret", "two")] {
        fs::create_dir_all(source.join(name).parent().unwrap()).unwrap();
        fs::write(source.join(name), content).unwrap();
    }
    let (good, output) = host.run_ctl(&["socket", "a", "vm-1", "--sub-path", "vm-1", "--mode", "0600"]);
    assert!(good && output.trim_end() == host.socket("a.vm-1").display().to_string(), "{output}");
    let guest = guest_at(&host, "a.vm-1");
    guest.fuse().lookup(ROOT, "secret").unwrap();
    assert_eq!(guest.fuse().lookup(ROOT, "hello").unwrap_err().errno(), Some(Errno::ENOENT));
    let share = host.until("a", "used at both", |it| it["sockets"].as_array().is_some_and(|it| it.len() == 2));
    assert_eq!((&share["sockets"][0]["name"], &share["sockets"][1]["subPath"]), (&"a".into(), &"vm-1".into()));
    assert_eq!(share["sessions"][0]["endpoint"], "a.vm-1");

    // Another agent reads it back and applies an edit of the share to it.
    host.kill_and_run();
    host.declare("share.yaml", &manifest("a", &source, "  access: ReadWrite\n  engine: {maxInodes: 5000}"));
    let reached = |it: &serde_json::Value| it["state"] == "Ready" && it["sessions"][0]["engine"]["maxInodes"] == 5000;
    host.until("a", "reconfigured", reached);
    guest.fuse().lookup(ROOT, "secret").unwrap();
    assert_eq!(guest.fuse().lookup(ROOT, "hello").unwrap_err().errno(), Some(Errno::ENOENT));

    for (words, why) in [
        (&["socket", "a", "vm-3", "--sub-path", "vm-3"][..], "vm-3"),
        (&["socket", "a", "vm-3", "--sub-path", "../vm-1"], ".."),
        (&["socket", "a", "VM"], "a-z"),
        (&["socket", "b", "vm-1"], "Did you mean \"a\"?"),
        (&["socket", "a", "vm-9", "--remove"], "no socket \"vm-9\""),
    ] {
        let (good, output) = host.run_ctl(words);
        assert!(!good && output.contains(why), "{words:?}: {output}");
    }
    let (good, output) = host.run_ctl(&["socket", "a", "vm-1", "--remove"]);
    assert!(good, "{output}");
    host.wait("the socket to go", || (!host.socket("a.vm-1").exists()).then_some(()));
    guest.fuse().lookup(ROOT, "secret").unwrap();
    drop(guest);
    host.until("a", "left alone", |it| it["sockets"].as_array().is_some_and(|it| it.len() == 1));
}

#[test]
fn a_second_vm_of_an_exclusive_share_is_rejected() {
    let (host, _source) = host_with("a", "  content: Exclusive\n  access: ReadWrite");
    let guest = guest_at(&host, "a");
    session(&host, "a");
    assert!(Guest::boot(GuestConfig::new(host.socket("a")).small()).is_err());
    let share = host.until("a", "reported", |it| has_reason(it, "ExclusiveRejected"));
    assert_eq!(share["state"], "Degraded");
    assert_eq!(share["rejectedExclusive"], 1, "{share}");
    assert!(host.get("/metrics").1.contains("virtiofs_exclusive_rejections_total{share=\"a\"} 1\n"));
    guest.fuse().lookup(ROOT, "hello").unwrap();
}

#[test]
fn a_support_bundle_has_no_secrets() {
    let prepared = prepare();
    let source = prepared.source("a");
    let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {password: hunter2}\n---\n";
    prepared.declare(
        "a.yaml",
        &format!("{secret}{}", manifest("a", &source, "").replace("name: a", "name: a, annotations: {token: hunter2}")),
    );
    let host = prepared.run(&[]);
    host.until_ready("a");
    let guest = guest_at(&host, "a");
    guest.fuse().lookup(ROOT, "hello").unwrap();
    session(&host, "a");
    let file = host.path("bundle.tar.gz");
    let (good, output) = host.run_ctl(&["support-bundle", "--output", file.to_str().unwrap()]);
    assert!(good, "{output}");
    let unpacked = host.path("unpacked");
    fs::create_dir(&unpacked).unwrap();
    assert!(Command::new("tar").arg("-xzf").arg(&file).arg("-C").arg(&unpacked).status().unwrap().success());
    let part = |name: &str| fs::read_to_string(unpacked.join("virtiofs-support").join(name)).unwrap();
    for (name, word) in [
        ("README.txt", "file names of guests: left out"),
        ("status.json", "status.virtiofs.dev/v1"),
        ("status.txt", "broker runs"),
        ("metrics.txt", "virtiofs_requests_total{share=\"a\",operation=\"lookup\"}"),
        ("manifests.json", "\"name\": \"a\""),
        ("host.txt", "Max open files"),
        ("log.txt", ""),
    ] {
        let content = part(name);
        assert!(content.contains(word), "{word} in {name}:\n{content}");
        assert!(!content.contains("hunter2"), "{name}:\n{content}");
        assert!(name == "README.txt" || output.contains(name), "{output}");
    }
    let (good, output) = host.run_ctl(&["support-bundle", "--output", file.to_str().unwrap()]);
    assert!(!good && output.contains("--output") && output.contains("exists"), "{output}");
}

#[test]
fn commands_report_a_missing_broker() {
    let host = prepare().run_alone(&[]);
    for words in [
        &["handover", "a"][..],
        &["release", "a"],
        &["resume", "a"],
        &["close", "a"],
        &["trace", "a-1"],
        &["socket", "a", "b"],
    ] {
        let (good, output) = host.run_ctl(words);
        assert!(!good && output.contains("no broker answers"), "{words:?}: {output}");
    }
}
