//! Broker and keeper as processes that can be killed and restarted.

use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use testkit::broker::Control;
use virtiofs_contract::control::HolderState;

/// Time limit for a daemon to start, to end, or to detect the end of another one.
const TIMEOUT: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(2);

/// A broker and its keeper. Engines that outlive their broker become children of this process.
pub(crate) struct Daemons {
    programs: PathBuf,
    directory: PathBuf,
    log: PathBuf,
    broker: Child,
    keeper: Child,
}

impl Daemons {
    /// Starts both. `programs`: the directory of their binaries; `directory`: for their sockets.
    pub(crate) fn start(programs: &Path, directory: &Path, log: &Path) -> anyhow::Result<Self> {
        set_child_subreaper(true).context("becoming the parent of engines whose broker has ended")?;
        let (programs, directory, log) = (programs.to_owned(), directory.to_owned(), log.to_owned());
        let keeper = spawn_keeper(&programs, &directory, &log)?;
        let broker = spawn_broker(&programs, &directory, &log)?;
        let daemons = Daemons { programs, directory, log, broker, keeper };
        daemons.control()?;
        Ok(daemons)
    }

    /// A connection to the broker, once it listens.
    pub(crate) fn control(&self) -> anyhow::Result<Control> {
        let socket = self.runtime().join("broker.sock");
        let mut control = None;
        until("the broker answers", || {
            control = Control::connect(&socket).ok();
            control.is_some()
        })?;
        control.context("no connection to the broker")
    }

    pub(crate) fn runtime(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Ends the broker by SIGKILL.
    pub(crate) fn kill_broker(&mut self) -> anyhow::Result<()> {
        self.broker.kill()?;
        self.broker.wait()?;
        Ok(())
    }

    /// Ends the broker by SIGTERM. It must leave its sessions and succeed.
    pub(crate) fn stop_broker(&mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.broker.id().cast_signed()), Signal::SIGTERM)?;
        let broker = &mut self.broker;
        let mut status = None;
        until("the broker ends after SIGTERM", || {
            status = broker.try_wait().ok().flatten();
            status.is_some()
        })?;
        match status {
            Some(status) if status.success() => Ok(()),
            status => bail!("the broker ended after SIGTERM with {status:?}"),
        }
    }

    /// Starts the next broker, and waits until it answers.
    pub(crate) fn start_broker(&mut self) -> anyhow::Result<Control> {
        self.broker = spawn_broker(&self.programs, &self.directory, &self.log)?;
        self.reap()?;
        self.control()
    }

    /// Ends the keeper by SIGKILL, starts the next one, and waits until the broker has given it everything.
    pub(crate) fn replace_keeper(&mut self, meanwhile: impl FnOnce()) -> anyhow::Result<()> {
        let mut control = self.control()?;
        self.keeper.kill()?;
        self.keeper.wait()?;
        meanwhile();
        let is = |control: &mut Control, wanted| control.status().is_ok_and(|status| status.holder == wanted);
        until("the broker detects that the keeper has ended", || is(&mut control, HolderState::Missing))?;
        self.keeper = spawn_keeper(&self.programs, &self.directory, &self.log)?;
        until("the keeper has everything", || is(&mut control, HolderState::Connected))
    }

    /// Removes engines that have ended and whose broker had ended before from the process table.
    pub(crate) fn reap(&self) -> anyhow::Result<()> {
        let own = [self.broker.id(), self.keeper.id()];
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        loop {
            let ended = match waitid(Id::All, peek) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
                Ok(_) | Err(nix::Error::ECHILD) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            if own.contains(&ended.as_raw().cast_unsigned()) {
                bail!("broker or keeper (process {ended}) has ended by itself; see {}", self.log.display());
            }
            waitpid(ended, None)?;
        }
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        // The keeper's end ends what it holds, engines included.
        for child in [&mut self.broker, &mut self.keeper] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn_keeper(programs: &Path, directory: &Path, log: &Path) -> anyhow::Result<Child> {
    let held = directory.join("keeper");
    let mut command = Command::new(programs.join("virtiofs-keeper"));
    command.arg("--directory").arg(&held);
    spawn(command, log)
}

fn spawn_broker(programs: &Path, directory: &Path, log: &Path) -> anyhow::Result<Child> {
    let mut command = Command::new(programs.join("virtiofs-broker"));
    command.arg("--keeper").arg(directory.join("keeper"));
    command.arg("--runtime-dir").arg(directory.join("run"));
    spawn(command, log)
}

/// Its output goes to the end of the log. It ends with this process.
fn spawn(mut command: Command, log: &Path) -> anyhow::Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // SAFETY: the closure makes one async-signal-safe system call and accesses no memory of this process.
    unsafe {
        command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
    }
    command.spawn().with_context(|| format!("{}", command.get_program().display()))
}

/// Waits until a condition holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    let begin = Instant::now();
    while !holds() {
        if begin.elapsed() > TIMEOUT {
            bail!("timed out after {TIMEOUT:?} waiting until {what}");
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
