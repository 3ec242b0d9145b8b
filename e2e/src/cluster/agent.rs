//! A node's real agent and broker, as processes; the node itself may be kwok's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::Cluster;
use crate::process::Process;

/// Engines end with their broker.
const FAREWELL: Duration = Duration::from_secs(15);

/// Agent and broker of a node. Dropped, both are asked to end.
pub struct NodeDaemons {
    agent: Option<Process>,
    broker: Process,
    node: String,
    kubeconfig: PathBuf,
    dir: TempDir,
}

impl NodeDaemons {
    /// Starts both for a node that there is.
    ///
    /// # Errors
    /// When they are not built or do not start.
    pub fn start(cluster: &Cluster, node: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("node-").tempdir_in(cluster.dir());
        let dir = dir.context("making a directory for a node")?;
        let mut broker = Command::new(binary("virtiofs-broker")?);
        broker.arg("--runtime-dir").arg(dir.path().join("run"));
        let broker = Process::start(broker, &dir.path().join("broker.log"), FAREWELL)?;
        let kubeconfig = cluster.agent_of(node)?.kubeconfig().to_owned();
        let mut daemons = NodeDaemons { agent: None, broker, node: node.to_owned(), kubeconfig, dir };
        daemons.start_agent()?;
        Ok(daemons)
    }

    /// Starts the agent.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_agent(&mut self) -> Result<()> {
        let mut agent = Command::new(binary("virtiofs-agent")?);
        agent.env("KUBECONFIG", &self.kubeconfig);
        agent.args(["node", "--node", &self.node, "--runtime-dir"]).arg(self.dir.path().join("run"));
        self.agent = Some(Process::start(agent, &self.dir.path().join("agent.log"), FAREWELL)?);
        Ok(())
    }

    /// Ends the agent in good order; broker and sessions go on.
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
        format!("{agent}\n{}", self.broker.log_tail())
    }
}

/// A daemon for tests, built by `make api`.
fn binary(name: &str) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug").join(name);
    ensure!(path.exists(), "{} is not there: use `make api`", path.display());
    Ok(path)
}
