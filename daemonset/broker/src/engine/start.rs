//! From a configuration to an engine that is ready, or to a finding that says what would help.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use virtiofs_config::{EngineConfig, Limits};
use virtiofs_contract::VERSION;
use virtiofs_contract::channel::PacketChannel;
use virtiofs_contract::control::EngineBinary;
use virtiofs_contract::engine::{FromEngine, Predecessor, ToEngine};
use virtiofs_contract::preflight::{Finding, Preflight, Reason};

use super::finding;
use super::limits::cgroup::Cgroups;
use super::limits::{self, Applied};
use super::log::{self, EngineLog};
use super::mount_point::{self, MountPoint};
use super::process::{EngineProcess, Purpose, Spawner};
use super::root::Root;
use super::source::{Place, Sources, open_source};
use crate::poll::{Interest, wait_readable};
use crate::session::estate::Estate;
use crate::session::parking::Attendant;
use crate::vhost_user::front_end::FrontEnd;

/// How long an engine may take until it is ready, or a trial until it is over: sandbox, trying file handles on
/// every file system of the share.
pub(crate) const START_DEADLINE: Duration = Duration::from_secs(10);

/// A trial takes some hundredths of a second; one that has been under way for longer than this hangs, as far as others
/// are concerned that want to try something on the same directory.
const ORDINARY_TRIAL: Duration = Duration::from_secs(2);

/// How long an engine may take for one vhost-user message: the longest is mapping the guest's memory.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);

/// How long a dead engine's exit status is waited for.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// An engine that is in its sandbox and waits for vhost-user messages.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) process: EngineProcess,
    pub(crate) control: PacketChannel,
    pub(crate) front_end: FrontEnd,
    pub(crate) log: EngineLog,
    pub(crate) config: EngineConfig,
    pub(crate) binary: Option<EngineBinary>,
    pub(crate) preflight: Preflight,
    /// The directory that it was handed; none: the kernel would not say.
    pub(crate) root: Option<Root>,
    /// [`Job::epoch`].
    pub(crate) epoch: u64,
    pub(crate) parking: Attendant,
}

/// What an engine is to be started for.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Name of the session.
    pub(crate) session: String,
    /// Name of its endpoint.
    pub(crate) endpoint: String,
    pub(crate) place: Place,
    pub(crate) config: EngineConfig,
    /// Which wish of the session's this engine fulfils; a later one makes it out of date.
    pub(crate) epoch: u64,
    /// How the engine before it came to its end.
    pub(crate) predecessor: Predecessor,
}

/// Starts engines.
#[derive(Debug)]
pub(crate) struct Starter {
    spawner: Spawner,
    sockets: PathBuf,
    cgroups: Cgroups,
    pub(crate) sources: Sources,
    serial: AtomicU64,
    trials: Mutex<Trials>,
    trial_ended: Condvar,
}

/// Trials on directories.
#[derive(Debug, Default)]
struct Trials {
    /// Those that have not come back yet, and when they began.
    under_way: HashMap<Place, Instant>,
    /// Sources on which there must be none until then, at whatever directory: they are released.
    barred: HashMap<PathBuf, Instant>,
}

/// A process that has been given its first message.
struct Begun {
    process: EngineProcess,
    control: PacketChannel,
    log: EngineLog,
    limits: Limits,
    /// What of its limits is not in force.
    findings: Vec<Finding>,
}

impl Starter {
    /// `sockets` is a directory that nobody else can enter.
    pub(crate) fn new(spawner: Spawner, sockets: PathBuf, cgroups: Cgroups, sources: Sources) -> Self {
        Starter {
            spawner,
            sockets,
            cgroups,
            sources,
            serial: AtomicU64::new(0),
            trials: Mutex::default(),
            trial_ended: Condvar::new(),
        }
    }

    /// Starts an engine. Blocks as long as the source does: to be called from a thread that may.
    pub(crate) fn start(&self, job: &Job, estate: &Estate) -> Result<Engine, Finding> {
        let source = open_source(&job.place, &self.sources)?;
        let mounted_at = MountPoint::of(&source);
        mount_point::check(estate.mounted_at().as_ref(), mounted_at.as_ref())?;
        let (listener, connection) = self.connected_pair().map_err(|error| not_started(&error))?;
        let (lot, parking) = bounded_pair().map_err(|error| not_started(&error))?;
        let first = ToEngine::Start {
            version: VERSION,
            session: job.session.clone(),
            config: job.config.clone(),
            predecessor: job.predecessor,
        };
        let fds = [
            source.as_fd(),
            listener.as_fd(),
            estate.counter_page.as_fd(),
            estate.ledger.as_fd(),
            parking.as_fd(),
            estate.trace_file.as_fd(),
        ];
        let mut begun = self.begin(Purpose::Endpoint(job.endpoint.clone()), &job.config.limits, &first, &fds)?;
        // The engine has its end; were ours left open, the attendant would never see the engine go.
        drop(parking);
        let parking = Attendant::start(estate.parking.clone(), lot).map_err(|error| not_started(&error))?;
        let preflight = begun.verdict(&job.session)?;
        let front_end = FrontEnd::new(connection, MESSAGE_DEADLINE).map_err(|error| not_started(&error))?;
        let Begun { process, control, log, .. } = begun;
        estate.was_mounted_at(mounted_at);
        let (config, epoch, binary) = (job.config.clone(), job.epoch, process.binary());
        let root = Root::of(&source).ok();
        Ok(Engine { process, control, front_end, log, config, binary, preflight, root, epoch, parking })
    }

