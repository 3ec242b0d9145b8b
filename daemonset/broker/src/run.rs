//! The broker process, from its configuration to its end.

use std::io;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};
use rustix::fs::Mode;
use thiserror::Error;
use virtiofs_contract::control::SocketSpec;

use crate::broker::Broker;
use crate::control;
use crate::endpoint::host::Host;
use crate::endpoint::supervisor::Supervisor;
use crate::engine::limits::cgroup::Cgroups;
use crate::engine::process::{ProcessTable, Spawner};
use crate::engine::source::Sources;
use crate::engine::start::Starter;
use crate::engine::start_queue::StartQueue;
use crate::holder::names::{Group, Part};
use crate::holder::{Held, Holder, HolderChoice, HolderError};
use crate::interrupt;
use crate::limits;
use crate::listen::BoundSocket;
use crate::readiness::{Readiness, Role};
use crate::runtime_dir::{RuntimeDir, RuntimeDirError, UnlockedDir};
use crate::session_list::SessionList;
use crate::standby::{StandbyError, Trial, stand_by};
use crate::state_file::StateFileError;
use crate::store::Store;

/// Configuration of the broker.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory for its sockets and its lock.
    pub runtime_dir: PathBuf,
    /// The engine's binary.
    pub engine: PathBuf,
    /// Directory below which source paths are resolved; `/` outside of a container.
    pub source_root: PathBuf,
    /// Directories that sources must be in. Empty: any directory, or none if the root is not `/`.
    pub allowed_sources: Vec<PathBuf>,
    /// True if a source may contain the runtime directory.
    pub shared_runtime_dir: bool,
    /// The kubelet's directory, which no source may overlap.
    pub kubelet_dir: Option<PathBuf>,
    /// Who holds the descriptors of sessions while no broker runs.
    pub holder: HolderChoice,
    /// If another broker has the runtime directory: wait until it ends. Needs a keeper.
    pub stand_by: bool,
    /// File that says whether this broker is ready.
    pub ready_file: Option<PathBuf>,
}

/// How the broker ended.
#[derive(Debug)]
pub enum End {
    /// Nothing is left to do.
    Over,
    /// Its engines end with this process, and another broker stands by that replaces them. It takes over once this lock is
    /// released: call [`become_waiting`](crate::become_waiting) while it is held.
    EnginesServe(RuntimeDir),
}

