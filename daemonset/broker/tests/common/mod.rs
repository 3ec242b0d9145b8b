//! A broker as the agent starts it, in a directory of its own, with real engines.
// Each test program uses a part of it.
#![allow(dead_code)]

pub(crate) mod fuse;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use testkit::guest::{Guest, GuestConfig};
use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::channel::FramedStream;
use virtiofs_contract::control::{
    Endpoint, EndpointKind, EndpointStatus, PendingHandOver, Request, Response, SessionState, SessionStatus,
    SocketSpec, Status,
};
use virtiofs_contract::preflight::{Finding, Preflight};

/// Deadline of every wait, on a machine that is busy with other tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

const BROKER: &str = env!("CARGO_BIN_EXE_virtiofs-broker");

/// The engine, built beside the broker, because cargo builds only the binaries of the tested package.
fn engine() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| build("virtiofs-engine"))
}

fn keeper() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| build("virtiofs-keeper"))
}

fn build(program: &str) -> PathBuf {
    let folder = Path::new(BROKER).parent().unwrap();
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "-p", program]);
    if folder.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().unwrap().success(), "building {program}");
    folder.join(program)
}

/// Waits until a condition holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "still not so after {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(10));
    }
}

/// A broker process and its directory. Dropping it kills the process.
pub(crate) struct Broker {
    process: Child,
    keeper: Option<Child>,
    folder: TempDir,
    engine: PathBuf,
}

impl Broker {
    /// A broker whose sessions survive it.
    pub(crate) fn start_with_keeper() -> Self {
        let mut broker = Self::start();
        broker.start_keeper();
        broker.crash();
        broker.restart();
        broker
    }