    /// Tries a configuration on a source, one at a time on each. A source that hangs costs the caller [`START_DEADLINE`]
    /// once, and next to nothing while the trial before is still stuck in it.
    pub(crate) fn preflight(self: &Arc<Self>, place: &Place, config: &EngineConfig) -> Result<Preflight, Finding> {
        self.begin_trial(place)?;
        let (starter, tried, config) = (self.clone(), place.clone(), config.clone());
        let trial = aside("trial", 2 * START_DEADLINE, move || {
            let result = starter.try_out(&tried, config);
            starter.end_trial(&tried);
            result
        });
        match trial {
            Ok(result) => result.unwrap_or_else(|| Err(hung(&place.path()))),
            Err(error) => {
                self.end_trial(place);
                Err(not_started(&error))
            }
        }
    }

    /// Is the directory there, and if it was mounted somewhere, still or again? Costs no more than
    /// [`START_DEADLINE`], whatever the source does.
    pub(crate) fn look_at(&self, place: &Place, mounted_at: Option<MountPoint>) -> Result<(), Finding> {
        let (sources, looked_at) = (self.sources.clone(), place.clone());
        let look = aside("look", START_DEADLINE, move || {
            let source = open_source(&looked_at, &sources)?;
            mount_point::check(mounted_at.as_ref(), MountPoint::of(&source).as_ref())
        });
        look.map_err(|error| not_started(&error))?.unwrap_or_else(|| Err(hung(&place.path())))
    }

