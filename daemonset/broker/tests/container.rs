//! A broker in a PID namespace of its own, with VMMs outside of it.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{Broker, boot, read_hello, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::skip::require_that;
use virtiofs_contract::control::SessionState;

/// The host's process id of process `inner` in the PID namespace of the child of `outer`.
fn as_seen_from_here(outer: u32, inner: u32) -> Option<Pid> {
    let broker = children(outer).into_iter().next()?;
    let is_inner = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        numbers.split_whitespace().any(|number| number == inner.to_string())
    };
    children(broker).into_iter().find(is_inner).map(|pid| Pid::from_raw(pid.cast_signed()))
}

fn children(parent: u32) -> Vec<u32> {
    let parent = format!("PPid:\t{parent}");
    let entries = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let is_child = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line == parent)
    };
    entries.filter(is_child).collect()
}

#[test]
fn vmm_outside_the_pid_namespace_is_served() {
    let tried =
        Command::new("unshare").args(["--pid", "--fork", "--mount-proc", "true"]).stderr(Stdio::null()).status();
    if !require_that("the right to create PID namespaces", tried.is_ok_and(|status| status.success())) {
        return;
    }
    let broker = Broker::start_in_pid_namespace();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    let session = broker.until_state("data", SessionState::Serving);
    assert_eq!(session.vmm_pid, 0);

    let engine = as_seen_from_here(broker.pid(), session.engine_pid.unwrap()).unwrap();
    kill(engine, Signal::SIGKILL).unwrap();
    assert_eq!(read_hello(&guest), "from the host\n");
    until("it is recovered", || broker.status_of("data").totals.replacements.recoveries.count == 1);

    assert_eq!(broker.control().hand_over("data").len(), 1);
    until("it is handed over", || broker.status_of("data").totals.replacements.hand_overs.count == 1);
    assert_eq!(read_hello(&guest), "from the host\n");
}
