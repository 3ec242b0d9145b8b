//! Broker and keeper as child processes: started, watched, started again, ended.

use std::ffi::OsString;
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

/// How long a program may take to end before it is killed.
const END_WITHIN: Duration = Duration::from_secs(10);

/// A program that ran for this long resets the back-off.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Why a program was not started.
#[derive(Debug, Error)]
pub(crate) enum ProcessError {
    /// The program was not found.
    #[error("virtiofs-{0} is neither next to this program nor in PATH; set its path with --{0} PATH")]
    NotFound(&'static str),
    /// The program could not be started.
    #[error("cannot start {program}: {error}")]
    Spawn { program: PathBuf, error: io::Error },
}

/// How a program is started. Its log has the same destination and format as the agent's.
#[derive(Clone, Debug)]
pub(crate) struct Daemon {
    /// Its name in the log.
    name: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
}

impl Daemon {
    /// The keeper, with its sockets in this directory.
    pub(crate) fn keeper(program: PathBuf, directory: &Path, log: &LogChoice) -> Self {
        Daemon::new("keeper", program, &["--directory".as_ref(), directory.as_os_str()], log)
    }

    /// The broker, whose runtime directory is the agent's, with its keeper in `keeper`.
    pub(crate) fn broker(program: PathBuf, runtime_dir: &Path, keeper: &Path, log: &LogChoice) -> Self {
        let arguments = ["--runtime-dir".as_ref(), runtime_dir.as_os_str(), "--keeper".as_ref(), keeper.as_os_str()];
        Daemon::new("broker", program, &arguments, log)
    }

    fn new(name: &'static str, program: PathBuf, arguments: &[&std::ffi::OsStr], log: &LogChoice) -> Self {
        let arguments = arguments.iter().map(OsString::from).chain(log.options().map(OsString::from));
        Daemon { name, program, arguments: arguments.collect() }
    }

    /// Starts the program in a process group of its own: Ctrl-C at the terminal reaches only the agent, which chooses the order
    /// of ending.
    ///
    /// The kernel sends the parent-death signal when the *thread* that forked ends: call this on a thread that
    /// lives as long as the process.
    fn spawn(&self) -> Result<Child, ProcessError> {
        let agent = nix::unistd::getpid();
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).process_group(0).kill_on_drop(true);
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

/// The program `virtiofs-NAME`: the given one, else the one next to this program, else the one in `PATH`.
pub(crate) fn find(name: &'static str, given: Option<PathBuf>, search_path: &str) -> Result<PathBuf, ProcessError> {
    if let Some(path) = given {
        return Ok(path);
    }
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_path_buf));
    search(name, beside, search_path)
}

fn search(name: &'static str, beside: Option<PathBuf>, search_path: &str) -> Result<PathBuf, ProcessError> {
    let in_path = search_path.split(':').filter(|folder| !folder.is_empty()).map(PathBuf::from);
    beside
        .into_iter()
        .chain(in_path)
        .map(|folder| folder.join(format!("virtiofs-{name}")))
        .find(|candidate| candidate.is_file())
        .ok_or(ProcessError::NotFound(name))
}

/// Keeps a program running until `ending` becomes true, then ends it. Returns when it has ended.
///
/// # Errors
/// The first start failed.
pub(crate) async fn supervise(command: Daemon, mut ending: watch::Receiver<bool>) -> Result<(), ProcessError> {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(30));
    let mut child = command.spawn()?;
    loop {
        let started = Instant::now();
        tracing::info!(pid = child.id(), program = %command.program.display(), "{} started", command.name);
        let died = tokio::select! {
            status = child.wait() => Some(status),
            () = until_ending(&mut ending) => None,
        };
        match died {
            Some(status) => log_death(command.name, status),
            None => {
                end(command.name, child).await;
                return Ok(());
            }
        }
        if started.elapsed() > STABLE_AFTER {
            backoff.reset();
        }
        child = loop {
            let delay = backoff.next();
            tracing::warn!(delay_ms = delay.as_millis() as u64, "restarting the {}", command.name);
            tokio::select! {
                () = sleep(delay) => {}
                () = until_ending(&mut ending) => return Ok(()),
            }
            match command.spawn() {
                Ok(child) => break child,
                Err(error) => tracing::error!(%error, "{} not started", command.name),
            }
        };
    }
}

/// Also returns when the sender is gone.
async fn until_ending(ending: &mut watch::Receiver<bool>) {
    _ = ending.wait_for(|end| *end).await;
}

fn log_death(name: &str, status: io::Result<ExitStatus>) {
    match status {
        Ok(status) => tracing::error!(%status, "{name} died; sessions continue while it is restarted"),
        Err(error) => tracing::error!(%error, "cannot wait for the {name}"),
    }
}

/// SIGTERM, and SIGKILL where that is not enough.
async fn end(name: &str, mut child: Child) {
    let Some(pid) = child.id() else { return };
    if let Err(errno) = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM) {
        tracing::warn!(pid, error = errno.desc(), "cannot signal the {name}");
    }
    if timeout(END_WITHIN, child.wait()).await.is_err() {
        tracing::warn!(pid, after_s = END_WITHIN.as_secs(), "{name} did not end; killing it");
        if let Err(error) = child.kill().await {
            tracing::error!(pid, %error, "cannot kill the {name}");
        }
    }
    tracing::info!(pid, "{name} ended");
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_given_program_wins_and_a_missing_one_is_reported() {
        assert_eq!(find("broker", Some("/some/broker".into()), "").unwrap(), Path::new("/some/broker"));
        let [beside, in_path] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let path = format!("/nowhere::{}", in_path.path().display());
        let found = || search("broker", Some(beside.path().into()), &path).map_err(|error| error.to_string());
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
        let (directory, program) = (Path::new("/"), "/nowhere/virtiofs-broker".into());
        let command = Daemon::broker(program, directory, directory, &log);
        assert!(matches!(supervise(command, ending).await, Err(ProcessError::Spawn { .. })));
    }
}
