//! Starts an engine from a configuration, or returns a finding with a remedy.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::geteuid;
use virtiofs_config::{EngineConfig, Limits, Sandbox};
use virtiofs_contract::Versions;
use virtiofs_contract::channel::PacketChannel;
use virtiofs_contract::control::EngineBinary;
use virtiofs_contract::engine::{FromEngine, Predecessor, ToEngine};
use virtiofs_contract::preflight::{Finding, Preflight, Reason};

use super::finding;
use super::limits::cgroup::Cgroups;
use super::limits::session_group::SessionGroup;
use super::limits::{self, Applied};
use super::log::{self, EngineLog};
use super::mount_point::{self, MountPoint};
use super::process::{EngineProcess, Purpose, Spawner};
use super::root::Root;
use super::source::{SourceLocation, Sources, open_source, released};
use super::start_queue::StartQueue;
use super::unknown_fields::UnknownFields;
use crate::engine::fd_stash::StashServer;
use crate::engine::persistent::{PersistentState, missing};
use crate::holder::Hold;
use crate::holder::names::{EnginePart, Part};
use crate::poll::{Interest, wait_readable};
use crate::record::store::StoredEngine;
use crate::vhost_user::front_end::FrontEnd;

/// Time within which an engine must be ready, or a preflight finished: it builds the sandbox and tries file handles on
/// every file system of the share.
pub(crate) const START_DEADLINE: Duration = Duration::from_secs(10);

/// A preflight takes some hundredths of a second. One that runs longer than this counts as hung for the next request on
/// the same directory.
const HUNG_PREFLIGHT: Duration = Duration::from_secs(2);

/// Deadline for one vhost-user message. The longest one maps guest memory.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);

/// Time to wait for the exit status of a dead engine.
const EXIT_DEADLINE: Duration = Duration::from_millis(200);

/// An engine that is in its sandbox and waits for vhost-user messages.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) process: EngineProcess,
    pub(crate) control: PacketChannel,
    pub(crate) front_end: FrontEnd,
    pub(crate) log: EngineLog,
    /// Version of the messages.
    pub(crate) version: u32,
    pub(crate) config: EngineConfig,
    pub(crate) binary: Option<EngineBinary>,
    pub(crate) preflight: Preflight,
    /// The directory that it serves; none: its identity is unknown.
    pub(crate) root: Option<Root>,
    /// [`Job::generation`].
    pub(crate) generation: u64,
    pub(crate) stash: StashServer,
    pub(crate) held: HeldEngine,
}

/// The descriptors of an engine at the holder. Dropping it removes them.
#[derive(Debug)]
pub(crate) struct HeldEngine {
    hold: Hold,
    /// Serial number of the engine, unique in its session.
    pub(crate) serial: u64,
}

impl HeldEngine {
    pub(crate) fn new(hold: Hold, serial: u64) -> Self {
        HeldEngine { hold, serial }
    }

    fn deposit(&self, part: EnginePart, fd: impl AsFd) -> io::Result<()> {
        self.hold.deposit_copy(Part::Engine(self.serial, part), fd)
    }
}

impl Drop for HeldEngine {
    fn drop(&mut self) {
        let serial = self.serial;
        self.hold.retain(|part| !matches!(part, Part::Engine(of, _) if of == serial));
    }
}

/// An engine of a restored session that must end before another one gets the rings.
#[derive(Debug)]
pub(crate) struct Leftover {
    pub(crate) process: EngineProcess,
    /// None: it has no channel to the stash any more.
    pub(crate) stash: Option<StashServer>,
    _held: HeldEngine,
}

/// What an engine is started with.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Name of the session.
    pub(crate) session: String,
    /// Name of its endpoint.
    pub(crate) endpoint: String,
    pub(crate) location: SourceLocation,
    pub(crate) config: EngineConfig,
    /// Generation of the configuration.
    pub(crate) generation: u64,
    /// How the previous engine ended.
    pub(crate) predecessor: Predecessor,
    /// Descriptors of the session that outlive the broker.
    pub(crate) hold: Hold,
    /// Fields of its stored configuration that this broker does not know.
    pub(crate) unknown: Arc<UnknownFields>,
}

/// Starts engines.
#[derive(Debug)]
pub(crate) struct Starter {
    spawner: Spawner,
    sockets: PathBuf,
    cgroups: Cgroups,
    pub(crate) sources: Sources,
    pub(crate) queue: Arc<StartQueue>,
    /// Number of the next engine, and of its short-lived socket.
    serial: AtomicU64,
    preflights: Mutex<Preflights>,
    preflight_ended: Condvar,
}

