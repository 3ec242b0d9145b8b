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
use crate::engine::limits::cgroup::Cgroups;
use crate::engine::process::{ProcessTable, Spawner};
use crate::engine::source::Sources;
use crate::engine::start::Starter;
use crate::limits;
use crate::listen::BoundSocket;
use crate::runtime_dir::{RuntimeDir, RuntimeDirError};

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
    /// A thread or a signal mask could not be set up.
    #[error("set-up: {0}")]
    SetUp(io::Error),
}

from_cause!(RunError::SetUp(io::Error));

/// Runs the broker until SIGTERM or SIGINT. Then it removes its sockets and ends its engines.
pub fn run(config: &Config) -> Result<(), RunError> {
    let signals = block_ending_signals()?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    limits::raise_open_files();
    let engine = find_engine(&config.engine)?;
    let runtime_dir = RuntimeDir::take(&config.runtime_dir)?;
    let processes = Arc::new(ProcessTable::default());
    let spawner = Spawner::start(engine, processes.clone())?;
    let sources = sources(config, &runtime_dir);
    let starter = Arc::new(Starter::new(spawner, runtime_dir.engine_sockets(), Cgroups::find(), sources));
    let broker = Arc::new(Broker::new(starter, processes));
    let control = bind_control(&runtime_dir)?;
    control::serve(control.listener().try_clone()?, broker.clone())?;
    tracing::info!(runtime_dir = %runtime_dir.path().display(), pid = std::process::id(), "broker ready");
    let signal = signals.wait().map_err(io::Error::from)?;
    tracing::info!(signal = signal.as_str(), "broker ends");
    control.unlink();
    broker.shut_down();
    Ok(())
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
