//! The broker process, from its configuration to its end.

use std::io;
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
use crate::runtime_dir::{RuntimeDir, RuntimeDirError};
use crate::session_list::SessionList;
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
    /// The kubelet's directory, which no source may overlap.
    pub kubelet_dir: Option<PathBuf>,
    /// Who holds the descriptors of sessions while no broker runs.
    pub holder: HolderChoice,
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
pub fn run(config: &Config) -> Result<(), RunError> {
    let signals = block_ending_signals()?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    limits::raise_open_files();
    interrupt::install()?;
    let engine = find_engine(&config.engine)?;
    let runtime_dir = RuntimeDir::take(&config.runtime_dir)?;
    // After the lock: no other broker uses what is held.
    let (holder, mut held) = Holder::connect(&config.holder)?;
    let processes = Arc::new(ProcessTable::default());
    let spawner = Spawner::start(engine, processes.clone(), holder.is_present())?;
    let sources = sources(config, &runtime_dir);
    let queue = StartQueue::start()?;
    let starter = Arc::new(Starter::new(spawner, runtime_dir.engine_sockets(), Cgroups::find(), sources, queue));
    let broker = start_broker(starter, processes, holder, &mut held, &runtime_dir)?;
    let control = bind_control(&runtime_dir)?;
    control::serve(control.listener().try_clone()?, broker.clone())?;
    tracing::info!(runtime_dir = %runtime_dir.path().display(), pid = std::process::id(), "broker ready");
    let signal = signals.wait().map_err(io::Error::from)?;
    tracing::info!(signal = signal.as_str(), "broker ends");
    control.unlink();
    if config.holder == HolderChoice::Nobody {
        broker.shut_down();
    } else {
        broker.leave();
        tracing::info!("sessions continue; the next broker takes them over");
    }
    Ok(())
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

fn sources(config: &Config, runtime_dir: &RuntimeDir) -> Sources {
    let mut reserved = vec![("the runtime directory", runtime_dir.path().to_path_buf())];
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

/// Blocks the signals before the first thread starts, so that only the waiting thread receives them.
fn block_ending_signals() -> io::Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    Ok(signals)
}

fn bind_control(runtime_dir: &RuntimeDir) -> Result<BoundSocket, RunError> {
    let path = runtime_dir.control_socket();
    let spec = SocketSpec { path, owner: None, group: None, mode: 0o600 };
    BoundSocket::bind(&spec).map_err(|error| RunError::ControlSocket(error.into()))
}