/// Preflights by directory.
#[derive(Debug, Default)]
struct Preflights {
    /// Running ones, and when they began.
    running: HashMap<SourceLocation, Instant>,
    /// Sources on which none may start until then, in any directory: they are released.
    barred: HashMap<PathBuf, Instant>,
}

/// A process that has received its first message.
struct Begun {
    process: EngineProcess,
    control: PacketChannel,
    log: EngineLog,
    limits: Limits,
    /// Limits that are not active.
    findings: Vec<Finding>,
}

impl Starter {
    /// `sockets`: a directory that only the broker can enter.
    pub(crate) fn new(
        spawner: Spawner,
        sockets: PathBuf,
        cgroups: Cgroups,
        sources: Sources,
        queue: Arc<StartQueue>,
    ) -> Self {
        Starter {
            spawner,
            sockets,
            cgroups,
            sources,
            queue,
            serial: AtomicU64::new(0),
            preflights: Mutex::default(),
            preflight_ended: Condvar::new(),
        }
    }

    /// Starts an engine. Blocks while the source hangs, so call it from a thread of its own.
    pub(crate) fn start(&self, job: &Job, persistent: &PersistentState) -> Result<Engine, Finding> {
        if persistent.kill_switch.is_thrown() {
            return Err(not_started(&io::Error::other("its session has ended")));
        }
        job.unknown.check()?;
        let source = open_source(&job.location, &self.sources)?;
        let mounted_at = MountPoint::of(&source);
        mount_point::check(persistent.mounted_at().as_ref(), mounted_at.as_ref())?;
        let serial = self.serial.fetch_add(1, Relaxed);
        let held = HeldEngine::new(job.hold.clone(), serial);
        let (listener, connection) = self.connected_pair(serial).map_err(|error| not_started(&error))?;
        let (stash_channel, engine_stash) = bounded_pair().map_err(|error| not_started(&error))?;
        let first = ToEngine::Start {
            version: Versions::OURS.oldest,
            newest: Some(Versions::OURS.newest),
            session: job.session.clone(),
            config: job.config.clone(),
            predecessor: job.predecessor,
        };
        let fds = [
            source.as_fd(),
            listener.as_fd(),
            persistent.counter_page.as_fd(),
            persistent.ledger.as_fd(),
            engine_stash.as_fd(),
            persistent.trace_file.as_fd(),
        ];
        held.deposit(EnginePart::FrontEnd, &connection)
            .and_then(|()| held.deposit(EnginePart::Stash, &stash_channel))
            .map_err(|error| not_started(&error))?;
        let purpose = Purpose::Endpoint(job.endpoint.clone());
        let group = persistent.group_or(|| self.cgroups.new_session_group());
        let mut begun = self.begin(purpose, &job.config, &first, &fds, Some((&held, group)))?;
        if let Some(pidfd) = begun.process.pidfd() {
            persistent.kill_switch.add(pidfd).map_err(|error| not_started(&error))?;
        }
        // The engine has this end. If it stayed open here, the stash server would not see the engine exit.
        drop(engine_stash);
        let stash = StashServer::start(persistent.stash.clone(), stash_channel).map_err(|error| not_started(&error))?;
        let (preflight, version) = begun.await_ready(&job.session)?;
        let front_end = FrontEnd::new(connection, MESSAGE_DEADLINE).map_err(|error| not_started(&error))?;
        let Begun { process, control, log, .. } = begun;
        persistent.set_mounted_at(mounted_at);
        let (config, generation, binary) = (job.config.clone(), job.generation, process.binary());
        let root = Root::of(&source).ok();
        Ok(Engine {
            process,
            control,
            front_end,
            log,
            version,
            config,
            binary,
            preflight,
            root,
            generation,
            stash,
            held,
        })
    }

    /// Runs a preflight, one at a time on each directory. A hung source blocks the first caller for twice
    /// [`START_DEADLINE`]; later callers are refused at once while that preflight is stuck.
    pub(crate) fn preflight(
        self: &Arc<Self>,
        location: &SourceLocation,
        config: &EngineConfig,
    ) -> Result<Preflight, Finding> {
        self.begin_preflight(location)?;
        let (starter, tried, config) = (self.clone(), location.clone(), config.clone());
        let result = aside("preflight", 2 * START_DEADLINE, move || {
            let result = starter.run_preflight(&tried, config);
            starter.end_preflight(&tried);
            result
        });
        match result {
            Ok(result) => result.unwrap_or_else(|| Err(hung(&location.path()))),
            Err(error) => {
                self.end_preflight(location);
                Err(not_started(&error))
            }
        }
    }

