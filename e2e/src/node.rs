//! Our own daemons on a host without Kubernetes: what `virtiofs-agent up` starts, or agent and broker as two services.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
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
    /// What is done about staleness, in braces: `{}` for what is done unless said otherwise.
    pub staleness: &'a str,
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
             spec:\n  source:\n    hostPath:\n      path: {path}\n      type: Directory\n  access: {}\n  content: {}\n  engine: {}\n  staleness: {}\n",
            self.name, self.access, self.content, self.engine, self.staleness
        )
    }
}

/// Agent and broker of one host. Dropped, they are asked to end, and killed if they do not.
pub struct Node {
    // Dropped in this order: the agent ends before the broker.
    agent: Process,
    /// The broker, where it is a service of its own.
    broker: Option<Process>,
    /// How many agents there have been.
    agents: u32,
    binary: PathBuf,
    ctl: PathBuf,
    metrics: SocketAddr,
    dir: TempDir,
}

impl Node {
    /// Starts both with no share declared yet, the broker as a child of the agent.
    ///
    /// # Errors
    /// When they are not built or do not start.
    pub fn start(parts: &Parts) -> Result<Self> {
        Self::prepare(parts, |_, broker, mut up| {
            up.arg("up").arg("--broker").arg(broker);
            Ok((up, None))
        })
    }

    /// Starts both with no share declared yet, as a service manager does: neither is the other's child.
    ///
    /// # Errors
    /// When they are not built or do not start.
    pub fn start_services(parts: &Parts) -> Result<Self> {
        Self::prepare(parts, |dir, broker, mut run| {
            let mut command = Command::new(broker);
            command.arg("--runtime-dir").arg(dir.join("run"));
            let broker = Process::start(command, &dir.join("broker.log"), GOODBYE)?;
            run.arg("run");
            Ok((run, Some(broker)))
        })
    }

    /// `complete` makes the agent's command what it is to be, and starts whatever has to run beside it.
    fn prepare(
        parts: &Parts,
        complete: impl FnOnce(&Path, PathBuf, Command) -> Result<(Command, Option<Process>)>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("node-").tempdir().context("making a directory for a node")?;
        fs::create_dir(dir.path().join("shares")).context("making a directory for manifests")?;
        let (binary, ctl, metrics) = (parts.binary("virtiofs-agent")?, parts.binary("virtiofsctl")?, free_port()?);
        let installed = install(parts, &dir.path().join("bin"))?;
        let (command, broker) = complete(dir.path(), installed, Command::new(&binary))?;
        let agent = start_agent(command, dir.path(), metrics, 1)?;
        Ok(Self { agent, broker, agents: 1, binary, ctl, metrics, dir })
    }

    /// Kills the agent, which is a service beside the broker, and starts another.
    ///
    /// # Errors
    /// When that does not answer.
    pub fn kill_agent(&mut self) -> Result<()> {
        ensure!(self.broker.is_some(), "this agent's death would be the broker's");
        kill(Pid::from_raw(self.agent.id().cast_signed()), Signal::SIGKILL).context("killing the agent")?;
        self.agent.wait_for(GOODBYE)?.context("the agent does not die")?;
        self.agents += 1;
        let mut command = Command::new(&self.binary);
        command.arg("run");
        self.agent = start_agent(command, self.dir.path(), self.metrics, self.agents)?;
        let until = Instant::now() + GOODBYE;
        while let Err(error) = self.metrics() {
            ensure!(Instant::now() < until, "the new agent does not answer: {error:#}\n{}", self.log_tail());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
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

    /// What `virtiofsctl status` prints, with these options.
    ///
    /// # Errors
    /// When it fails.
    pub fn status(&self, options: &[&str]) -> Result<String> {
        self.command("status", options)
    }

    /// Has every guest of a share handed over to a new engine, as a person does.
    ///
    /// # Errors
    /// When it is not done.
    pub fn hand_over(&self, share: &str) -> Result<String> {
        self.command("handover", &[share])
    }

    fn command(&self, name: &str, options: &[&str]) -> Result<String> {
        let output = Command::new(&self.ctl)
            .args([name, "--runtime-dir"])
            .arg(self.runtime_dir())
            .args(options)
            .output()
            .with_context(|| format!("running virtiofsctl {name}"))?;
        let (said, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "virtiofsctl {name} ended with {}\n{said}{complaint}", output.status);
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
        self.agent.log_tail() + &self.broker.as_ref().map(Process::log_tail).unwrap_or_default()
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
        if let Some(broker) = &self.broker {
            let status = broker.stop()?.with_context(|| format!("virtiofs-broker did not end when asked\n{log}"))?;
            ensure!(status.success(), "virtiofs-broker ended with {status}\n{log}");
        }
        Ok(())
    }

    fn manifest_path(&self, name: &str) -> PathBuf {
        self.dir.path().join("shares").join(format!("{name}.yaml"))
    }
}

/// What engines and sessions did is what explains a failing test.
fn start_agent(mut command: Command, dir: &Path, metrics: SocketAddr, number: u32) -> Result<Process> {
    command.arg("--shares").arg(dir.join("shares")).arg("--runtime-dir").arg(dir.join("run"));
    command.args(["--metrics", &metrics.to_string(), "--log", "info"]);
    Process::start(command, &dir.join(format!("agent-{number}.log")), GOODBYE)
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

/// An unused port.
///
/// # Errors
/// When there is none.
pub fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    listener.local_addr().context("looking for a free port")
}

/// The page at /metrics, by HTTP/1.0, where the end of the connection is the end of the answer.
///
/// # Errors
/// When nobody answers, or not with a page.
pub fn scrape(server: SocketAddr) -> Result<String> {
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
