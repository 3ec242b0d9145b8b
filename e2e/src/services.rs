//! Broker and keeper as services beside the agent, which can be killed and replaced.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtiofs_contract::control::HolderState;

use crate::broker::Broker;
use crate::process::Process;

/// Time limit for a service to end.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(15);
/// Time limit for a service to start, or to detect that the other one has ended.
const TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A broker, which another one may replace, and its keeper.
pub(crate) struct Services {
    // Fields are dropped in this order: engines that a broker has left end with the keeper.
    broker: Process,
    keeper: Process,
    /// Services that have ended. Their process groups contain engines that still serve, and are killed on drop.
    ended: Vec<Process>,
    binaries: PathBuf,
    directory: PathBuf,
}

impl Services {
    /// Starts both from binaries in a directory. `directory`: for sockets and logs.
    pub(crate) fn start(binaries: &Path, directory: &Path) -> Result<Self> {
        let (binaries, directory) = (binaries.to_owned(), directory.to_owned());
        let keeper = start_keeper(&binaries, &directory, 1)?;
        let broker = start_broker(&binaries, &directory, 1)?;
        Ok(Self { broker, keeper, ended: Vec::new(), binaries, directory })
    }

    /// Kills the broker, starts the next one and waits until it answers.
    pub(crate) fn kill_broker(&mut self) -> Result<()> {
        kill_process(&self.broker).context("the broker")?;
        let next = start_broker(&self.binaries, &self.directory, self.next_number())?;
        self.ended.push(std::mem::replace(&mut self.broker, next));
        self.until("the next broker answers", || self.connect().is_ok())
    }

    /// Starts another broker, which stands by. Once it is ready, stops the one that serves, and waits until the other one
    /// answers.
    pub(crate) fn replace_broker(&mut self) -> Result<()> {
        let number = self.next_number();
        let next = start_broker(&self.binaries, &self.directory, number)?;
        let ready_file = ready_file(&self.directory, number);
        self.until("the next broker is ready", || self.is_ready(&ready_file))?;
        let status = self.broker.stop()?.context("the broker did not end after SIGTERM")?;
        ensure!(status.success(), "the broker ended with {status}");
        self.ended.push(std::mem::replace(&mut self.broker, next));
        self.until("the next broker answers", || self.connect().is_ok())
    }

    /// Kills the keeper, starts the next one and waits until the broker has given it everything.
    pub(crate) fn kill_keeper(&mut self) -> Result<()> {
        kill_process(&self.keeper).context("the keeper")?;
        self.until_holder_is(HolderState::Missing)?;
        let next = start_keeper(&self.binaries, &self.directory, self.next_number())?;
        self.ended.push(std::mem::replace(&mut self.keeper, next));
        self.until_holder_is(HolderState::Connected)
    }

    /// Process id of the broker.
    pub(crate) fn broker_id(&self) -> u32 {
        self.broker.id()
    }

    /// The end of the broker's log.
    pub(crate) fn log_tail(&self) -> String {
        self.broker.log_tail()
    }

    /// Stops both with SIGTERM. The broker must succeed; the keeper does not handle the signal.
    pub(crate) fn stop(&self) -> Result<()> {
        let log = self.log_tail();
        let status = self.broker.stop()?.with_context(|| format!("the broker did not end after SIGTERM\n{log}"))?;
        ensure!(status.success(), "the broker ended with {status}\n{log}");
        self.keeper.stop()?.context("the keeper did not end after SIGTERM").map(drop)
    }

    fn next_number(&self) -> usize {
        self.ended.len() + 2
    }

    fn connect(&self) -> Result<Broker> {
        Broker::connect(&runtime_dir(&self.directory))
    }

    fn is_ready(&self, file: &Path) -> bool {
        let mut command = Command::new(self.binaries.join("virtiofs-broker"));
        command.arg("ready").arg(file).output().is_ok_and(|output| output.status.success())
    }

    fn until_holder_is(&self, wanted: HolderState) -> Result<()> {
        let mut broker = self.connect()?;
        self.until(&format!("the holder is {wanted:?}"), || broker.holder().is_ok_and(|state| state == wanted))
    }

    fn until(&self, what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
        let end = Instant::now() + TIMEOUT;
        while !holds() {
            ensure!(Instant::now() < end, "timed out after {TIMEOUT:?} waiting until {what}\n{}", self.log_tail());
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }
}

fn kill_process(process: &Process) -> Result<()> {
    kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGKILL).context("sending SIGKILL")?;
    process.wait_for(STOP_TIMEOUT)?.context("it did not end after SIGKILL").map(drop)
}

fn start_keeper(binaries: &Path, directory: &Path, number: usize) -> Result<Process> {
    let mut command = Command::new(binaries.join("virtiofs-keeper"));
    command.arg("--directory").arg(directory.join("keeper"));
    Process::start(command, &directory.join(format!("keeper-{number}.log")), STOP_TIMEOUT)
}

fn start_broker(binaries: &Path, directory: &Path, number: usize) -> Result<Process> {
    let mut command = Command::new(binaries.join("virtiofs-broker"));
    command.arg("--runtime-dir").arg(runtime_dir(directory)).arg("--keeper").arg(directory.join("keeper"));
    command.arg("--stand-by").arg("--ready-file").arg(ready_file(directory, number));
    Process::start(command, &directory.join(format!("broker-{number}.log")), STOP_TIMEOUT)
}

fn ready_file(directory: &Path, number: usize) -> PathBuf {
    directory.join(format!("broker-{number}.ready"))
}

/// Runtime directory of the broker: sockets and state.
pub(crate) fn runtime_dir(directory: &Path) -> PathBuf {
    directory.join("run")
}
