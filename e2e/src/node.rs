//! Our own daemons on a host without Kubernetes: what `virtiofs-agent up` starts.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::parts::Parts;
use crate::process::Process;
use crate::stock::wait_for_socket;

/// Agent and broker end their engines, too; that is worth waiting for before anything is killed.
const GOODBYE: Duration = Duration::from_secs(15);
const SCRAPE: Duration = Duration::from_secs(10);
const BROKER: &str = "virtiofs-broker";
const ENGINE: &str = "virtiofs-engine";

/// What a share is declared with.
#[derive(Debug, Clone)]
pub struct Declaration<'a> {
    /// The share's name.
    pub name: &'a str,
    /// The directory.
    pub source: &'a Path,
    /// `ReadOnly` or `ReadWrite`.
    pub access: &'a str,
    /// `Immutable`, `Exclusive` or `Shared`.
    pub content: &'a str,
    /// Overrides of what follows from that, in braces: `{}` for none.
    pub engine: &'a str,
}

impl Declaration<'_> {
    /// The manifest a person would write.
    pub fn manifest(&self) -> String {
        // JSON is YAML: a path with any character in it stays one string.
        let path = serde_json::Value::from(self.source.display().to_string());
        format!(
            "apiVersion: virtiofs.dev/v1alpha1\n\
             kind: VirtiofsShare\n\
             metadata:\n  name: {}\n\
             spec:\n  source:\n    hostPath:\n      path: {path}\n      type: Directory\n  access: {}\n  content: {}\n  engine: {}\n",
            self.name, self.access, self.content, self.engine
        )
    }
}

/// Agent and broker of one host. Dropped, they are asked to end, and killed if they do not.
pub struct Node {
    agent: Process,
    binary: PathBuf,
    metrics: SocketAddr,
    dir: TempDir,
}

impl Node {
    /// Starts both with no share declared yet.
    ///
    /// # Errors
    /// When they are not built or do not start.
    pub fn start(parts: &Parts) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("node-").tempdir().context("making a directory for a node")?;
        fs::create_dir(dir.path().join("shares")).context("making a directory for manifests")?;
        let (binary, metrics) = (parts.binary("virtiofs-agent")?, free_port()?);
        let mut command = Command::new(&binary);
        command.arg("up").arg("--broker").arg(install(parts, &dir.path().join("bin"))?);
        command.arg("--shares").arg(dir.path().join("shares"));
        command.arg("--runtime-dir").arg(dir.path().join("run")).arg("--metrics").arg(metrics.to_string());
        // What engines and sessions did is what explains a failing test.
        command.args(["--log", "info"]);
        let agent = Process::start(command, &dir.path().join("agent.log"), GOODBYE)?;
        Ok(Self { agent, binary, metrics, dir })
    }

    /// Declares a share, or changes it: writes its manifest, whole or not at all.
    ///
    /// # Errors
    /// When the manifest cannot be written.
    pub fn declare(&self, share: &Declaration<'_>) -> Result<()> {
        let (new, manifest) = (self.dir.path().join("manifest.new"), self.manifest_path(share.name));
        fs::write(&new, share.manifest())
            .and_then(|()| fs::rename(&new, &manifest))
            .with_context(|| format!("writing {}", manifest.display()))
    }

    /// Withdraws a share: removes its manifest.
    ///
    /// # Errors
    /// When there is none.
    pub fn withdraw(&self, name: &str) -> Result<()> {
        let manifest = self.manifest_path(name);
        fs::remove_file(&manifest).with_context(|| format!("removing {}", manifest.display()))
    }

    /// Waits for a share's socket, where VMMs connect.
    ///
    /// # Errors
    /// When it does not appear; the message carries the daemons' log.
    pub fn socket(&self, name: &str) -> Result<PathBuf> {
        let socket = self.runtime_dir().join("shares").join(format!("{name}.sock"));
        wait_for_socket(&self.agent, &socket)?;
        Ok(socket)
    }

    /// Everything on the metrics page.
    ///
    /// # Errors
    /// When the agent does not answer, or not with success.
    pub fn metrics(&self) -> Result<String> {
        scrape(self.metrics).with_context(|| format!("fetching /metrics from {}", self.metrics))
    }

    /// What `virtiofs-agent status` prints, with further options of its own.
    ///
    /// # Errors
    /// When it fails.
    pub fn status(&self, options: &[&str]) -> Result<String> {
        let output = Command::new(&self.binary)
            .args(["status", "--runtime-dir"])
            .arg(self.runtime_dir())
            .args(options)
            .output()
            .context("running virtiofs-agent status")?;
        let (said, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "virtiofs-agent status ended with {}\n{said}{complaint}", output.status);
        Ok(said.into_owned())
    }

    /// Where sockets and state are.
    pub fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The binary that engines are started from.
    pub(crate) fn engine_binary(&self) -> PathBuf {
        self.dir.path().join("bin").join(ENGINE)
    }

    /// Process id of the agent.
    pub fn agent_id(&self) -> u32 {
        self.agent.id()
    }

    /// What the daemons said last.
    pub fn log_tail(&self) -> String {
        self.agent.log_tail()
    }

    /// Asks both to end, as Ctrl-C does, and waits for it.
    ///
    /// # Errors
    /// When they do not end, or not with success.
    pub fn stop(self) -> Result<()> {
        let status = self.agent.stop()?;
        let log = self.log_tail();
        let status = status.with_context(|| format!("virtiofs-agent did not end when asked\n{log}"))?;
        ensure!(status.success(), "virtiofs-agent ended with {status}\n{log}");
        Ok(())
    }

    fn manifest_path(&self, name: &str) -> PathBuf {
        self.dir.path().join("shares").join(format!("{name}.yaml"))
    }
}

/// Puts copies of broker and engine in a directory of their own, where they can be exchanged without disturbing
/// anyone; returns the broker's path.
fn install(parts: &Parts, directory: &Path) -> Result<PathBuf> {
    fs::create_dir(directory).context("making a directory for binaries")?;
    for name in [BROKER, ENGINE] {
        let from = parts.binary(name)?;
        fs::copy(&from, directory.join(name)).with_context(|| format!("copying {}", from.display()))?;
    }
    Ok(directory.join(BROKER))
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    listener.local_addr().context("looking for a free port")
}

/// HTTP/1.0, where the end of the connection is the end of the answer.
pub(crate) fn scrape(server: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, SCRAPE)?;
    stream.set_read_timeout(Some(SCRAPE))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no end of its header")?;
    let first = head.lines().next().unwrap_or_default();
    ensure!(first.contains(" 200 "), "the answer is '{first}'");
    Ok(body.to_owned())
}
