//! The process: from its configuration to its end.

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
use crate::engine::process::{Population, Spawner};
use crate::engine::source::Sources;
use crate::engine::start::Starter;
use crate::limits;
use crate::listen::BoundSocket;
use crate::runtime_dir::{RuntimeDir, RuntimeDirError};

/// What the broker is told at its start.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory for its sockets and its lock.
    pub runtime_dir: PathBuf,
    /// The engine's binary.
    pub engine: PathBuf,
    /// The directory below which sources are looked for; `/` outside of a container.
    pub source_root: PathBuf,
    /// Directories in which sources may be; none: anywhere, or nowhere below another root than `/`.
    pub allowed_sources: Vec<PathBuf>,
    /// The kubelet's directory, which no source may overlap.
    pub kubelet_dir: Option<PathBuf>,
}

/// Why the broker cannot run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The runtime directory cannot be used.
    #[error("{0}")]
    RuntimeDir(#[from] RuntimeDirError),
    /// The control socket cannot be made.
    #[error("control socket: {0}")]
    ControlSocket(Box<dyn std::error::Error + Send + Sync>),
    /// The engine's binary is not there.
    #[error("engine {path}: {error}")]
    Engine {
        /// Where it was looked for.
        path: PathBuf,
        /// Why it cannot be used.
        error: io::Error,
    },
    /// A thread or a signal mask could not be set up.
    #[error("set-up: {0}")]
    SetUp(#[from] io::Error),
}

/// Runs the broker until SIGTERM or SIGINT; then nothing of it is left, sockets and engines included.
pub fn run(config: &Config) -> Result<(), RunError> {
    let signals = block_ending_signals()?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    limits::raise_open_files();
    let engine = find_engine(&config.engine)?;
    let runtime_dir = RuntimeDir::take(&config.runtime_dir)?;
    let population = Arc::new(Population::default());
    let spawner = Spawner::start(engine, population.clone())?;
    let sources = sources(config, &runtime_dir);
    let starter = Arc::new(Starter::new(spawner, runtime_dir.engine_sockets(), Cgroups::find(), sources));
    let broker = Arc::new(Broker::new(starter, population));
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
        // As it was named, and where it leads to.
        reserved.push(("the kubelet's directory", path.clone()));
        reserved.extend(path.canonicalize().ok().map(|path| ("the kubelet's directory", path)));
    }
    Sources { root: config.source_root.clone(), allowed: config.allowed_sources.clone(), reserved }
}

/// The path is kept as it is: what lies there when an engine is started is what is started, so that a new binary
/// is in force as soon as it is in place.
fn find_engine(path: &Path) -> Result<PathBuf, RunError> {
    let found = path.metadata().and_then(|_| std::path::absolute(path));
    found.map_err(|error| RunError::Engine { path: path.into(), error })
}

/// Blocked before the first thread starts, so that they reach the one that waits for them and no other.
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