    /// Checks that the directory exists, and that its file system is mounted where it was. Takes at most
    /// [`START_DEADLINE`].
    pub(crate) fn check_source(
        &self,
        location: &SourceLocation,
        mounted_at: Option<MountPoint>,
    ) -> Result<(), Finding> {
        let (sources, checked) = (self.sources.clone(), location.clone());
        let check = aside("source-check", START_DEADLINE, move || {
            let source = open_source(&checked, &sources)?;
            mount_point::check(mounted_at.as_ref(), MountPoint::of(&source).as_ref())
        });
        check.map_err(|error| not_started(&error))?.unwrap_or_else(|| Err(hung(&location.path())))
    }

    fn preflights(&self) -> MutexGuard<'_, Preflights> {
        self.preflights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_preflight(&self, location: &SourceLocation) -> Result<(), Finding> {
        let mut preflights = self.preflights();
        loop {
            let now = Instant::now();
            preflights.barred.retain(|_, until| *until > now);
            if preflights.barred.contains_key(&location.source) {
                return Err(released(&location.path()));
            }
            let Some(since) = preflights.running.get(location).copied() else {
                preflights.running.insert(location.clone(), now);
                return Ok(());
            };
            // Another preflight runs on it. Wait, unless it has run for too long.
            let left = HUNG_PREFLIGHT.saturating_sub(now.saturating_duration_since(since));
            if left.is_zero() {
                return Err(hung(&location.path()));
            }
            let waited = self.preflight_ended.wait_timeout(preflights, left);
            preflights = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn end_preflight(&self, location: &SourceLocation) {
        self.preflights().running.remove(location);
        self.preflight_ended.notify_all();
    }

    /// Prevents new preflights on this source until then.
    pub(crate) fn bar_preflights(&self, location: &SourceLocation, until: Instant) {
        self.preflights().barred.insert(location.source.clone(), until);
    }

    /// Undoes [`Starter::bar_preflights`].
    pub(crate) fn unbar_preflights(&self, location: &SourceLocation) {
        self.preflights().barred.remove(&location.source);
    }

    /// Numbers further engines from this on.
    pub(crate) fn number_engines_from(&self, serial: u64) {
        self.serial.fetch_max(serial, Relaxed);
    }

    /// Waits until no preflight runs on this directory, at most this long. Returns true if none does.
    pub(crate) fn wait_for_preflight(&self, location: &SourceLocation, longest: Duration) -> bool {
        let running = |preflights: &mut Preflights| preflights.running.contains_key(location);
        let waited = self.preflight_ended.wait_timeout_while(self.preflights(), longest, running);
        !waited.unwrap_or_else(PoisonError::into_inner).0.running.contains_key(location)
    }

    fn run_preflight(&self, location: &SourceLocation, config: EngineConfig) -> Result<Preflight, Finding> {
        let source = open_source(location, &self.sources)?;
        self.try_on(&source, &location.path(), config)
    }

    /// Starts an engine on an open directory, waits until it is in its sandbox, and ends it.
    pub(crate) fn try_on(&self, source: impl AsFd, path: &Path, config: EngineConfig) -> Result<Preflight, Finding> {
        let Versions { oldest, newest } = Versions::OURS;
        let first = ToEngine::Preflight { version: oldest, newest: Some(newest), config: config.clone() };
        let mut begun = self.begin(Purpose::Preflight(path.into()), &config, &first, &[source.as_fd()], None)?;
        begun.await_ready("preflight").map(|(preflight, _)| preflight)
    }

    /// Gives an engine of an earlier broker its limits again.
    pub(crate) fn renew_limits(&self, engine: &mut Engine) {
        let Engine { process, preflight, .. } = engine;
        let lost = limits::renew(&mut preflight.limits, process.groups(), &self.cgroups);
        preflight.findings.extend(lost);
    }

    /// The control group of a session that began under an earlier broker.
    pub(crate) fn restored_group(&self, path: &Path) -> Option<SessionGroup> {
        self.cgroups.restored_session_group(path)
    }

    /// Spawns a process, sets its limits and sends the first message. The first descriptor is the source. `session`: what
    /// the engine of a session has besides.
    fn begin(
        &self,
        purpose: Purpose,
        config: &EngineConfig,
        first: &ToEngine,
        fds: &[BorrowedFd<'_>],
        session: Option<(&HeldEngine, Option<Arc<SessionGroup>>)>,
    ) -> Result<Begun, Finding> {
        let (held, group) = session.unzip();
        let (ours, theirs) = bounded_pair().map_err(|error| not_started(&error))?;
        let (log, output) = log::pipe().map_err(|error| not_started(&error))?;
        // What the engine's sandbox does with this configuration.
        let user_namespace = !geteuid().is_root() && matches!(config.sandbox, Sandbox::Auto | Sandbox::Namespace);
        let spawned = self.spawner.spawn(purpose, theirs.into(), output, user_namespace);
        let mut process = spawned.map_err(|error| not_started(&error))?;
        if let Some(held) = held {
            // Before it receives anything: an engine that serves is always held.
            let pidfd = process.pidfd().ok_or_else(|| not_started(&io::ErrorKind::NotFound.into()))?;
            held.deposit(EnginePart::Process, pidfd)
                .and_then(|()| held.deposit(EnginePart::Control, &ours))
                .and_then(|()| log.fd().map_or(Ok(()), |fd| held.deposit(EnginePart::Log, fd)))
                .map_err(|error| not_started(&error))?;
        }
        let Applied { limits, findings, groups } =
            limits::apply(&config.limits, process.pid(), fds[0], &self.cgroups, group.flatten());
        process.set_groups(groups);
        let mut begun = Begun { process, control: ours, log, limits, findings };
        // It fails only if the other end is closed, and there the reason is sent by how it ended.
        match begun.control.send(first, fds) {
            Ok(()) => Ok(begun),
            Err(_) => Err(begun.exit_finding("start")),
        }
    }

    /// Creates a listening socket, and a connection to it that waits to be accepted.
    fn connected_pair(&self, serial: u64) -> io::Result<(OwnedFd, UnixStream)> {
        let name = serial.to_string();
        let directory = std::fs::File::open(&self.sockets)?;
        let path = crate::listen::path_below(directory.as_fd(), name.as_ref());
        // A broker that was killed at this point may have left one.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let connection = UnixStream::connect(&path);
        std::fs::remove_file(&path)?;
        Ok((listener.into(), connection?))
    }
}

/// Runs something that may hang in a thread, and waits for it at most this long; none: it still runs.
fn aside<T: Send + 'static>(
    name: &str,
    longest: Duration,
    act: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Option<T>> {
    let (answer, answered) = mpsc::channel();
    thread::Builder::new().name(name.into()).spawn(move || {
        // The receiver is gone if the deadline has passed.
        let _ = answer.send(act());
    })?;
    Ok(answered.recv_timeout(longest).ok())
}

/// Creates a channel to an engine. Sends have a deadline, so that an engine that does not read cannot block the broker.
fn bounded_pair() -> io::Result<(PacketChannel, PacketChannel)> {
    let (ours, theirs) = PacketChannel::pair()?;
    rustix::net::sockopt::set_socket_timeout(&ours, rustix::net::sockopt::Timeout::Send, Some(MESSAGE_DEADLINE))?;
    Ok((ours, theirs))
}

impl Leftover {
    pub(crate) fn new(process: EngineProcess, stash: Option<StashServer>, held: HeldEngine) -> Self {
        Leftover { process, stash, _held: held }
    }
}

/// Shuts the control channel of an engine down, for all who have it. The engine then ends by itself.
pub(crate) fn hang_up(control: impl AsFd) {
    // It fails only if it is shut down already.
    let _ = rustix::net::shutdown(control, rustix::net::Shutdown::Both);
}

impl Engine {
    /// Sends SIGKILL. An engine that is out of reach ends by itself instead, unless it is stuck.
    pub(crate) fn kill(&self) {
        if self.process.is_within_reach() {
            self.process.kill();
        } else {
            hang_up(&self.control);
        }
    }

    /// An engine that an earlier broker started, and that still serves. `parts`: its descriptors.
    ///
    /// # Errors
    /// The process, which must be killed: a descriptor is missing.
    pub(crate) fn restored(
        process: EngineProcess,
        stored: &StoredEngine,
        parts: &mut BTreeMap<EnginePart, Arc<OwnedFd>>,
        persistent: &PersistentState,
        held: HeldEngine,
    ) -> Result<Engine, Box<Leftover>> {
        let mut take = |part: EnginePart| {
            let fd = parts.remove(&part).ok_or_else(|| missing(Part::Engine(stored.serial, part)))?;
            fd.try_clone()
        };
        let mut channels = || {
            let control = PacketChannel::from_fd(take(EnginePart::Control)?);
            let front_end = FrontEnd::new(UnixStream::from(take(EnginePart::FrontEnd)?), MESSAGE_DEADLINE)?;
            let stash_channel = PacketChannel::from_fd(take(EnginePart::Stash)?);
            let log = EngineLog::restored(take(EnginePart::Log).ok());
            let stash = StashServer::start(persistent.stash.clone(), stash_channel)?;
            Ok::<_, io::Error>((control, front_end, log, stash))
        };
        let (control, front_end, log, stash) = match channels() {
            Ok(channels) => channels,
            Err(error) => {
                tracing::error!(engine_pid = process.pid(), %error, "engine not usable");
                return Err(Box::new(Leftover::new(process, None, held)));
            }
        };
        let StoredEngine { version, config, generation, preflight, binary, root, .. } = stored.clone();
        let root = root.map(Root::from);
        Ok(Engine {
            process,
            control,
            front_end,
            log,
            version,
            config,
            binary,
            preflight,
            root,
            generation,
            stash,
            held,
        })
    }

    /// The finding for an engine that has exited.
    pub(crate) fn exit_finding(&mut self, session: &str) -> Finding {
        let ended = self.process.ended_within(EXIT_DEADLINE);
        self.log.drain(session);
        exited(&self.process, &self.log, ended)
    }

    /// The last line that the engine logged, as the end of a message. Does not wait.
    pub(crate) fn last_line(&mut self, session: &str) -> String {
        self.log.drain(session);
        self.log.ending()
    }
}

impl Begun {
    /// Waits for the engine's first message. Returns the version of the messages too.
    fn await_ready(&mut self, session: &str) -> Result<(Preflight, u32), Finding> {
        let end = Instant::now() + START_DEADLINE;
        loop {
            let log = self.log.fd();
            let interests = [Interest::of(&self.control), Interest::maybe(log.as_ref())];
            let [message, logged] = wait_readable(&interests, Some(end)).map_err(|error| not_started(&error))?;
            if logged {
                self.log.drain(session);
            }
            if message {
                return self.first_message(session);
            }
            if !logged {
                return Err(finding(
                    Reason::EngineFailed,
                    format!("the engine was not ready within {} s", START_DEADLINE.as_secs()),
                    "see whether the source's file system answers; see the engine's log lines",
                ));
            }
        }
    }

    fn first_message(&mut self, session: &str) -> Result<(Preflight, u32), Finding> {
        match self.control.receive::<FromEngine>() {
            Ok((FromEngine::Ready { preflight, version }, _)) => {
                Ok((self.with_limits(preflight), version.unwrap_or(Versions::OURS.oldest)))
            }
            Ok((FromEngine::Failed { finding }, _)) => Err(finding),
            Ok((other, _)) => Err(not_started(&io::Error::other(format!("unexpected first message {other:?}")))),
            Err(_) => Err(self.exit_finding(session)),
        }
    }

    /// Adds the active limits, which the engine does not know, to its preflight.
    fn with_limits(&mut self, mut preflight: Preflight) -> Preflight {
        preflight.limits = std::mem::take(&mut self.limits);
        preflight.findings.append(&mut self.findings);
        preflight.findings.extend(limits::recheck(&mut preflight.limits, self.process.pid()));
        preflight
    }

    fn exit_finding(&mut self, session: &str) -> Finding {
        // Its last log lines may arrive after it has closed the channel.
        let ended = self.process.ended_within(EXIT_DEADLINE);
        self.log.drain(session);
        exited(&self.process, &self.log, ended)
    }
}

/// The finding for an engine that has exited.
fn exited(process: &EngineProcess, log: &EngineLog, ended: Option<String>) -> Finding {
    let how = ended.unwrap_or_else(|| "it closed its control channel".into());
    let last_line = log.ending();
    finding(
        Reason::EngineFailed,
        format!("engine (process {}) exited: {how}{last_line}", process.pid()),
        "see the engine's log lines above",
    )
}

/// The finding for an engine that could not be started.
pub(crate) fn not_started(error: &io::Error) -> Finding {
    finding(
        Reason::EngineFailed,
        format!("the engine could not be started: {error}"),
        "install virtiofs-engine beside virtiofs-broker or name it with --engine, and check the limits of \
         processes and open files",
    )
}

/// The finding for a source that does not respond.
pub(crate) fn hung(source: &Path) -> Finding {
    finding(
        Reason::SourceUnreadable,
        format!("source {} does not respond", source.display()),
        "check its file system (the server of a network file system may be down); it is tried again",
    )
}
