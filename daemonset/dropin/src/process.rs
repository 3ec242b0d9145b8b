//! Broker and keeper as child processes.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, getpid, getppid};
use thiserror::Error;

/// Time within which a program must end before it is killed.
const END_WITHIN: Duration = Duration::from_secs(5);

const STEP: Duration = Duration::from_millis(2);

/// First and longest pause before a program that ended is started again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(10));

/// A program that ran for this long has no pause.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Why a program was not started.
#[derive(Debug, Error)]
pub(crate) enum ProcessError {
    /// It is not installed.
    #[error("{0} is neither next to virtiofsd-live nor in PATH; install all programs of the project in one directory")]
    NotFound(&'static str),
    /// It cannot be executed.
    #[error("cannot start {program}: {error}")]
    Spawn { program: PathBuf, error: io::Error },
}

/// A program that runs, and is started again if it ends.
#[derive(Debug)]
pub(crate) struct Daemon {
    name: &'static str,
    program: PathBuf,
    arguments: Vec<OsString>,
    child: Option<Child>,
    started: Instant,
    pause: Duration,
}

impl Daemon {
    /// Starts it. The kernel sends it SIGTERM when the calling *thread* ends.
    pub(crate) fn start(name: &'static str, program: PathBuf, arguments: Vec<OsString>) -> Result<Self, ProcessError> {
        let mut daemon =
            Daemon { name, program, arguments, child: None, started: Instant::now(), pause: Duration::ZERO };
        daemon.spawn()?;
        Ok(daemon)
    }

    fn spawn(&mut self) -> Result<(), ProcessError> {
        let parent = getpid();
        let mut command = Command::new(&self.program);
        // A group of its own: Ctrl-C reaches this process only, which chooses the order of ending.
        command.args(&self.arguments).process_group(0).stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: between fork and exec only async-signal-safe calls are made: prctl, getppid and sigprocmask.
        unsafe { command.pre_exec(move || end_with(parent)) };
        let spawned = command.spawn();
        let child = spawned.map_err(|error| ProcessError::Spawn { program: self.program.clone(), error })?;
        tracing::debug!(pid = child.id(), "{} started", self.name);
        (self.child, self.started) = (Some(child), Instant::now());
        Ok(())
    }

    /// Starts it again if it has ended, after a pause that grows. Returns true if it has ended just now.
    pub(crate) fn supervise(&mut self) -> bool {
        let ended = self.has_ended();
        if let Some(status) = ended {
            self.child = None;
            self.pause = next_pause(self.pause, self.started.elapsed());
            self.started = Instant::now();
            tracing::error!(%status, "{} ended; the guest is served on while it is started again", self.name);
        }
        if self.child.is_none()
            && self.started.elapsed() >= self.pause
            && let Err(error) = self.spawn()
        {
            tracing::error!(%error, "{} not started", self.name);
            (self.started, self.pause) = (Instant::now(), next_pause(self.pause, Duration::ZERO));
        }
        ended.is_some()
    }

    /// Its status, if it has ended since the last call.
    pub(crate) fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().ok().flatten())
    }

    /// Its process, if it runs.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.child.as_ref().map(|child| Pid::from_raw(child.id().cast_signed()))
    }

    /// Ends it: SIGTERM, and SIGKILL where that is not enough.
    pub(crate) fn end(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
        let deadline = Instant::now() + END_WITHIN;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                tracing::warn!("{} does not end and is killed", self.name);
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            std::thread::sleep(STEP);
        }
    }
}

/// Requests a SIGTERM at the parent's death; one that has died already is noticed. The parent blocks signals.
fn end_with(parent: Pid) -> io::Result<()> {
    set_pdeathsig(Signal::SIGTERM)?;
    SigSet::empty().thread_set_mask()?;
    if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
}

fn next_pause(before: Duration, ran: Duration) -> Duration {
    if ran >= STABLE_AFTER { PAUSES.0 } else { (before * 2).clamp(PAUSES.0, PAUSES.1) }
}

/// The program of this name: next to this one, or in `PATH`.
pub(crate) fn find(name: &'static str, search_path: &str) -> Result<PathBuf, ProcessError> {
    let own = std::env::current_exe().ok();
    let beside = own.as_deref().and_then(Path::parent).map(Path::to_path_buf);
    let in_path = search_path.split(':').filter(|directory| !directory.is_empty()).map(PathBuf::from);
    let mut candidates = beside.into_iter().chain(in_path).map(|directory| directory.join(name));
    candidates.find(|candidate| candidate.is_file()).ok_or(ProcessError::NotFound(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_limit_and_reset() {
        let mut pause = Duration::ZERO;
        for _ in 0..20 {
            pause = next_pause(pause, Duration::from_millis(5));
        }
        assert_eq!(pause, PAUSES.1);
        assert_eq!(next_pause(pause, STABLE_AFTER), PAUSES.0);
    }

    #[test]
    fn program_is_found_in_the_path() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("virtiofs-none"), "").unwrap();
        let path = format!("/nowhere::{}", directory.path().display());
        assert_eq!(find("virtiofs-none", &path).unwrap(), directory.path().join("virtiofs-none"));
        assert!(find("virtiofs-none", "").unwrap_err().to_string().contains("virtiofs-none"));
    }
}
