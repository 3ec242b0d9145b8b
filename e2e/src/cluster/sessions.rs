//! What the node's broker does, seen from the node: its pods have process ids of their own.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtiofs_contract::control::SessionStatus;

use crate::broker::Broker;

/// Where the chart has agent and broker meet.
pub(super) const RUNTIME_DIR: &str = "/run/virtiofs";
/// Where the keeper and the broker meet, as the chart has it.
pub(super) const KEEPER_DIR: &str = "/run/virtiofs-keeper";

/// All VMs that are connected on this node.
///
/// # Errors
/// When the broker does not answer.
pub fn sessions() -> Result<Vec<SessionStatus>> {
    let endpoints = Broker::connect(Path::new(RUNTIME_DIR))?.endpoints()?;
    Ok(endpoints.into_iter().flat_map(|endpoint| endpoint.sessions).collect())
}

/// Kills the engine that serves a session.
///
/// # Errors
/// When there is none.
pub fn kill_engine(session: &SessionStatus) -> Result<()> {
    let inner = session.engine_pid.context("no engine serves the session")?;
    let pid = processes_of("virtiofs-engine")
        .into_iter()
        .find(|pid| pid_inside(*pid) == Some(inner))
        .with_context(|| format!("no engine is process {inner} of its pod"))?;
    kill(pid, Signal::SIGKILL).context("killing an engine")
}

/// The processes that run this program. Zombies do not.
pub fn processes_of(program: &str) -> Vec<Pid> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|pid| runs(*pid, program)).map(Pid::from_raw).collect()
}

fn runs(pid: i32, program: &str) -> bool {
    // The link of a program that was replaced since says so behind its name.
    let exe = fs::read_link(format!("/proc/{pid}/exe"));
    exe.is_ok_and(|exe| exe.file_name().is_some_and(|name| name.to_string_lossy().split(' ').next() == Some(program)))
}

/// A process's id in its own pod.
fn pid_inside(pid: Pid) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    ids.split_whitespace().last()?.parse().ok()
}
