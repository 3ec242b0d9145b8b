//! A host in a directory, for tests: `virtiofs-agent up`, or `run` beside a broker, with the real broker and engine,
//! manifests and sources. Every failure is a panic with the daemons' log.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::{Guest, GuestConfig};
use crate::workload::{Config, Limit, Workload};

/// Time limit on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Interval between two polls.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Directory of this project's programs, all built. For a test, cargo builds only the programs of the test's package.
fn programs() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        // The test is target/PROFILE/deps/TEST.
        let folder = test.ancestors().nth(2).unwrap().to_path_buf();
        let mut build = Command::new(env!("CARGO"));
        build.args([
            "build",
            "--quiet",
            "-p",
            "virtiofs-agent",
            "-p",
            "virtiofs-broker",
            "-p",
            "virtiofs-keeper",
            "-p",
            "virtiofs-engine",
        ]);
        build.args(["-p", "virtiofsctl"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().unwrap().success(), "building our programs");
        folder
    })
}

/// Path of the agent.
pub fn agent() -> PathBuf {
    programs().join("virtiofs-agent")
}

/// Path of the broker; its engine is in the same directory.
pub fn broker() -> PathBuf {
    programs().join("virtiofs-broker")
}

/// Path of `virtiofsctl`.
pub fn ctl() -> PathBuf {
    programs().join("virtiofsctl")
}

/// A running host.
pub struct Host {
    agent: Child,
    /// The broker, if it is a service of its own.
    broker: Option<Child>,
    folder: TempDir,
    metrics: SocketAddr,
}

/// A minimal manifest; `more` is additional YAML of the spec.
pub fn manifest(name: &str, source: &Path, more: &str) -> String {
    let path = Value::from(source.display().to_string());
    format!(
        "apiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\nmetadata: {{name: {name}}}\n\
         spec:\n  source: {{hostPath: {{path: {path}}}}}\n{more}\n"
    )
}

/// A host whose daemons are not started yet.
pub struct Prepared(TempDir);

/// Prepares a host without shares.
pub fn prepare() -> Prepared {
    let folder = tempfile::Builder::new().prefix("host-").tempdir().unwrap();
    fs::create_dir(folder.path().join("shares")).unwrap();
    Prepared(folder)
}

impl Prepared {
    /// Creates a directory with a file in it, for a share to export.
    pub fn source(&self, name: &str) -> PathBuf {
        let source = self.0.path().join("sources").join(name);
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("hello"), "from the host\n").unwrap();
        source
    }

    /// Writes a manifest.
    pub fn declare(&self, file: &str, text: &str) {
        fs::write(self.0.path().join("shares").join(file), text).unwrap();
    }

    /// A path in the host's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Starts agent and broker.
    pub fn up(self) -> Host {
        self.up_without(&[])
    }

    /// Starts agent and broker without these capabilities, named as in setpriv(1).
    pub fn up_without(self, capabilities: &[&str]) -> Host {
        let mut command = without(capabilities);
        command.arg("up").arg("--broker").arg(broker());
        self.start(command, None)
    }

    /// Like [`Prepared::up_without`], with a limit of open files for each process.
    pub fn up_limited(self, capabilities: &[&str], open_files: u64) -> Host {
        let inner = without(capabilities);
        let mut command = Command::new("prlimit");
        command.arg(format!("--nofile={open_files}:{open_files}")).arg(inner.get_program()).args(inner.get_args());
        command.arg("up").arg("--broker").arg(broker());
        self.start(command, None)
    }

    /// Starts a broker and, beside it, the agent for a service manager with these environment variables.
    pub fn run(self, environment: &[(&str, &str)]) -> Host {
        let broker = start_broker(self.0.path());
        self.run_beside(Some(broker), environment)
    }

    /// Starts the agent for a service manager without a broker.
    pub fn run_alone(self, environment: &[(&str, &str)]) -> Host {
        self.run_beside(None, environment)
    }

    fn run_beside(self, broker: Option<Child>, environment: &[(&str, &str)]) -> Host {
        let mut command = Command::new(agent());
        command.arg("run").envs(environment.iter().copied());
        self.start(command, broker)
    }

    /// Starts agent and broker with these standard outputs and standard errors.
    pub fn up_printing_to(self, outputs: [Stdio; 2]) -> Host {
        let mut command = Command::new(agent());
        command.arg("up").arg("--broker").arg(broker());
        self.start_printing_to(outputs, command, None)
    }

    fn start(self, command: Command, broker: Option<Child>) -> Host {
        let outputs = outputs(self.0.path());
        self.start_printing_to(outputs, command, broker)
    }

    fn start_printing_to(self, outputs: [Stdio; 2], command: Command, broker: Option<Child>) -> Host {
        let metrics = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let agent = start_agent(command, self.0.path(), metrics, outputs);
        Host { agent, broker, folder: self.0, metrics }
    }
}

