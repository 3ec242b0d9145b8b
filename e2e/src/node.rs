//! Agent and broker on a host without Kubernetes: `virtiofs-agent up`, or both as two services.

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
use crate::services::{STOP_TIMEOUT, Services, runtime_dir};
use crate::stock::wait_for_socket;

const SCRAPE_TIMEOUT: Duration = Duration::from_secs(10);
const BROKER: &str = "virtiofs-broker";
const KEEPER: &str = "virtiofs-keeper";
const ENGINE: &str = "virtiofs-engine";

/// Declaration of a share.
#[derive(Debug, Clone)]
pub struct Declaration<'a> {
    /// Name of the share.
    pub name: &'a str,
    /// The shared directory.
    pub source: &'a Path,
    /// `ReadOnly` or `ReadWrite`.
    pub access: &'a str,
    /// `Immutable`, `Exclusive` or `Shared`.
    pub content: &'a str,
    /// Overrides of engine settings as a YAML flow mapping: `{}` for none.
    pub engine: &'a str,
    /// Staleness policy as a YAML flow mapping: `{}` for the defaults.
    pub staleness: &'a str,
}

impl Declaration<'_> {
    /// The share's manifest.
    pub fn manifest(&self) -> String {
        // JSON is YAML: a path with any character stays one string.
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

/// Agent and broker of one host. Both receive SIGTERM on drop, then SIGKILL if they do not end.
pub struct Node {
    // Fields are dropped in this order: the agent ends before the broker.
    agent: Process,
    /// Broker and keeper, if they are services of their own.
    services: Option<Services>,
    /// Number of agents started so far.
    agents: u32,
    binary: PathBuf,
    ctl: PathBuf,
    metrics: SocketAddr,
    dir: TempDir,
}

impl Node {
    /// Starts both without any share; the broker is a child of the agent.
    ///
    /// # Errors
    /// If they are not built or do not start.
    pub fn start(parts: &Parts) -> Result<Self> {
        Self::prepare(parts, |_, binaries, mut up| {
            up.arg("up").arg("--broker").arg(binaries.join(BROKER)).arg("--keeper").arg(binaries.join(KEEPER));
            Ok((up, None))
        })
    }

    /// Starts both and a keeper without any share, as a service manager does: none is a child of another.
    ///
    /// # Errors
    /// If they are not built or do not start.
    pub fn start_services(parts: &Parts) -> Result<Self> {
        Self::prepare(parts, |directory, binaries, mut run| {
            let services = Services::start(binaries, directory)?;
            run.arg("run");
            Ok((run, Some(services)))
        })
    }

    /// `complete` adds the arguments of the agent's command and starts the processes that run beside the agent.
    fn prepare(
        parts: &Parts,
        complete: impl FnOnce(&Path, &Path, Command) -> Result<(Command, Option<Services>)>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("node-").tempdir().context("making a directory for a node")?;
        fs::create_dir(dir.path().join("shares")).context("making a directory for manifests")?;
        let (binary, ctl, metrics) = (parts.binary("virtiofs-agent")?, parts.binary("virtiofsctl")?, free_port()?);
        let binaries = dir.path().join("bin");
        install(parts, &binaries)?;
        let (command, services) = complete(dir.path(), &binaries, Command::new(&binary))?;
        let agent = start_agent(command, dir.path(), metrics, 1)?;
        Ok(Self { agent, services, agents: 1, binary, ctl, metrics, dir })
    }

    /// Kills the agent, which is a service beside the broker, and starts one from another binary.
    ///
    /// # Errors
    /// As [`Node::kill_agent`].
    pub(crate) fn replace_agent(&mut self, binary: PathBuf) -> Result<()> {
        self.binary = binary;
        self.kill_agent()
    }

    /// Kills the agent, which is a service beside the broker, and starts another one.
    ///
    /// # Errors
    /// If the broker is a child of the agent, or the new agent does not answer.
    pub fn kill_agent(&mut self) -> Result<()> {
        ensure!(self.services.is_some(), "the broker is a child of this agent and would end with it");
        kill(Pid::from_raw(self.agent.id().cast_signed()), Signal::SIGKILL).context("killing the agent")?;
        self.agent.wait_for(STOP_TIMEOUT)?.context("the agent did not end after SIGKILL")?;
        self.agents += 1;
        let mut command = Command::new(&self.binary);
        command.arg("run");
        self.agent = start_agent(command, self.dir.path(), self.metrics, self.agents)?;
        let until = Instant::now() + STOP_TIMEOUT;
        while let Err(error) = self.metrics() {
            ensure!(Instant::now() < until, "the new agent does not answer: {error:#}\n{}", self.log_tail());
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Kills the broker, which is a service, and starts another one.
    ///
    /// # Errors
    /// If the broker is a child of the agent, or the next one does not answer.
    pub fn kill_broker(&mut self) -> Result<()> {
        self.services_mut()?.kill_broker()
    }

    /// Replaces the broker, which is a service, with another one that stands by until it is stopped.
    ///
    /// # Errors
    /// If the broker is a child of the agent, or the next one is not ready or does not answer.
    pub fn replace_broker(&mut self) -> Result<()> {
        self.services_mut()?.replace_broker()
    }

    /// Kills the keeper, which is a service, and starts another one.
    ///
    /// # Errors
    /// If the keeper is a child of the agent, or the broker does not give the next one what it holds.
    pub fn kill_keeper(&mut self) -> Result<()> {
        self.services_mut()?.kill_keeper()
    }

    /// Process id of the broker, if it is a service.
    pub fn broker_id(&self) -> Option<u32> {
        self.services.as_ref().map(Services::broker_id)
    }

    fn services_mut(&mut self) -> Result<&mut Services> {
        self.services.as_mut().context("broker and keeper are children of the agent and would end with it")
    }

    /// Declares or changes a share: replaces its manifest atomically.
    ///
    /// # Errors
    /// If the manifest cannot be written.
    pub fn declare(&self, share: &Declaration<'_>) -> Result<()> {
        let (new, manifest) = (self.dir.path().join("manifest.new"), self.manifest_path(share.name));
        fs::write(&new, share.manifest())
            .and_then(|()| fs::rename(&new, &manifest))
            .with_context(|| format!("writing {}", manifest.display()))
    }

    /// Removes a share's manifest.
    ///
    /// # Errors
    /// If there is none.
    pub fn withdraw(&self, name: &str) -> Result<()> {
        let manifest = self.manifest_path(name);
        fs::remove_file(&manifest).with_context(|| format!("removing {}", manifest.display()))
    }

    /// Waits for a share's socket and returns its path.
    ///
    /// # Errors
    /// If it does not appear; the message has the daemons' log.
    pub fn socket(&self, name: &str) -> Result<PathBuf> {
        let socket = self.runtime_dir().join("shares").join(format!("{name}.sock"));
        wait_for_socket(&self.agent, &socket)?;
        Ok(socket)
    }

    /// The metrics page of the agent.
    ///
    /// # Errors
    /// If the agent does not answer with status 200.
    pub fn metrics(&self) -> Result<String> {
        scrape(self.metrics).with_context(|| format!("fetching /metrics from {}", self.metrics))
    }

    /// Output of `virtiofsctl status` with these options.
    ///
    /// # Errors
    /// If the command fails.
    pub fn status(&self, options: &[&str]) -> Result<String> {
        self.command("status", options)
    }

    /// Hands every guest of a share over to a new engine with `virtiofsctl handover`.
    ///
    /// # Errors
    /// If the command fails.
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
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "virtiofsctl {name} ended with {}\n{stdout}{stderr}", output.status);
        Ok(stdout.into_owned())
    }

    /// Runtime directory: sockets and state.
    pub fn runtime_dir(&self) -> PathBuf {
        runtime_dir(self.dir.path())
    }

    /// The binary that engines are started from.
    pub(crate) fn engine_binary(&self) -> PathBuf {
        self.dir.path().join("bin").join(ENGINE)
    }

    /// Process id of the agent.
    pub fn agent_id(&self) -> u32 {
        self.agent.id()
    }

    /// The end of the daemons' logs.
    pub fn log_tail(&self) -> String {
        self.agent.log_tail() + &self.services.as_ref().map(Services::log_tail).unwrap_or_default()
    }

    /// Stops both with SIGTERM, as Ctrl-C does, and waits until they end.
    ///
    /// # Errors
    /// If they do not end in time, or not with exit status 0.
    pub fn stop(self) -> Result<()> {
        let status = self.agent.stop()?;
        let log = self.log_tail();
        let status = status.with_context(|| format!("virtiofs-agent did not end after SIGTERM\n{log}"))?;
        ensure!(status.success(), "virtiofs-agent ended with {status}\n{log}");
        self.services.as_ref().map_or(Ok(()), Services::stop)
    }

    fn manifest_path(&self, name: &str) -> PathBuf {
        self.dir.path().join("shares").join(format!("{name}.yaml"))
    }
}

/// Starts an agent that logs at level info: events of engines and sessions explain a failed test.
fn start_agent(mut command: Command, dir: &Path, metrics: SocketAddr, number: u32) -> Result<Process> {
    command.arg("--shares").arg(dir.join("shares")).arg("--runtime-dir").arg(runtime_dir(dir));
    command.args(["--metrics", &metrics.to_string(), "--log", "info"]);
    Process::start(command, &dir.join(format!("agent-{number}.log")), STOP_TIMEOUT)
}

/// Copies broker, keeper and engine into a directory of their own, where a test can replace them without side effects.
fn install(parts: &Parts, directory: &Path) -> Result<()> {
    fs::create_dir(directory).context("making a directory for binaries")?;
    for name in [BROKER, KEEPER, ENGINE] {
        let from = parts.binary(name)?;
        fs::copy(&from, directory.join(name)).with_context(|| format!("copying {}", from.display()))?;
    }
    Ok(())
}

/// An unused port.
///
/// # Errors
/// If there is none.
pub fn free_port() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("looking for a free port")?;
    listener.local_addr().context("looking for a free port")
}

/// Fetches /metrics by HTTP/1.0: the server closes the connection after the response.
///
/// # Errors
/// If the server does not answer with status 200.
pub fn scrape(server: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, SCRAPE_TIMEOUT)?;
    stream.set_read_timeout(Some(SCRAPE_TIMEOUT))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the response has no end of its header")?;
    let first = head.lines().next().unwrap_or_default();
    ensure!(first.contains(" 200 "), "unexpected status line: '{first}'");
    Ok(body.to_owned())
}
