//! `virtiofs-agent up` with the real broker and engine.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::guest::{Guest, GuestConfig};
use testkit::host::{self, has_reason, manifest, prepare, signalled};
use testkit::processes::descendants;
use testkit::skip::require_that;

#[test]
fn valid_shares_are_served_next_to_invalid_ones() {
    let host = prepare();
    let good = host.source("good");
    fs::write(good.parent().unwrap().join("file"), "").unwrap();
    host.declare("good.yaml", &manifest("good", &good, ""));
    host.declare("missing.yml", &manifest("missing", &good.with_file_name("missing"), ""));
    host.declare("file.yaml", &manifest("file", &good.with_file_name("file"), ""));
    host.declare("kernel.yaml", &manifest("link", &good.with_file_name("link"), ""));
    std::os::unix::fs::symlink("/proc", good.with_file_name("link")).unwrap();
    host.declare("bad.yaml", &manifest("bad", &good, "  access: Sometimes"));
    let host = host.up();

    host.until_ready("good");
    UnixStream::connect(host.socket("good")).unwrap();
    for (share, reason) in [
        ("missing", "SourceMissing"),
        ("file", "SourceNotDirectory"),
        ("link", "SourceForbidden"),
        ("bad", "ManifestInvalid"),
    ] {
        let share = host.until_not_ready(share, reason);
        assert!(!share["notices"][0]["remedy"].as_str().unwrap().is_empty(), "{share}");
        assert!(!host.socket(share["name"].as_str().unwrap()).exists());
    }
    let said = host.stdout();
    assert!(said.contains(&format!(" at {}", host.socket("good").display())), "{said}");
    for line in ["missing: NotReady", "SourceMissing: ", "bad: NotReady", "spec.access"] {
        assert!(said.contains(line), "{line} in\n{said}");
    }
}

#[test]
fn a_share_follows_its_source() {
    let host = prepare();
    let source = host.source("late");
    fs::remove_dir_all(&source).unwrap();
    host.declare("late.yaml", &manifest("late", &source, ""));
    let host = host.up();
    host.until_not_ready("late", "SourceMissing");

    fs::create_dir(&source).unwrap();
    host.until_ready("late");
    fs::rename(&source, source.with_file_name("away")).unwrap();
    host.until_not_ready("late", "SourceMissing");
    fs::rename(source.with_file_name("away"), &source).unwrap();
    host.until_ready("late");
}

#[test]
fn a_source_is_served_by_its_canonical_path() {
    let host = prepare();
    let source = host.source("var-home");
    std::os::unix::fs::symlink("var-home", source.with_file_name("home")).unwrap();
    host.declare("home.yaml", &manifest("home", &source.with_file_name("home"), ""));
    let host = host.up();
    let share = host.until_ready("home");
    let canonical = fs::canonicalize(&source).unwrap();
    assert_eq!(share["active"]["source"], canonical.display().to_string());
    assert_eq!(share["source"], source.with_file_name("home").display().to_string());
}

#[test]
fn an_invalid_edit_keeps_the_last_valid_version() {
    let host = prepare();
    let (a, b) = (host.source("a"), host.source("b"));
    host.declare("a.yaml", &manifest("a", &a, "  content: Shared"));
    let host = host.up();
    assert_eq!(host.until_ready("a")["active"]["engine"]["cache"], "Auto");

    host.declare("a.yaml", &manifest("a", &a, "  content: Immutable"));
    host.until("a", "reconfigured", |it| it["state"] == "Ready" && it["active"]["engine"]["cache"] == "Always");
    host.declare("b.yaml", &manifest("b", &b, ""));
    host.until_ready("b");

    host.declare("a.yaml", &manifest("a", &a, "  content: Frozen"));
    let kept = host.until("a", "degraded", |it| it["state"] == "Degraded" && has_reason(it, "ManifestInvalid"));
    assert_eq!(kept["active"]["engine"]["cache"], "Always");
    assert!(kept["notices"][0]["message"].as_str().unwrap().contains("spec.content"), "{kept}");
    assert_eq!(host.status()["problems"][0]["field"], "spec.content");

    fs::remove_file(host.path("shares/b.yaml")).unwrap();
    host.until("b", "gone", |it| it.is_null());
    host.wait("the socket of b to go", || (!host.socket("b").exists()).then_some(()));
    host.declare("a.yaml", &manifest("a", &a, "  content: Immutable"));
    host.until("a", "accepted", |it| it["state"] == "Ready" && host.status()["problems"][0].is_null());
}

#[test]
fn missing_capabilities_are_reported() {
    let tried =
        Command::new("setpriv").args(["--bounding-set", "-dac_override", "true"]).stderr(Stdio::null()).status();
    let permitted = nix::unistd::geteuid().is_root() && tried.is_ok_and(|status| status.success());
    if !require_that("root and setpriv, to drop single capabilities", permitted) {
        return;
    }
    let host = prepare();
    let (open, secret) = (host.source("open"), host.source("secret"));
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&secret, Some(1234), Some(1234)).unwrap();
    host.declare("open.yaml", &manifest("open", &open, ""));
    host.declare("strict.yaml", &manifest("strict", &open, "  engine: {inodeFileHandles: Mandatory}"));
    host.declare("secret.yaml", &manifest("secret", &secret, ""));
    let host = host.up_without(&["dac_override", "dac_read_search"]);

    host.until("open", "degraded", |it| it["state"] == "Degraded" && has_reason(it, "CapabilityMissing"));
    let strict = host.until_not_ready("strict", "FileHandlesRequired");
    assert!(strict["notices"][0]["remedy"].as_str().unwrap().contains("CAP_DAC_READ_SEARCH"), "{strict}");
    host.until_not_ready("secret", "SourceUnreadable");

    // The cause is removed; the share recovers by itself.
    std::os::unix::fs::chown(&secret, Some(0), Some(0)).unwrap();
    host.until_ready("secret");
}