/// The log files. An agent appends to the log of the previous one.
fn outputs(folder: &Path) -> [Stdio; 2] {
    ["stdout", "stderr"].map(|name| log(folder, name))
}

fn start_agent(mut command: Command, folder: &Path, metrics: SocketAddr, [stdout, stderr]: [Stdio; 2]) -> Child {
    command.arg("--shares").arg(folder.join("shares")).arg("--runtime-dir").arg(folder.join("run"));
    command.args(["--metrics", &metrics.to_string(), "--log-format", "json"]);
    command.stdout(stdout).stderr(stderr).spawn().unwrap()
}

fn start_broker(folder: &Path) -> Child {
    let mut command = Command::new(broker());
    command.arg("--runtime-dir").arg(folder.join("run")).args(["--log-format", "json"]);
    command.stdout(Stdio::null()).stderr(log(folder, "broker")).spawn().unwrap()
}

fn log(folder: &Path, name: &str) -> Stdio {
    fs::OpenOptions::new().create(true).append(true).open(folder.join(name)).unwrap().into()
}

/// The agent's command. setpriv executes the agent in the same process.
fn without(capabilities: &[&str]) -> Command {
    if capabilities.is_empty() {
        return Command::new(agent());
    }
    let dropped: Vec<_> = capabilities.iter().map(|name| format!("-{name}")).collect();
    let mut command = Command::new("setpriv");
    command.arg("--bounding-set").arg(dropped.join(",")).arg(agent());
    command
}

impl Host {
    /// A path in the host's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a manifest.
    pub fn declare(&self, file: &str, text: &str) {
        fs::write(self.path("shares").join(file), text).unwrap();
    }

    /// Path of a share's socket.
    pub fn socket(&self, share: &str) -> PathBuf {
        self.path("run/shares").join(format!("{share}.sock"))
    }

    /// Process id of the agent.
    pub fn agent(&self) -> Pid {
        Pid::from_raw(self.agent.id().cast_signed())
    }