    fn trials(&self) -> MutexGuard<'_, Trials> {
        self.trials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_trial(&self, place: &Place) -> Result<(), Finding> {
        let mut trials = self.trials();
        loop {
            let now = Instant::now();
            trials.barred.retain(|_, until| *until > now);
            if trials.barred.contains_key(&place.source) {
                return Err(released(&place.path()));
            }
            let Some(since) = trials.under_way.get(place).copied() else {
                trials.under_way.insert(place.clone(), now);
                return Ok(());
            };
            // Somebody else is trying something on it: that is no sign of anything before it has taken long.
            let left = ORDINARY_TRIAL.saturating_sub(now.saturating_duration_since(since));
            if left.is_zero() {
                return Err(hung(&place.path()));
            }
            let waited = self.trial_ended.wait_timeout(trials, left);
            trials = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn end_trial(&self, place: &Place) {
        self.trials().under_way.remove(place);
        self.trial_ended.notify_all();
    }

    /// From now on until then there is no trial on this source but one that is under way.
    pub(crate) fn bar_trials(&self, place: &Place, until: Instant) {
        self.trials().barred.insert(place.source.clone(), until);
    }

    /// Undoes [`Starter::bar_trials`].
    pub(crate) fn unbar_trials(&self, place: &Place) {
        self.trials().barred.remove(&place.source);
    }

    /// Waits until no trial on this directory is under way, at most so long; says whether that is so.
    pub(crate) fn wait_for_trial(&self, place: &Place, longest: Duration) -> bool {
        let under_way = |trials: &mut Trials| trials.under_way.contains_key(place);
        let waited = self.trial_ended.wait_timeout_while(self.trials(), longest, under_way);
        !waited.unwrap_or_else(PoisonError::into_inner).0.under_way.contains_key(place)
    }

    fn try_out(&self, place: &Place, config: EngineConfig) -> Result<Preflight, Finding> {
        let source = open_source(place, &self.sources)?;
        let limits = config.limits.clone();
        let first = ToEngine::Preflight { version: VERSION, config };
        self.begin(Purpose::Trial(place.path()), &limits, &first, &[source.as_fd()])?.verdict("trial")
    }

    /// Starts a process, limits it, and gives it its first message. The source comes first beside that.
    fn begin(
        &self,
        purpose: Purpose,
        wanted: &Limits,
        first: &ToEngine,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Begun, Finding> {
        let (ours, theirs) = bounded_pair().map_err(|error| not_started(&error))?;
        let (log, output) = log::pipe().map_err(|error| not_started(&error))?;
        let mut process = self.spawner.spawn(purpose, theirs.into(), output).map_err(|error| not_started(&error))?;
        let Applied { limits, findings, groups } = limits::apply(wanted, process.pid(), fds[0], &self.cgroups);
        process.keep(groups);
        let mut begun = Begun { process, control: ours, log, limits, findings };
        // It fails only if the other end is closed, and there the reason is told by how it ended.
        match begun.control.send(first, fds) {
            Ok(()) => Ok(begun),
            Err(_) => Err(begun.last_words("start")),
        }
    }

    /// A listening socket, and a connection to it that waits to be accepted.
    fn connected_pair(&self) -> io::Result<(OwnedFd, UnixStream)> {
        let name = self.serial.fetch_add(1, Relaxed).to_string();
        let directory = std::fs::File::open(&self.sockets)?;
        let path = crate::listen::path_below(directory.as_fd(), name.as_ref());
        // One may be left by a broker that was killed at this point.
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

/// Has something done that may hang, and waits for it so long; none: it still hangs.
fn aside<T: Send + 'static>(
    name: &str,
    longest: Duration,
    act: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Option<T>> {
    let (answer, answered) = mpsc::channel();
    thread::Builder::new().name(name.into()).spawn(move || {
        // Nobody waits any more if the deadline has passed.
        let _ = answer.send(act());
    })?;
    Ok(answered.recv_timeout(longest).ok())
}

/// A channel to an engine. What is sent there is small: an engine that reads nothing must not hold us up for ever.
fn bounded_pair() -> io::Result<(PacketChannel, PacketChannel)> {
    let (ours, theirs) = PacketChannel::pair()?;
    rustix::net::sockopt::set_socket_timeout(&ours, rustix::net::sockopt::Timeout::Send, Some(MESSAGE_DEADLINE))?;
    Ok((ours, theirs))
}

impl Engine {
    /// The finding for this engine's end.
    pub(crate) fn last_words(&mut self, session: &str) -> Finding {
        let ended = self.process.ended_within(LAST_WORDS);
        self.log.drain(session);
        died(&self.process, &self.log, ended)
    }

    /// What this engine printed last, as the end of a sentence. Nothing is waited for.
    pub(crate) fn parting_words(&mut self, session: &str) -> String {
        self.log.drain(session);
        words(&self.log)
    }
}

impl Begun {
    /// Waits for the engine's first word.
    fn verdict(&mut self, session: &str) -> Result<Preflight, Finding> {
        let end = Instant::now() + START_DEADLINE;
        loop {
            let log = self.log.fd();
            let interests = [Interest::of(&self.control), Interest::maybe(log.as_ref())];
            let [spoke, printed] = wait_readable(&interests, Some(end)).map_err(|error| not_started(&error))?;
            if printed {
                self.log.drain(session);
            }
            if spoke {
                return self.first_word(session);
            }
            if !printed {
                return Err(finding(
                    Reason::EngineFailed,
                    format!("the engine was not ready within {} s", START_DEADLINE.as_secs()),
                    "see whether the source's file system answers; see the engine's log lines",
                ));
            }
        }
    }

    fn first_word(&mut self, session: &str) -> Result<Preflight, Finding> {
        match self.control.receive::<FromEngine>() {
            Ok((FromEngine::Ready { preflight }, _)) => Ok(self.with_limits(preflight)),
            Ok((FromEngine::Failed { finding }, _)) => Err(finding),
            Ok((other, _)) => Err(not_started(&io::Error::other(format!("it began with {other:?}")))),
            Err(_) => Err(self.last_words(session)),
        }
    }

    /// What the engine found, and what became of its limits, which it knows nothing of.
    fn with_limits(&mut self, mut preflight: Preflight) -> Preflight {
        preflight.limits = std::mem::take(&mut self.limits);
        preflight.findings.append(&mut self.findings);
        preflight
    }

    fn last_words(&mut self, session: &str) -> Finding {
        // What it printed last may come after it has closed the channel.
        let ended = self.process.ended_within(LAST_WORDS);
        self.log.drain(session);
        died(&self.process, &self.log, ended)
    }
}

/// The finding for an engine that is gone.
fn died(process: &EngineProcess, log: &EngineLog, ended: Option<String>) -> Finding {
    let how = ended.unwrap_or_else(|| "it closed its control channel".into());
    let words = words(log);
    finding(
        Reason::EngineFailed,
        format!("the engine (process {}) is gone: {how}{words}", process.pid()),
        "see the engine's log lines above",
    )
}

fn words(log: &EngineLog) -> String {
    match log.last_line() {
        "" => String::new(),
        line => format!("; its last words: {line}"),
    }
}

fn not_started(error: &io::Error) -> Finding {
    finding(
        Reason::EngineFailed,
        format!("the engine could not be started: {error}"),
        "see that virtiofs-engine lies beside virtiofs-broker or name it with --engine, and that processes and \
         open files are not at their limit",
    )
}

/// The finding for a source that is not to be touched.
fn released(source: &Path) -> Finding {
    finding(
        Reason::SourceReleased,
        format!("source {} is released, so that the host can unmount it", source.display()),
        "resume it, or wait until the time for which it was released is over",
    )
}

/// The finding for a source that does not answer.
pub(crate) fn hung(source: &Path) -> Finding {
    finding(
        Reason::SourceUnreadable,
        format!("source {} does not answer", source.display()),
        "see to the file system below it (a network file system whose server is gone?); it is tried again",
    )
}
