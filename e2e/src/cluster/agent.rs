//! The real agent and broker of a node, as processes. The node object may be kwok's.

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

/// Time limit for a daemon to end. The broker stops its engines first.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// Agent and broker of a node. Both receive SIGTERM on drop.
pub struct NodeDaemons {
    agent: Option<Process>,
    broker: Option<Process>,
    node: String,
    kubeconfig: PathBuf,
    /// True if the agent serves a kubelet (CSI).
    volumes: bool,
    /// Additional options of the agent.
    options: Vec<String>,
    dir: TempDir,
}

impl NodeDaemons {
    /// Starts agent and broker for an existing node.
    ///
    /// # Errors
    /// If they are not built or do not start.
    pub fn start(cluster: &Cluster, node: &str) -> Result<Self> {
        Self::start_with(cluster, node, false, &[])
    }

    /// Like [`NodeDaemons::start`], with an agent that serves the kubelet directory [`NodeDaemons::kubelet_dir`].
    ///
    /// # Errors
    /// If they are not built or do not start.
    pub fn start_with_volumes(cluster: &Cluster, node: &str) -> Result<Self> {
        Self::start_with(cluster, node, true, &[])
    }

    /// Like [`NodeDaemons::start`], with additional options of the agent.
    ///
    /// # Errors
    /// If they are not built or do not start.
    pub fn start_with_options(cluster: &Cluster, node: &str, options: &[String]) -> Result<Self> {
        Self::start_with(cluster, node, false, options)
    }

    fn start_with(cluster: &Cluster, node: &str, volumes: bool, options: &[String]) -> Result<Self> {
        // Unix socket paths below it may not exceed 107 bytes.
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
    /// If the broker does not start.
    pub fn start_broker(&mut self) -> Result<()> {
        let mut broker = Command::new(binary("virtiofs-broker")?);
        broker.arg("--runtime-dir").arg(self.runtime_dir());
        self.broker = Some(Process::start(broker, &self.dir.path().join("broker.log"), STOP_TIMEOUT)?);
        Ok(())
    }

    /// Kills the broker. Its engines end with it.
    ///
    /// # Errors
    /// If no broker runs, or it does not end.
    pub fn kill_broker(&mut self) -> Result<()> {
        let broker = self.broker.take().context("no broker runs")?;
        kill_now(&broker)
    }

    /// Kills the agent.
    ///
    /// # Errors
    /// If no agent runs, or it does not end.
    pub fn kill_agent(&mut self) -> Result<()> {
        let agent = self.agent.take().context("no agent runs")?;
        kill_now(&agent)
    }

    /// Process id of the broker.
    ///
    /// # Errors
    /// If no broker runs.
    pub fn broker_pid(&self) -> Result<u32> {
        Ok(self.broker.as_ref().context("no broker runs")?.id())
    }

    /// Starts another agent for the same node, beside this one.
    ///
    /// # Errors
    /// If the agent does not start.
    pub fn start_another_agent(&self, log: &str) -> Result<Process> {
        Process::start(self.agent_command()?, &self.dir.path().join(log), STOP_TIMEOUT)
    }

    /// Replaces this agent, which has ended, with another one.
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

    /// Runtime directory: the broker's control socket and the shares' sockets.
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The kubelet's root directory.
    pub fn kubelet_dir(&self) -> PathBuf {
        self.dir.path().join("k")
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// If the agent does not start.
    pub fn start_agent(&mut self) -> Result<()> {
        self.agent = Some(Process::start(self.agent_command()?, &self.dir.path().join("agent.log"), STOP_TIMEOUT)?);
        Ok(())
    }

    /// Stops the agent with SIGTERM. Broker and sessions continue.
    ///
    /// # Errors
    /// If the agent does not end within the time limit, or not with exit status 0.
    pub fn stop_agent(&mut self) -> Result<()> {
        let agent = self.agent.take().context("no agent runs")?;
        let status =
            agent.stop()?.with_context(|| format!("the agent did not end after SIGTERM\n{}", agent.log_tail()))?;
        ensure!(status.success(), "the agent ended with {status}\n{}", agent.log_tail());
        Ok(())
    }

    /// Creates a directory of this node that a share can export.
    ///
    /// # Errors
    /// If the directory cannot be created.
    pub fn source(&self, name: &str) -> Result<PathBuf> {
        let source = self.dir.path().join("sources").join(name);
        fs::create_dir_all(&source).context("creating a source directory")?;
        fs::write(source.join("hello"), "from the host\n").context("writing to a source directory")?;
        Ok(source)
    }

    /// Path of a share's socket.
    pub fn socket(&self, share: &str) -> PathBuf {
        self.dir.path().join("run/shares").join(format!("{share}.sock"))
    }

    /// Last lines of both logs.
    pub fn log_tail(&self) -> String {
        let agent = self.agent.as_ref().map(Process::log_tail).unwrap_or_default();
        let broker = self.broker.as_ref().map(Process::log_tail).unwrap_or_default();
        format!("{agent}\n{broker}")
    }
}

fn kill_now(process: &Process) -> Result<()> {
    kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGKILL).context("killing a daemon")?;
    process.wait_for(STOP_TIMEOUT)?.map(drop).context("a daemon did not end after SIGKILL")
}

/// Path of a daemon's binary, built by `make api`. `VIRTIOFS_BINARIES` names another directory, for measurements of
/// release binaries.
fn binary(name: &str) -> Result<PathBuf> {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug");
    let path = std::env::var_os("VIRTIOFS_BINARIES").map_or_else(built, PathBuf::from).join(name);
    ensure!(path.exists(), "{}: no such file; run `make api`", path.display());
    Ok(path)
}