    /// Starts a keeper, and waits until it listens.
    pub(crate) fn start_keeper(&mut self) {
        let directory = self.keeper_dir();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("keeper.log")).unwrap();
        let mut command = Command::new(keeper());
        command.arg("--directory").arg(&directory).stderr(log);
        self.keeper = Some(command.spawn().unwrap());
        until("the keeper listens", || directory.join("fetch").exists());
    }

    pub(crate) fn keeper_dir(&self) -> PathBuf {
        self.folder.path().join("keeper")
    }

    pub(crate) fn keeper_pid(&self) -> u32 {
        self.keeper.as_ref().unwrap().id()
    }

    pub(crate) fn kill_keeper(&mut self) {
        end(&mut self.keeper.take().unwrap());
    }

    /// Kills the broker alone.
    pub(crate) fn crash(&mut self) {
        end(&mut self.process);
    }

    /// Starts the broker again in the same directory, and waits until it listens.
    pub(crate) fn restart(&mut self) {
        self.restart_as(Command::new(BROKER));
        let greeted = || UnixStream::connect(self.control_path()).is_ok();
        until("the broker listens again", greeted);
    }

    /// Starts the broker again, as the first process of a PID namespace: its engines end with it, as in a container.
    pub(crate) fn restart_in_container(&mut self) {
        self.restart_as(contained());
        let greeted = || UnixStream::connect(self.control_path()).is_ok();
        until("the broker listens again", greeted);
    }

    /// Starts another broker that stands by.
    pub(crate) fn stand_by(&self, place: Place, engine: Option<&Path>) -> StandbyBroker {
        let mut command = match place {
            Place::Host => Command::new(BROKER),
            Place::Container => contained(),
        };
        let ready_file = tempfile::Builder::new().prefix("ready-").tempdir_in(self.folder.path()).unwrap().keep();
        let ready_file = ready_file.join("ready");
        command.arg("--stand-by").arg("--ready-file").arg(&ready_file);
        let log = fs::OpenOptions::new().append(true).open(self.folder.path().join("log")).unwrap();
        let engine = engine.unwrap_or(&self.engine);
        let process = spawn(command, self.folder.path(), engine, Some(self.keeper_dir()), log.into());
        StandbyBroker { process: Some(process), ready_file }
    }

    /// The broker that stood by becomes this one. Returns the process of the one before.
    pub(crate) fn succeeded_by(&mut self, mut standby: StandbyBroker) -> Child {
        std::mem::replace(&mut self.process, standby.process.take().unwrap())
    }

    /// Starts the broker again, to end at the `step`th place between two effects (feature `die-at-step`).
    pub(crate) fn restart_until_step(&mut self, step: u64) {
        let mut command = Command::new(BROKER);
        command.env("VIRTIOFS_DIE_AT_STEP", step.to_string());
        self.restart_as(command);
    }

    /// True if the broker has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }

    fn restart_as(&mut self, command: Command) {
        let log = fs::OpenOptions::new().append(true).open(self.folder.path().join("log")).unwrap();
        let keeper = self.keeper.is_some().then(|| self.keeper_dir());
        self.process = spawn(command, self.folder.path(), &self.engine, keeper, log.into());
    }

    pub(crate) fn start() -> Self {
        Self::start_with(engine().into())
    }

    /// A broker whose engine is a shell script, in which `ENGINE` is the real one.
    pub(crate) fn start_with_script(script: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("broker-").tempdir().unwrap();
        let path = folder.path().join("engine.sh");
        let text = format!("#!/bin/sh\n{}\n", script.replace("ENGINE", engine().to_str().unwrap()));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self::start_in(folder, path)
    }

    /// A broker in a PID namespace of its own, as in a container. It cannot see processes outside, such as
    /// VMMs, and knows itself as process 1.
    pub(crate) fn start_in_pid_namespace() -> Self {
        let folder = tempfile::Builder::new().prefix("broker-").tempdir().unwrap();
        Self::start_as(contained(), folder, engine().into())
    }

    /// A broker of an ordinary user, who may be unable to enter the directory that the programs were built in.
    pub(crate) fn start_as_user(id: u32) -> Self {
        let folder = tempfile::Builder::new().prefix("broker-").tempdir().unwrap();
        let copy = |program: &Path| {
            let copy = folder.path().join(program.file_name().unwrap());
            fs::copy(program, &copy).unwrap();
            copy
        };
        let (broker, engine) = (copy(Path::new(BROKER)), copy(engine()));
        chown(folder.path(), Some(id), Some(id)).unwrap();
        let mut command = Command::new(broker);
        command.uid(id).gid(id);
        Self::start_as(command, folder, engine)
    }

    /// A broker whose log goes elsewhere than to a file.
    pub(crate) fn start_logging_to(stderr: impl Into<Stdio>) -> Self {
        let folder = tempfile::Builder::new().prefix("broker-").tempdir().unwrap();
        fs::write(folder.path().join("log"), "").unwrap();
        Self::start_and_wait(Command::new(BROKER), folder, engine().into(), stderr.into())
    }

    fn start_with(engine: PathBuf) -> Self {
        Self::start_in(tempfile::Builder::new().prefix("broker-").tempdir().unwrap(), engine)
    }

    fn start_in(folder: TempDir, engine: PathBuf) -> Self {
        Self::start_as(Command::new(BROKER), folder, engine)
    }

    fn start_as(command: Command, folder: TempDir, engine: PathBuf) -> Self {
        let log = Stdio::from(fs::File::create(folder.path().join("log")).unwrap());
        Self::start_and_wait(command, folder, engine, log)
    }

    fn start_and_wait(command: Command, folder: TempDir, engine: PathBuf, log: Stdio) -> Self {
        let process = spawn(command, folder.path(), &engine, None, log);
        let broker = Broker { process, keeper: None, folder, engine };
        until("the broker listens", || UnixStream::connect(broker.control_path()).is_ok());
        broker
    }

    /// Starts another broker on the same directory. Returns its exit status and its output.
    pub(crate) fn rival(&self) -> (ExitStatus, String) {
        let rival = spawn(Command::new(BROKER), self.folder.path(), &self.engine, None, Stdio::piped());
        let output = rival.wait_with_output().unwrap();
        (output.status, String::from_utf8(output.stderr).unwrap())
    }

    /// Kills the broker and starts it again in the same directory.
    pub(crate) fn crash_and_restart(mut self) -> Self {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        let engine = self.engine.clone();
        drop(self);
        Self::start_in(folder, engine)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    pub(crate) fn control_path(&self) -> PathBuf {
        self.runtime_dir().join("broker.sock")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// A directory to share, with a file in it.
    pub(crate) fn source(&self, name: &str) -> PathBuf {
        let source = self.folder.path().canonicalize().unwrap().join("sources").join(name);
        fs::create_dir_all(&source).unwrap();
        fs::write(source.join("hello"), "from the host\n").unwrap();
        source
    }

    /// An endpoint on a directory of this name.
    pub(crate) fn endpoint(&self, name: &str) -> Endpoint {
        Endpoint {
            name: name.into(),
            kind: EndpointKind::Share,
            source: self.source(name),
            sub_path: None,
            socket: SocketSpec {
                path: self.runtime_dir().join(format!("shares/{name}.sock")),
                owner: None,
                group: None,
                mode: 0o600,
            },
            engine: EngineConfig::stock(Access::ReadWrite),
            exclusive: false,
            consumer: None,
        }
    }

    pub(crate) fn control(&self) -> Control {
        let mut control = Control(FramedStream::new(UnixStream::connect(self.control_path()).unwrap()));
        let welcome = control.request(&Request::hello());
        assert!(matches!(welcome, Response::Welcome { .. }), "{welcome:?}");
        control
    }

    /// Applies an endpoint of this name.
    pub(crate) fn share(&self, name: &str) -> Endpoint {
        let endpoint = self.endpoint(name);
        self.control().apply(&endpoint).unwrap();
        endpoint
    }

    pub(crate) fn status_of(&self, name: &str) -> EndpointStatus {
        let status = self.control().status();
        let found = status.endpoints.into_iter().find(|endpoint| endpoint.endpoint.name == name);
        found.unwrap_or_else(|| panic!("no endpoint {name}"))
    }

    /// The only session of an endpoint.
    pub(crate) fn session_of(&self, name: &str) -> SessionStatus {
        let mut sessions = self.status_of(name).sessions;
        assert_eq!(sessions.len(), 1, "sessions of {name}");
        sessions.remove(0)
    }

    /// Waits until the only session of an endpoint is in this state.
    pub(crate) fn until_state(&self, name: &str, state: SessionState) -> SessionStatus {
        let mut seen = None;
        until(&format!("a session of {name} that is {state:?}"), || {
            let mut sessions = self.status_of(name).sessions;
            seen = sessions.pop().filter(|session| sessions.is_empty() && session.state == state);
            seen.is_some()
        });
        seen.unwrap()
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        until("the broker has ended", || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

/// Where a broker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    /// As the first process of a PID namespace.
    Container,
}

/// A broker that stands by. Dropping it kills it.
pub(crate) struct StandbyBroker {
    process: Option<Child>,
    ready_file: PathBuf,
}

impl StandbyBroker {
    /// What the probe of its container prints, and whether it passes.
    pub(crate) fn probe(&self) -> (String, bool) {
        let output = Command::new(BROKER).arg("ready").arg(&self.ready_file).output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (text, output.status.success())
    }

    /// Waits until the probe prints this.
    pub(crate) fn until(&self, text: &str) {
        until(&format!("a broker that says {text:?}"), || self.probe().0.contains(text));
    }

    pub(crate) fn until_ready(self) -> Self {
        self.until("ready: standing by");
        self
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    pub(crate) fn wait(mut self) -> ExitStatus {
        self.process.take().unwrap().wait().unwrap()
    }
}

impl Drop for StandbyBroker {
    fn drop(&mut self) {
        self.process.iter_mut().for_each(end);
    }
}

fn contained() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(BROKER);
    command
}

impl Drop for Broker {
    fn drop(&mut self) {
        end(&mut self.process);
        if let Some(keeper) = &mut self.keeper {
            end(keeper);
        }
        if std::thread::panicking() {
            eprintln!("--- the broker's log ---\n{}", self.log());
            let keeper = fs::read_to_string(self.folder.path().join("keeper.log")).unwrap_or_default();
            eprintln!("--- the keeper's log ---\n{keeper}");
        }
    }
}

fn end(process: &mut Child) {
    let _ = process.kill();
    let _ = process.wait();
}

fn spawn(mut command: Command, folder: &Path, engine: &Path, keeper: Option<PathBuf>, log: Stdio) -> Child {
    if let Some(directory) = keeper {
        command.arg("--keeper").arg(directory);
    }
    command.arg("--runtime-dir").arg(folder.join("run")).arg("--engine").arg(engine).args(["--log", "debug"]);
    command.stderr(log).spawn().unwrap()
}

/// A connection to the control socket.
pub(crate) struct Control(FramedStream);

impl Control {
    pub(crate) fn request(&mut self, request: &Request) -> Response {
        self.0.send(request).unwrap();
        self.0.receive().unwrap()
    }

    pub(crate) fn request_with(&mut self, request: &Request, beside: &fs::File) -> Response {
        self.0.send_with(request, &[beside.as_fd()]).unwrap();
        self.0.receive().unwrap()
    }

    pub(crate) fn apply(&mut self, endpoint: &Endpoint) -> Result<Preflight, Finding> {
        match self.request(&Request::Apply { endpoint: endpoint.clone(), reuse_preflight_of: None }) {
            Response::Applied { preflight } => Ok(preflight),
            Response::Refused { finding } => Err(finding),
            other => panic!("{other:?}"),
        }
    }

    /// Applies an endpoint whose socket directory is passed.
    pub(crate) fn apply_in(&mut self, endpoint: &Endpoint, directory: &Path) -> Result<Preflight, Finding> {
        let request = Request::Apply { endpoint: endpoint.clone(), reuse_preflight_of: None };
        match self.request_with(&request, &fs::File::open(directory).unwrap()) {
            Response::Applied { preflight } => Ok(preflight),
            Response::Refused { finding } => Err(finding),
            other => panic!("{other:?}"),
        }
    }

    /// Requests new engines for all sessions of an endpoint.
    pub(crate) fn hand_over(&mut self, name: &str) -> Vec<PendingHandOver> {
        match self.request(&Request::HandOver { name: name.into(), session: None }) {
            Response::HandingOver { sessions } => sessions,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn remove(&mut self, name: &str, force: bool) {
        assert_eq!(self.request(&Request::Remove { name: name.into(), force }), Response::Done);
    }

    pub(crate) fn status(&mut self) -> Status {
        let mut page = |after| match self.request(&Request::Status { after }) {
            Response::Status(status) => *status,
            other => panic!("{other:?}"),
        };
        let mut status = page(None);
        while let Some(after) = status.next.take() {
            status.append(page(Some(after)));
        }
        status
    }
}

/// A guest on an endpoint.
pub(crate) fn boot(endpoint: &Endpoint) -> Guest {
    Guest::boot(GuestConfig::new(&endpoint.socket.path).small()).unwrap()
}

/// Reads the file that each source has.
pub(crate) fn read_hello(guest: &Guest) -> String {
    let fuse = guest.fuse();
    let entry = fuse.lookup(1, "hello").unwrap();
    let open = fuse.open(entry.nodeid, libc::O_RDONLY).unwrap();
    let text = fuse.read(entry.nodeid, open.fh, 0, 4096).unwrap();
    fuse.release(entry.nodeid, open.fh, libc::O_RDONLY).unwrap();
    String::from_utf8(text).unwrap()
}

/// True if the process exists and is not a zombie.
pub(crate) fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')))
}

/// True if every thread of the process is stopped. A thread that ends meanwhile counts as running.
pub(crate) fn threads_stand_still(pid: u32) -> bool {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().all(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat"));
        stat.is_ok_and(|stat| stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T')))
    })
}