    /// Standard output of the agent.
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.path("stdout")).unwrap()
    }

    /// The log of agent and broker.
    pub fn log(&self) -> String {
        let broker = fs::read_to_string(self.path("broker")).unwrap_or_default();
        fs::read_to_string(self.path("stderr")).unwrap_or_default() + &broker
    }

    /// Process id of the broker, if it is a service of its own.
    pub fn broker(&self) -> Pid {
        Pid::from_raw(self.broker.as_ref().unwrap().id().cast_signed())
    }

    /// Kills the agent for a service manager and starts another one.
    pub fn kill_and_run(&mut self) {
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
        let mut command = Command::new(agent());
        command.arg("run");
        let folder = self.folder.path();
        self.agent = start_agent(command, folder, self.metrics, outputs(folder));
    }

    /// Starts a broker as a service. Kills the previous one, if any.
    pub fn new_broker(&mut self) {
        if let Some(mut broker) = self.broker.take() {
            broker.kill().unwrap();
            broker.wait().unwrap();
        }
        self.broker = Some(start_broker(self.folder.path()));
    }

    /// A `virtiofsctl` command on this host.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(ctl());
        command.args(words).arg("--runtime-dir").arg(self.path("run"));
        command
    }

    /// Runs a `virtiofsctl` command. Returns true if it succeeds, and its output.
    pub fn run_ctl(&self, words: &[&str]) -> (bool, String) {
        let output = self.command(words).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    }

    /// Output of `virtiofsctl status` with these options.
    pub fn status_output(&self, options: &[&str]) -> Output {
        let mut command = Command::new(ctl());
        command.arg("status").arg("--runtime-dir").arg(self.path("run")).args(options).output().unwrap()
    }

    /// `virtiofsctl status -o json`.
    pub fn status(&self) -> Value {
        let output = self.status_output(&["-o", "json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The share in the status; `Null` if it does not exist.
    pub fn share(&self, name: &str) -> Value {
        let status = self.status();
        status["shares"].as_array().unwrap().iter().find(|it| it["name"] == name).cloned().unwrap_or_default()
    }

    /// Waits until `wanted` is true for a share, and returns its status.
    pub fn until(&self, share: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait(&format!("share {share} to be {what}"), || Some(self.share(share)).filter(|it| wanted(it)))
    }

    /// Waits until a share is served.
    pub fn until_ready(&self, share: &str) -> Value {
        self.until(share, "served", |it| it["state"] == "Ready" || it["state"] == "Degraded")
    }

    /// Waits until a share is not ready for this reason.
    pub fn until_not_ready(&self, share: &str, reason: &str) -> Value {
        self.until(share, reason, |it| it["state"] == "NotReady" && has_reason(it, reason))
    }

    /// Polls until `probe` returns a value.
    pub fn wait<T>(&self, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(found) = probe() {
                return found;
            }
            if Instant::now() >= deadline {
                let status = self.status_output(&[]).stdout;
                panic!("timed out waiting for {what}\n{}\n{}", String::from_utf8_lossy(&status), self.log());
            }
            sleep(POLL_INTERVAL);
        }
    }

    /// Address of the agent's HTTP server.
    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }

    /// Status code and body of a page of the agent's HTTP server.
    pub fn get(&self, page: &str) -> (u16, String) {
        let mut stream = self.wait("the metrics address", || TcpStream::connect(self.metrics).ok());
        write!(stream, "GET {page} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    /// Sends a signal to the agent and waits until it ends.
    pub fn end(&mut self, signal: Signal) -> ExitStatus {
        kill(self.agent(), signal).unwrap();
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.agent.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the agent did not end\n{}", self.log());
            sleep(POLL_INTERVAL);
        }
    }

    /// Waits until all these processes have ended.
    pub fn until_gone(&self, pids: &[i32]) {
        self.wait(&format!("processes {pids:?} to end"), || pids.iter().all(|pid| !is_alive(*pid)).then_some(()));
    }

    /// Sockets in the runtime directory.
    pub fn sockets(&self) -> Vec<PathBuf> {
        let folders = [self.path("run"), self.path("run/shares")];
        let entries = folders.iter().flat_map(|folder| fs::read_dir(folder).unwrap()).map(|it| it.unwrap().path());
        entries.filter(|path| path.extension().is_some_and(|it| it == "sock")).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The broker receives a signal when the agent ends, and its engines when the broker ends.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        if let Some(broker) = &mut self.broker {
            let _ = broker.kill();
            let _ = broker.wait();
        }
    }
}

/// True if a share of `status` has a notice with this reason.
pub fn has_reason(share: &Value, reason: &str) -> bool {
    share["notices"].as_array().is_some_and(|notices| notices.iter().any(|it| it["reason"] == reason))
}

/// True if the process runs.
pub fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z')
}

/// True if a signal ended the process.
pub fn signalled(status: ExitStatus) -> bool {
    status.signal().is_some()
}

/// YAML of the spec of a share that [`under_work`] can use.
pub const WORKABLE: &str = "  access: ReadWrite\n  engine: {xattr: Enabled}";

/// Runs `meanwhile` while a guest works on the share. The guest compares everything with a model and must see no error.
pub fn under_work(host: &mut Host, share: &str, source: &Path, meanwhile: impl FnOnce(&mut Host)) {
    host.until_ready(share);
    let guest = Guest::boot(GuestConfig::new(host.socket(share)).small());
    let guest = guest.unwrap_or_else(|error| panic!("{error}\n{}", host.log()));
    let mut work = Workload::start(Config::new(7).lanes(2).host(source), &[guest.fuse()]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let end = StopAtEnd(&stop);
        let worker = scope.spawn(|| {
            work.run(Limit::until(&stop));
            work.finish()
        });
        meanwhile(host);
        drop(end);
        let report = worker.join().unwrap();
        assert!(report.is_clean(), "{report}\n{}", host.log());
        assert!(report.steps > 0, "{report}");
    });
    assert_eq!(guest.violations(), []);
}

/// Stops the workload even if `meanwhile` panics.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