/// Why the broker cannot run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The runtime directory cannot be used.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// The control socket cannot be created.
    #[error("control socket: {0}")]
    ControlSocket(Box<dyn std::error::Error + Send + Sync>),
    /// The engine's binary cannot be used.
    #[error("engine {path}: {error}")]
    Engine {
        /// Its path.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
    /// The holder of descriptors cannot be used.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// This broker cannot stand by.
    #[error(transparent)]
    Standby(#[from] StandbyError),
    /// The state of this broker cannot be recorded.
    #[error("state: {0}")]
    State(Box<dyn std::error::Error + Send + Sync>),
    /// A thread or a signal mask could not be set up.
    #[error("set-up: {0}")]
    SetUp(io::Error),
}

from_cause!(RunError::SetUp(io::Error));

/// Runs the broker until SIGTERM or SIGINT. With a holder, sessions continue and the next broker takes them over. Without
/// one, the broker removes its sockets and ends its engines.
///
/// `signals`: those of [`block_ending_signals`].
pub fn run(config: &Config, signals: &SigSet) -> Result<End, RunError> {
    rustix::process::umask(Mode::from_raw_mode(0o077));
    limits::raise_open_files();
    interrupt::install()?;
    let engine = find_engine(&config.engine)?;
    let readiness = Arc::new(Readiness::start(config.ready_file.clone()));
    let Some(runtime_dir) = take_lock(config, &engine, signals, &readiness)? else { return Ok(End::Over) };
    // The kernel releases the lock when this process ends: until then its threads may act.
    let runtime_dir = ManuallyDrop::new(runtime_dir);
    // After the lock: no other broker uses what is held.
    let (holder, mut held) = Holder::connect(&config.holder)?;
    let processes = Arc::new(ProcessTable::default());
    let spawner = Spawner::start(engine, processes.clone(), holder.is_present())?;
    let sources = sources(config, runtime_dir.path());
    let queue = StartQueue::start()?;
    let starter = Arc::new(Starter::new(spawner, runtime_dir.engine_sockets(), Cgroups::find(), sources, queue));
    let broker = start_broker(starter, processes, holder, &mut held, &runtime_dir)?;
    let control = bind_control(&runtime_dir)?;
    control::serve(control.listener().try_clone()?, broker.clone())?;
    readiness.set_role(Role::Serving);
    tracing::info!(runtime_dir = %runtime_dir.path().display(), pid = std::process::id(), "broker ready");
    let signal = signals.wait().map_err(io::Error::from)?;
    tracing::info!(signal = signal.as_str(), "broker ends");
    control.unlink();
    if config.holder == HolderChoice::Nobody {
        broker.shut_down();
        return Ok(End::Over);
    }
    broker.leave();
    tracing::info!("sessions continue; the next broker takes them over");
    // The kernel ends all processes of a container with its first one.
    let ends_engines = rustix::process::getpid().is_init();
    let hands_over = ends_engines && runtime_dir.has_standby();
    Ok(if hands_over { End::EnginesServe(ManuallyDrop::into_inner(runtime_dir)) } else { End::Over })
}

/// Takes the runtime directory, and stands by if another broker has it; none: this one is to end.
fn take_lock(
    config: &Config,
    engine: &Path,
    signals: &SigSet,
    readiness: &Arc<Readiness>,
) -> Result<Option<RuntimeDir>, RunError> {
    let directory = UnlockedDir::open(&config.runtime_dir)?;
    match (directory.lock_at_start(), &config.holder) {
        (Err(RuntimeDirError::Held { .. }), HolderChoice::Keeper(keeper)) if config.stand_by => {
            let spawner = Spawner::start(engine.into(), Arc::default(), false)?;
            let sources = sources(config, directory.path());
            // It needs no sockets, and the control groups are those of the broker that serves.
            let starter = Starter::new(spawner, PathBuf::new(), Cgroups::default(), sources, StartQueue::start()?);
            let runtime_dir = directory.path().into();
            let trial = Trial { starter: Arc::new(starter), keeper: keeper.clone(), runtime_dir };
            Ok(stand_by(&directory, signals, trial, readiness)?)
        }
        (taken, _) => Ok(Some(taken?)),
    }
}

fn start_broker(
    starter: Arc<Starter>,
    processes: Arc<ProcessTable>,
    holder: Holder,
    held: &mut Held,
    runtime_dir: &RuntimeDir,
) -> Result<Arc<Broker>, RunError> {
    let failed = |error: StateFileError| RunError::State(error.into());
    let mut parts = held.groups.remove(&Group::Broker).unwrap_or_default();
    let store = Store::open(holder.group(Group::Broker), parts.remove(&Part::Store)).map_err(failed)?;
    let (list, listed) = SessionList::open(runtime_dir.session_list());
    let supervisor = Supervisor::start()?;
    let host = Host::new(starter, processes, holder, list, supervisor, &mut parts).map_err(failed)?;
    Ok(Broker::new(Arc::new(host), store, std::mem::take(held), &listed))
}

fn sources(config: &Config, runtime_dir: &Path) -> Sources {
    let mut reserved = Vec::new();
    if !config.shared_runtime_dir {
        reserved.push(("the runtime directory", runtime_dir.to_path_buf()));
    }
    for path in config.kubelet_dir.iter() {
        // The path as given, and the one it resolves to.
        reserved.push(("the kubelet's directory", path.clone()));
        reserved.extend(path.canonicalize().ok().map(|path| ("the kubelet's directory", path)));
    }
    Sources { root: config.source_root.clone(), allowed: config.allowed_sources.clone(), reserved }
}

/// Keeps the path unresolved, so that the next engine is started from a binary that replaced this one.
fn find_engine(path: &Path) -> Result<PathBuf, RunError> {
    let found = path.metadata().and_then(|_| std::path::absolute(path));
    found.map_err(|error| RunError::Engine { path: path.into(), error })
}

/// Blocks the signals that end a broker. Call it before the first thread starts, that of the log included, so that no thread
/// receives them by itself.
pub fn block_ending_signals() -> io::Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    Ok(signals)
}

fn bind_control(runtime_dir: &RuntimeDir) -> Result<BoundSocket, RunError> {
    let path = runtime_dir.control_socket();
    let spec = SocketSpec { path, owner: None, group: None, mode: 0o600 };
    BoundSocket::bind(&spec).map_err(|error| RunError::ControlSocket(error.into()))
}