#[test]
fn a_share_inside_a_writable_one_is_rejected() {
    let host = prepare();
    let outer = host.source("outer");
    let inner = host.source("outer/inner");
    host.declare("outer.yaml", &manifest("outer", &outer, "  access: ReadWrite"));
    host.declare("inner.yaml", &manifest("inner", &inner, ""));
    let host = host.up();
    host.until_ready("outer");
    let share = host.until_not_ready("inner", "SourceForbidden");
    assert!(share["notices"][0]["message"].as_str().unwrap().contains("outer"), "{share}");
}

#[test]
fn a_writable_share_around_a_served_one_is_rejected() {
    let host = prepare();
    let outer = host.source("outer");
    let inner = host.source("outer/inner");
    host.declare("inner.yaml", &manifest("inner", &inner, ""));
    let host = host.up();
    host.until_ready("inner");
    host.declare("outer.yaml", &manifest("outer", &outer, "  access: ReadWrite"));
    let share = host.until_not_ready("outer", "SourceForbidden");
    assert!(share["notices"][0]["message"].as_str().unwrap().contains("inner"), "{share}");
    assert_eq!(host.share("inner")["state"], "Ready");
}

#[test]
fn ctrl_c_ends_everything() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let host = prepare();
        let source = host.source("a");
        host.declare("a.yaml", &manifest("a", &source, ""));
        let mut host = host.up();
        host.until_ready("a");
        let children = descendants(host.agent().as_raw()).unwrap();
        assert!(!children.is_empty());

        let status = host.end(signal);
        assert!(status.success(), "{signal}: {status}\n{}", host.log());
        host.until_gone(&children);
        assert_eq!(host.sockets(), [] as [std::path::PathBuf; 0]);
        assert!(!host.path("run/agent.json").exists());
    }
}

#[test]
fn unwritable_outputs_are_ignored() {
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    for outputs in [[full(), full()], [unread_pipe(), unread_pipe()]] {
        let host = prepare();
        let source = host.source("a");
        host.declare("a.yaml", &manifest("a", &source, ""));
        let mut host = host.up_printing_to(outputs);
        host.until_ready("a");
        let children = descendants(host.agent().as_raw()).unwrap();
        assert!(host.end(Signal::SIGINT).success());
        host.until_gone(&children);
        assert_eq!(host.sockets(), [] as [std::path::PathBuf; 0]);
        assert!(!host.path("run/agent.json").exists());
    }
}

/// A pipe whose reader has left.
fn unread_pipe() -> Stdio {
    std::io::pipe().unwrap().1.into()
}

#[test]
fn a_killed_agent_ends_its_broker() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let mut host = host.up();
    host.until_ready("a");
    let children = descendants(host.agent().as_raw()).unwrap();
    assert!(signalled(host.end(Signal::SIGKILL)));
    host.until_gone(&children);
}

#[test]
fn a_dead_broker_is_restarted_with_its_shares() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let host = host.up();
    host.until_ready("a");
    let guest = Guest::boot(GuestConfig::new(host.socket("a")).small()).unwrap();
    let fuse = guest.fuse();
    fuse.getattr(1, None).unwrap();
    let session = |host: &host::Host| host.share("a")["sessions"][0].clone();
    let before = host.wait("a session", || session(&host)["enginePid"].as_i64());
    let first = host.status()["broker"]["pid"].as_i64().unwrap();

    kill(Pid::from_raw(first as i32), Signal::SIGKILL).unwrap();
    host.wait("another broker", || host.status()["broker"]["pid"].as_i64().filter(|pid| *pid != first));
    host.until_ready("a");
    UnixStream::connect(host.socket("a")).unwrap();
    assert!(host.log().contains("broker died"), "{}", host.log());
    fuse.getattr(1, None).unwrap();
    assert_eq!(session(&host)["enginePid"].as_i64(), Some(before), "the VM's engine is the same");
}

#[test]
fn a_second_agent_is_rejected() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let host = host.up();
    host.until_ready("a");
    let second = Command::new(host::agent())
        .arg("up")
        .arg("--shares")
        .arg(host.path("shares"))
        .arg("--runtime-dir")
        .arg(host.path("run"))
        .arg("--broker")
        .arg(host::broker())
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another agent"), "{second:?}");
    UnixStream::connect(host.socket("a")).unwrap();
}

#[test]
fn a_missing_broker_or_directory_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let up = |options: &[&str]| {
        let mut command = Command::new(host::agent());
        command.arg("up").args(options).arg("--runtime-dir").arg(folder.path().join("run")).output().unwrap()
    };
    let shares = folder.path().to_str().unwrap();
    for (options, word) in [
        (["--shares", shares, "--broker", "/nowhere/broker"], "/nowhere/broker"),
        (["--shares", "/nowhere/shares", "--broker", "/bin/true"], "/nowhere/shares"),
    ] {
        let output = up(&options);
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains(word), "{output:?}");
    }
}
