//! Sessions and processes of the node, seen from the host: pods have their own PID namespaces.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtiofs_contract::control::SessionStatus;

use crate::broker::Broker;

/// The chart's runtime directory of agent and broker.
pub(super) const RUNTIME_DIR: &str = "/run/virtiofs";
/// The chart's runtime directory of the keeper.
pub(super) const KEEPER_DIR: &str = "/run/virtiofs-keeper";

/// The sessions of all VMs that are connected on this node.
///
/// # Errors
/// If the broker does not answer.
pub fn sessions() -> Result<Vec<SessionStatus>> {
    let endpoints = Broker::connect(Path::new(RUNTIME_DIR))?.endpoints()?;
    Ok(endpoints.into_iter().flat_map(|endpoint| endpoint.sessions).collect())
}

/// Kills the engine of a session.
///
/// # Errors
/// If the session has no engine.
pub fn kill_engine(session: &SessionStatus) -> Result<()> {
    let inner = session.engine_pid.context("no engine serves the session")?;
    let pid = processes_of("virtiofs-engine")
        .into_iter()
        .find(|pid| pid_inside(*pid) == Some(inner))
        .with_context(|| format!("no engine is process {inner} of its pod"))?;
    kill(pid, Signal::SIGKILL).context("killing an engine")
}

/// Processes that run this program, without zombies.
pub fn processes_of(program: &str) -> Vec<Pid> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    all.filter(|pid| runs(*pid, program)).map(Pid::from_raw).collect()
}

fn runs(pid: i32, program: &str) -> bool {
    // The kernel appends ` (deleted)` to the link of a replaced program.
    let exe = fs::read_link(format!("/proc/{pid}/exe"));
    exe.is_ok_and(|exe| exe.file_name().is_some_and(|name| name.to_string_lossy().split(' ').next() == Some(program)))
}

/// Process id in the process's own PID namespace.
fn pid_inside(pid: Pid) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let ids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    ids.split_whitespace().last()?.parse().ok()
}
