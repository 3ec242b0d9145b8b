//! The broker as a child process: started, watched, started again, ended.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use thiserror::Error;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::backoff::Backoff;
use crate::logging::LogChoice;

/// How long the broker may take to end its sessions before it is killed.
const END_WITHIN: Duration = Duration::from_secs(10);

/// A broker that ran this long was well: its next death starts the back-off anew.
const WELL_AFTER: Duration = Duration::from_secs(60);

/// Why there is no broker to start.
#[derive(Debug, Error)]
pub(crate) enum ProcessError {
    /// No such program.
    #[error("virtiofs-broker is neither beside this program nor in PATH; give its place with --broker PATH")]
    NotFound,
    /// It did not start.
    #[error("cannot start {program}: {error}")]
    Spawn { program: PathBuf, error: io::Error },
}

/// How the broker is started.
#[derive(Clone, Debug)]
pub(crate) struct BrokerCommand {
    /// The program.
    pub(crate) program: PathBuf,
    /// Its runtime directory, which is the agent's.
    pub(crate) runtime_dir: PathBuf,
    /// Its log goes where the agent's goes, and looks alike.
    pub(crate) log: LogChoice,
}

impl BrokerCommand {
    /// Starts the broker in a process group of its own, so that a Ctrl-C at the terminal reaches the agent
    /// alone and the order of ending stays the agent's to choose.
    ///
    /// The kernel sends the parent-death signal when the *thread* that forked ends: call this on a thread that
    /// lives as long as the process.
    fn spawn(&self) -> Result<Child, ProcessError> {
        let agent = nix::unistd::getpid();
        let mut command = Command::new(&self.program);
        command
            .arg("--runtime-dir")
            .arg(&self.runtime_dir)
            .args(self.log.options())
            .process_group(0)
            .kill_on_drop(true);
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl and getppid.
        unsafe { command.pre_exec(move || end_with(agent)) };
        command.spawn().map_err(|error| ProcessError::Spawn { program: self.program.clone(), error })
    }
}

/// Asks for a SIGTERM at the agent's death; an agent that died before the asking is noticed too.
fn end_with(agent: Pid) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGTERM)?;
    if getppid() != agent {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(())
}

/// The broker's program: what was asked for, else the one beside this program, else the one in `PATH`.
pub(crate) fn find(asked: Option<PathBuf>, search_path: &str) -> Result<PathBuf, ProcessError> {
    if let Some(path) = asked {
        return Ok(path);
    }
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_path_buf));
    search(beside, search_path)
}

fn search(beside: Option<PathBuf>, search_path: &str) -> Result<PathBuf, ProcessError> {
    let in_path = search_path.split(':').filter(|folder| !folder.is_empty()).map(PathBuf::from);
    beside
        .into_iter()
        .chain(in_path)
        .map(|folder| folder.join("virtiofs-broker"))
        .find(|candidate| candidate.is_file())
        .ok_or(ProcessError::NotFound)
}

/// Keeps a broker running until `ending` turns true, then ends it. Returns when no broker is left.
///
/// # Errors
/// Only when the very first start fails: a program that cannot be started at all is for the caller to report.
pub(crate) async fn supervise(command: BrokerCommand, mut ending: watch::Receiver<bool>) -> Result<(), ProcessError> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    let mut child = command.spawn()?;
    loop {
        let started = Instant::now();
        tracing::info!(pid = child.id(), program = %command.program.display(), "broker started");
        let died = tokio::select! {
            status = child.wait() => Some(status),
            () = told_to_end(&mut ending) => None,
        };
        match died {
            Some(status) => say_death(status),
            None => {
                end(child).await;
                return Ok(());
            }
        }
        if started.elapsed() > WELL_AFTER {
            backoff.reset();
        }
        child = loop {
            let delay = backoff.next();
            tracing::warn!(delay_ms = delay.as_millis() as u64, "broker is started again");
            tokio::select! {
                () = sleep(delay) => {}
                () = told_to_end(&mut ending) => return Ok(()),
            }
            match command.spawn() {
                Ok(child) => break child,
                Err(error) => tracing::error!(%error, "broker did not start"),
            }
        };
    }
}

/// Also when whoever could tell is gone.
async fn told_to_end(ending: &mut watch::Receiver<bool>) {
    _ = ending.wait_for(|end| *end).await;
}

fn say_death(status: io::Result<ExitStatus>) {
    match status {
        Ok(status) => {
            tracing::error!(%status, "broker died, and with it every session: their VMs must be started anew")
        }
        Err(error) => tracing::error!(%error, "broker cannot be waited for"),
    }
}

/// SIGTERM, and SIGKILL where that is not enough.
async fn end(mut child: Child) {
    let Some(pid) = child.id() else { return };
    if let Err(errno) = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM) {
        tracing::warn!(pid, error = errno.desc(), "broker cannot be told to end");
    }
    if timeout(END_WITHIN, child.wait()).await.is_err() {
        tracing::warn!(pid, after_s = END_WITHIN.as_secs(), "broker did not end; it is killed");
        if let Err(error) = child.kill().await {
            tracing::error!(pid, %error, "broker cannot be killed");
        }
    }
    tracing::info!(pid, "broker ended");
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_asked_program_wins_and_a_missing_one_is_said() {
        assert_eq!(find(Some("/some/broker".into()), "").unwrap(), Path::new("/some/broker"));
        let [beside, in_path] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let path = format!("/nowhere::{}", in_path.path().display());
        let found = || search(Some(beside.path().into()), &path).map_err(|error| error.to_string());
        assert!(found().unwrap_err().contains("--broker"));
        for folder in [&in_path, &beside] {
            let program = folder.path().join("virtiofs-broker");
            fs::write(&program, "").unwrap();
            assert_eq!(found().unwrap(), program);
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_program_that_cannot_start_is_an_error_at_once() {
        let (_end, ending) = watch::channel(false);
        let log = LogChoice { filter: "warn".into(), format: virtiofs_logging::LogFormat::Text };
        let command = BrokerCommand { program: "/nowhere/virtiofs-broker".into(), runtime_dir: "/".into(), log };
        assert!(matches!(supervise(command, ending).await, Err(ProcessError::Spawn { .. })));
    }
}
