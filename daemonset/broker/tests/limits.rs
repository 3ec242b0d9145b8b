//! Limits of an engine: active according to the kernel, or reported as not active.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Broker, boot, read_hello, runs, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::skip::{require, require_that};
use virtiofs_config::Limits;
use virtiofs_contract::control::SessionState;
use virtiofs_contract::preflight::Reason;

/// Directories of a process's control groups that only engines use, from /proc/PID/cgroup.
fn groups_of(pid: u32) -> Vec<PathBuf> {
    groups_named(pid, "virtiofs-engine-")
}

fn groups_named(pid: u32, name: &str) -> Vec<PathBuf> {
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    own.lines()
        .filter_map(|line| line.rsplit_once(':').map(|(names, path)| (names.to_owned(), path.to_owned())))
        .filter(|(_, path)| path.contains(name))
        .map(|(names, path)| {
            let controller = names.rsplit_once(':').map_or("", |(_, controller)| controller).to_owned();
            [format!("/sys/fs/cgroup/{controller}{path}"), format!("/sys/fs/cgroup{path}")]
                .map(PathBuf::from)
                .into_iter()
                .find(|path| path.exists())
                .unwrap()
        })
        .collect()
}

#[test]
fn limits_are_active_or_reported() {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    let asked = Limits {
        memory_bytes: Some(512 << 20),
        cpu_millis: Some(1500),
        cpu_weight: Some(50),
        read_bytes_per_second: Some(64 << 20),
        writes_per_second: Some(5000),
        ..Limits::default()
    };
    endpoint.engine.limits = asked.clone();
    let tried = broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    let session = broker.until_state("data", SessionState::Serving);
    let (engine, found) = (session.engine_pid.unwrap(), session.preflight.unwrap());
    assert_eq!(found.limits, tried.limits, "the trial said what came of it");
    let missing = found.findings.iter().filter(|finding| finding.reason == Reason::LimitUnavailable).count();
    let in_force = serde_json::to_value(&found.limits).unwrap().as_object().unwrap().len();
    assert_eq!(in_force + missing, 5, "{found:?}");
    let memory = fs::read_to_string(format!("/proc/{engine}/limits")).unwrap();
    let data = memory.lines().find(|line| line.starts_with("Max data size")).unwrap();
    assert!(data.contains(&(512u64 << 20).to_string()), "{data}");
    let groups = groups_of(engine);
    let Some(millis) = require("control groups that the broker can create", found.limits.cpu_millis) else { return };
    let quota = groups.iter().find_map(|group| {
        let one = fs::read_to_string(group.join("cpu.cfs_quota_us"));
        one.or_else(|_| fs::read_to_string(group.join("cpu.max"))).ok()
    });
    assert!(quota.unwrap().starts_with(&(millis * 100).to_string()));
    let adjusted = fs::read_to_string(format!("/proc/{engine}/oom_score_adj")).unwrap();
    let own = fs::read_to_string(format!("/proc/{}/oom_score_adj", broker.pid())).unwrap();
    assert!(adjusted.trim().parse::<i32>().unwrap() > own.trim().parse::<i32>().unwrap().min(999));

    endpoint.engine.limits = Limits::default();
    broker.control().apply(&endpoint).unwrap();
    until("an engine without limits serves", || broker.session_of("data").engine.limits == Limits::default());
    assert_eq!(read_hello(&guest), "from the host\n");
    until("the old one and its groups are gone", || !runs(engine) && groups.iter().all(|group| !group.exists()));
}

/// The control group to which the memory of an engine is charged.
fn memory_group_of(engine: u32) -> PathBuf {
    let group = groups_named(engine, "virtiofs-session-").pop().unwrap();
    let is_of_session = |path: &Path| path.file_name().unwrap().to_string_lossy().starts_with("virtiofs-session-");
    group.ancestors().find(|path| is_of_session(path)).unwrap().to_path_buf()
}

#[test]
fn memory_is_charged_to_the_session_across_its_engines_and_brokers() {
    const WRITTEN: u64 = 16 << 20;
    let mut broker = Broker::start_with_keeper();
    let guest = boot(&broker.share("data"));
    let session = broker.until_state("data", SessionState::Serving);
    if require("memory control groups that the broker can create", session.charged_memory).is_none() {
        return;
    }
    let before = session.charged_memory.unwrap();
    let group = memory_group_of(session.engine_pid.unwrap());
    let made = guest.fuse().create(1, "big", libc::O_WRONLY, 0o600).unwrap();
    let block = vec![7; 1 << 16];
    for at in (0..WRITTEN).step_by(block.len()) {
        guest.fuse().write(made.entry.nodeid, made.open.fh, at, &block, libc::O_WRONLY).unwrap();
    }
    let charged = broker.session_of("data").charged_memory.unwrap();
    assert!(charged >= before + WRITTEN, "{before} {charged}");
    kill(Pid::from_raw(session.engine_pid.unwrap() as i32), Signal::SIGKILL).unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
    broker.crash();
    broker.restart();
    assert_eq!(read_hello(&guest), "from the host\n");
    let after = broker.until_state("data", SessionState::Serving);
    assert_ne!(after.engine_pid, session.engine_pid);
    assert_eq!(memory_group_of(after.engine_pid.unwrap()), group);
    assert!(after.charged_memory.unwrap() >= WRITTEN, "{after:?}");
    drop(guest);
    until("its group is removed", || !group.exists());
}

#[test]
fn unavailable_limit_is_reported_and_the_share_served() {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    let mounted =
        nix::mount::mount(Some("memory"), &endpoint.source, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>);
    if !require_that("the right to mount", mounted.is_ok()) {
        return;
    }
    fs::write(endpoint.source.join("hello"), "from the host\n").unwrap();
    // A tmpfs has no block device.
    endpoint.engine.limits = Limits { read_bytes_per_second: Some(1 << 20), ..Limits::default() };
    let applied = broker.control().apply(&endpoint).unwrap();
    let said = applied
        .findings
        .iter()
        .any(|finding| finding.reason == Reason::LimitUnavailable && finding.message.contains("limits.readBandwidth"));
    let read = read_hello(&boot(&endpoint));
    let _ = nix::mount::umount2(&endpoint.source, nix::mount::MntFlags::MNT_DETACH);
    assert!(said, "{:?}", applied.findings);
    assert_eq!((applied.limits, read.as_str()), (Limits::default(), "from the host\n"));
}

#[test]
fn engine_over_its_memory_limit_does_not_end_the_mount() {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    endpoint.engine.limits = Limits { memory_bytes: Some(64 << 20), ..Limits::default() };
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    for _ in 0..20 {
        assert_eq!(read_hello(&guest), "from the host\n");
    }
    assert_eq!(guest.violations(), []);
}
