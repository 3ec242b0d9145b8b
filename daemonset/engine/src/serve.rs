//! From the first message to the last: prepare, answer, serve until the VMM or the broker leaves.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofs_contract::VERSION;
use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::config::EngineConfig;
use virtiofs_contract::counters::Counters;
use virtiofs_contract::engine::{FromEngine, ToEngine};
use virtiofs_contract::preflight::Finding;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::control;
use crate::device::{Device, RESUME_EVENT};
use crate::guard::Guard;
use crate::prepare::{Prepared, prepare};
use crate::seccomp;

/// Why an engine ends other than by its VMM's or broker's leaving.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    /// The broker is gone or speaks another language.
    #[error("control channel: {0}")]
    Control(#[from] ChannelError),
    /// The broker's first message was not one.
    #[error("the broker's first message must be Start or Preflight of version {VERSION}, with its descriptors")]
    Protocol,
    /// The configuration cannot be served here.
    #[error("{0}")]
    Refused(Finding),
    /// The counter page cannot be used.
    #[error("counter page: {0}")]
    Counters(io::Error),
    /// The system call filter was not accepted.
    #[error("system call filter: {0}")]
    Seccomp(#[from] seccomp::SeccompError),
    /// The library's file system did not start.
    #[error("file system: {0}")]
    FileSystem(io::Error),
    /// The vhost-user side failed.
    #[error("vhost-user: {0}")]
    VhostUser(vhost_user_backend::Error),
    /// A thread or an event descriptor could not be made.
    #[error("engine set-up: {0}")]
    SetUp(io::Error),
}

/// What arrives beside `Start`, in its order.
struct StartFds {
    source: OwnedFd,
    listener: OwnedFd,
    counters: OwnedFd,
}

/// Takes the broker's first message and does what it says.
pub(crate) fn run(channel: PacketChannel) -> Result<(), ServeError> {
    let (message, mut fds) = channel.receive::<ToEngine>()?;
    match message {
        ToEngine::Start { version: VERSION, session, config } if fds.len() == 3 => {
            let _session = tracing::info_span!("session", id = %session).entered();
            let counters = fds.remove(2);
            let listener = fds.remove(1);
            let source = fds.remove(0);
            start(channel, config, StartFds { source, listener, counters })
        }
        ToEngine::Preflight { version: VERSION, config } if fds.len() == 1 => {
            let preflight = prepare_or_tell(&channel, &config, fds.remove(0))?.preflight;
            Ok(channel.send(&FromEngine::Ready { preflight }, &[])?)
        }
        _ => Err(ServeError::Protocol),
    }
}

fn prepare_or_tell(channel: &PacketChannel, config: &EngineConfig, source: OwnedFd) -> Result<Prepared, ServeError> {
    prepare(config, source).map_err(|finding| {
        // Should the broker be gone as well, the error that follows is the one to report.
        let _ = channel.send(&FromEngine::Failed { finding: finding.clone() }, &[]);
        ServeError::Refused(finding)
    })
}

fn start(channel: PacketChannel, config: EngineConfig, fds: StartFds) -> Result<(), ServeError> {
    let counters = Arc::new(Counters::map(&fds.counters).map_err(ServeError::Counters)?);
    let prepared = prepare_or_tell(&channel, &config, fds.source)?;
    // The library opens its own descriptors of /proc and of the root here, before the filter closes behind us.
    if config.writable() {
        let fs = PassthroughFs::new(prepared.library).map_err(ServeError::FileSystem)?;
        seccomp::close_behind(config.writable())?;
        channel.send(&FromEngine::Ready { preflight: prepared.preflight }, &[])?;
        serve(channel, Guard::new(fs, &config, counters.clone()), counters, fds.listener)
    } else {
        let fs = PassthroughFsRo::new(prepared.library).map_err(ServeError::FileSystem)?;
        seccomp::close_behind(config.writable())?;
        channel.send(&FromEngine::Ready { preflight: prepared.preflight }, &[])?;
        serve(channel, Guard::new(fs, &config, counters.clone()), counters, fds.listener)
    }
}

fn serve<F>(channel: PacketChannel, fs: F, counters: Arc<Counters>, listener: OwnedFd) -> Result<(), ServeError>
where
    F: FileSystem + Send + Sync + 'static,
{
    let device = Arc::new(Device::new(fs, counters).map_err(ServeError::SetUp)?);
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("vhost-user".into(), device.clone(), memory).map_err(ServeError::VhostUser)?;
    for handler in daemon.get_epoll_handlers() {
        handler
            .register_listener(device.resume_fd(), vmm_sys_util::epoll::EventSet::IN, u64::from(RESUME_EVENT))
            .map_err(ServeError::SetUp)?;
    }
    // SAFETY: the descriptor is ours alone and a listening socket; `Listener` owns it from here on.
    let mut listener = unsafe { Listener::from_raw_fd(listener.into_raw_fd()) };
    daemon.start(&mut listener).map_err(ServeError::VhostUser)?;
    thread::Builder::new()
        .name("control".into())
        .spawn(move || control::follow(&channel, &device))
        .map_err(ServeError::SetUp)?;
    match daemon.wait() {
        Ok(()) | Err(vhost_user_backend::Error::HandleRequest(vhost::vhost_user::Error::Disconnected)) => Ok(()),
        Err(error) => Err(ServeError::VhostUser(error)),
    }
}
