//! A node's real agent and broker, as processes; the node itself may be kwok's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::Cluster;
use crate::process::Process;

/// Engines end with their broker.
const FAREWELL: Duration = Duration::from_secs(15);

/// Agent and broker of a node. Dropped, both are asked to end.
pub struct NodeDaemons {
    agent: Option<Process>,
    broker: Option<Process>,
    node: String,
    kubeconfig: PathBuf,
    /// Does the agent serve a kubelet?
    volumes: bool,
    /// More options of the agent.
    options: Vec<String>,
    dir: TempDir,
}

impl NodeDaemons {
    /// Starts both for a node that there is.
    ///
    /// # Errors
    /// When they are not built or do not start.
    pub fn start(cluster: &Cluster, node: &str) -> Result<Self> {
        Self::start_with(cluster, node, false, &[])
    }

    /// The same with an agent that serves a kubelet, whose directory is [`NodeDaemons::kubelet_dir`].
    ///
    /// # Errors
    /// When they are not built or do not start.
    pub fn start_with_volumes(cluster: &Cluster, node: &str) -> Result<Self> {
        Self::start_with(cluster, node, true, &[])
    }

    /// The same with more options for the agent, and without volumes.
    ///
    /// # Errors
    /// When they are not built or do not start.
    pub fn start_with_options(cluster: &Cluster, node: &str, options: &[String]) -> Result<Self> {
        Self::start_with(cluster, node, false, options)
    }

    fn start_with(cluster: &Cluster, node: &str, volumes: bool, options: &[String]) -> Result<Self> {
        // Sockets lie deep below it, and their paths must not be long.
        let dir = tempfile::Builder::new().prefix("n-").tempdir_in(cluster.dir());
        let dir = dir.context("making a directory for a node")?;
        let kubeconfig = cluster.agent_of(node)?.kubeconfig().to_owned();
        let (node, options) = (node.to_owned(), options.to_vec());
        let mut daemons = NodeDaemons { agent: None, broker: None, node, kubeconfig, volumes, options, dir };
        daemons.start_broker()?;
        daemons.start_agent()?;
        Ok(daemons)
    }

    /// Starts the broker.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_broker(&mut self) -> Result<()> {
        let mut broker = Command::new(binary("virtiofs-broker")?);
        broker.arg("--runtime-dir").arg(self.runtime_dir());
        self.broker = Some(Process::start(broker, &self.dir.path().join("broker.log"), FAREWELL)?);
        Ok(())
    }

    /// Kills the broker, and with it its engines.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill_broker(&mut self) -> Result<()> {
        let broker = self.broker.take().context("there is no broker")?;
        kill_now(&broker)
    }

    /// Kills the agent.
    ///
    /// # Errors
    /// When it does not die.
    pub fn kill_agent(&mut self) -> Result<()> {
        let agent = self.agent.take().context("there is no agent")?;
        kill_now(&agent)
    }

    /// Process id of the broker.
    ///
    /// # Errors
    /// When there is none.
    pub fn broker_pid(&self) -> Result<u32> {
        Ok(self.broker.as_ref().context("there is no broker")?.id())
    }

    /// Starts another agent for the node beside this one, and returns it.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_another_agent(&self, log: &str) -> Result<Process> {
        Process::start(self.agent_command()?, &self.dir.path().join(log), FAREWELL)
    }

    /// Puts another agent in the place of this one, which has ended.
    pub fn replace_agent(&mut self, agent: Process) {
        self.agent = Some(agent);
    }

    fn agent_command(&self) -> Result<Command> {
        let mut agent = Command::new(binary("virtiofs-agent")?);
        agent.env("KUBECONFIG", &self.kubeconfig);
        agent.args(["node", "--node", &self.node, "--runtime-dir"]).arg(self.runtime_dir());
        agent.args(&self.options);
        if self.volumes {
            agent.arg("--kubelet-dir").arg(self.kubelet_dir());
        }
        Ok(agent)
    }

    /// Where agent and broker meet.
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The kubelet's directory.
    pub fn kubelet_dir(&self) -> PathBuf {
        self.dir.path().join("k")
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_agent(&mut self) -> Result<()> {
        self.agent = Some(Process::start(self.agent_command()?, &self.dir.path().join("agent.log"), FAREWELL)?);
        Ok(())
    }

    /// Ends the agent in good order; broker and sessions continue.
    ///
    /// # Errors
    /// When it does not end, or not with success.
    pub fn stop_agent(&mut self) -> Result<()> {
        let agent = self.agent.take().context("there is no agent")?;
        let status = agent.stop()?.with_context(|| format!("the agent does not end\n{}", agent.log_tail()))?;
        ensure!(status.success(), "the agent ended with {status}\n{}", agent.log_tail());
        Ok(())
    }

    /// A directory of this node that may be shared.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn source(&self, name: &str) -> Result<PathBuf> {
        let source = self.dir.path().join("sources").join(name);
        fs::create_dir_all(&source).context("making a source")?;
        fs::write(source.join("hello"), "from the host\n").context("writing into a source")?;
        Ok(source)
    }

    /// The socket of a share.
    pub fn socket(&self, share: &str) -> PathBuf {
        self.dir.path().join("run/shares").join(format!("{share}.sock"))
    }

    /// What both said last.
    pub fn log_tail(&self) -> String {
        let agent = self.agent.as_ref().map(Process::log_tail).unwrap_or_default();
        let broker = self.broker.as_ref().map(Process::log_tail).unwrap_or_default();
        format!("{agent}\n{broker}")
    }
}

fn kill_now(process: &Process) -> Result<()> {
    kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGKILL).context("killing a daemon")?;
    process.wait_for(FAREWELL)?.map(drop).context("a daemon does not die")
}

/// A daemon for tests, built by `make api`; `VIRTIOFS_BINARIES` names a directory of others, for figures.
fn binary(name: &str) -> Result<PathBuf> {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug");
    let path = std::env::var_os("VIRTIOFS_BINARIES").map_or_else(built, PathBuf::from).join(name);
    ensure!(path.exists(), "{} is not there: use `make api`", path.display());
    Ok(path)
}
