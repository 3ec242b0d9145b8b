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

use crate::decide::backoff::Backoff;
use crate::logging::LogChoice;

/// How long the broker may take to end before it is killed.
const END_WITHIN: Duration = Duration::from_secs(10);

/// A broker that ran for this long resets the back-off.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Why no broker was started.
#[derive(Debug, Error)]
pub(crate) enum ProcessError {
    /// The program was not found.
    #[error("virtiofs-broker is neither next to this program nor in PATH; set its path with --broker PATH")]
    NotFound,
    /// The program could not be started.
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
    /// Its log has the same destination and format as the agent's.
    pub(crate) log: LogChoice,
}

impl BrokerCommand {
    /// Starts the broker in a process group of its own: Ctrl-C at the terminal reaches only the agent, which chooses the order
    /// of ending.
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

/// Requests a SIGTERM at the agent's death. An agent that has died already is noticed, too.
fn end_with(agent: Pid) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGTERM)?;
    if getppid() != agent {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(())
}

/// The broker's program: the given one, else the one next to this program, else the one in `PATH`.
pub(crate) fn find(given: Option<PathBuf>, search_path: &str) -> Result<PathBuf, ProcessError> {
    if let Some(path) = given {
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

/// Keeps a broker running until `ending` becomes true, then ends it. Returns when no broker is left.
///
/// # Errors
/// The first start failed.
pub(crate) async fn supervise(command: BrokerCommand, mut ending: watch::Receiver<bool>) -> Result<(), ProcessError> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    let mut child = command.spawn()?;
    loop {
        let started = Instant::now();
        tracing::info!(pid = child.id(), program = %command.program.display(), "broker started");
        let died = tokio::select! {
            status = child.wait() => Some(status),
            () = until_ending(&mut ending) => None,
        };
        match died {
            Some(status) => log_death(status),
            None => {
                end(child).await;
                return Ok(());
            }
        }
        if started.elapsed() > STABLE_AFTER {
            backoff.reset();
        }
        child = loop {
            let delay = backoff.next();
            tracing::warn!(delay_ms = delay.as_millis() as u64, "restarting the broker");
            tokio::select! {
                () = sleep(delay) => {}
                () = until_ending(&mut ending) => return Ok(()),
            }
            match command.spawn() {
                Ok(child) => break child,
                Err(error) => tracing::error!(%error, "broker not started"),
            }
        };
    }
}

/// Also returns when the sender is gone.
async fn until_ending(ending: &mut watch::Receiver<bool>) {
    _ = ending.wait_for(|end| *end).await;
}

fn log_death(status: io::Result<ExitStatus>) {
    match status {
        Ok(status) => {
            tracing::error!(%status, "broker died, and every session with it; restart their VMs")
        }
        Err(error) => tracing::error!(%error, "cannot wait for the broker"),
    }
}

/// SIGTERM, and SIGKILL where that is not enough.
async fn end(mut child: Child) {
    let Some(pid) = child.id() else { return };
    if let Err(errno) = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM) {
        tracing::warn!(pid, error = errno.desc(), "cannot signal the broker");
    }
    if timeout(END_WITHIN, child.wait()).await.is_err() {
        tracing::warn!(pid, after_s = END_WITHIN.as_secs(), "broker did not end; killing it");
        if let Err(error) = child.kill().await {
            tracing::error!(pid, %error, "cannot kill the broker");
        }
    }
    tracing::info!(pid, "broker ended");
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_given_program_wins_and_a_missing_one_is_reported() {
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
    async fn a_program_that_cannot_start_is_an_error() {
        let (_end, ending) = watch::channel(false);
        let log = LogChoice { filter: "warn".into(), format: virtiofs_logging::LogFormat::Text };
        let command = BrokerCommand { program: "/nowhere/virtiofs-broker".into(), runtime_dir: "/".into(), log };
        assert!(matches!(supervise(command, ending).await, Err(ProcessError::Spawn { .. })));
    }
}
