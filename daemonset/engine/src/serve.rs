//! The life of an engine: prepare, report, serve until the VMM or the broker closes its connection.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofs_config::EngineConfig;
use virtiofs_contract::Versions;
use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::counters::Counters;
use virtiofs_contract::engine::{FromEngine, Predecessor, ToEngine};
use virtiofs_contract::preflight::{Finding, Preflight, Reason};
use virtiofs_contract::trace::TraceRing;
use virtiofsd::filesystem::{FileSystem, FsOptions};
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{InodeFileHandlesMode, PassthroughFs};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::control;
use crate::device::{Device, MOUNTS_EVENT, RESUME_EVENT};
use crate::guard::Guard;
use crate::ledger::Ledger;
use crate::orphaned::OrphanedFileServer;
use crate::prepare::{Prepared, prepare};
use crate::root::root_stamp;
use crate::seccomp;
use crate::session_fs::{Audit, FdStash, SessionFs, SharedState};
use crate::stale_handle::StaleHandles;

/// Why an engine ends, other than because its VMM or broker closed the connection.
#[derive(Debug, Error)]
pub(crate) enum ServeError {
    /// The control channel failed.
    #[error("control channel: {0}")]
    Control(ChannelError),
    /// The broker's first message is not one that starts an engine.
    #[error("control channel: the first message is not Start or Preflight with its descriptors")]
    Protocol,
    /// The broker speaks other versions.
    #[error("the broker speaks {0} of the messages, this engine {ours}; install programs of one release, or of two neighbouring ones", ours = Versions::OURS)]
    Version(Versions),
    /// The configuration cannot be served here.
    #[error("{0}")]
    Refused(Finding),
    /// The counter page cannot be used.
    #[error("counter page: {0}")]
    Counters(io::Error),
    /// The request log cannot be used.
    #[error("trace: {0}")]
    Trace(io::Error),
    /// The system call filter was not accepted.
    #[error("system call filter: {0}")]
    Seccomp(seccomp::SeccompError),
    /// The library's file system could not be created.
    #[error("file system: {0}")]
    FileSystem(io::Error),
    /// vhost-user failed.
    #[error("vhost-user: {0}")]
    VhostUser(vhost_user_backend::Error),
    /// A thread or an event descriptor could not be created.
    #[error("engine set-up: {0}")]
    SetUp(io::Error),
}

/// The descriptors of `Start`, in their order.
struct StartFds {
    source: OwnedFd,
    listener: OwnedFd,
    counters: OwnedFd,
    ledger: OwnedFd,
    stash: OwnedFd,
    trace: OwnedFd,
}

impl StartFds {
    fn take(fds: Vec<OwnedFd>) -> Option<Self> {
        let [source, listener, counters, ledger, stash, trace] = <[OwnedFd; 6]>::try_from(fds).ok()?;
        Some(StartFds { source, listener, counters, ledger, stash, trace })
    }
}

/// The parts of a session except its file system.
struct Session {
    channel: PacketChannel,
    /// Version of the messages.
    version: u32,
    shared: Arc<SharedState>,
    counters: Arc<Counters>,
    trace: TraceRing,
    listener: OwnedFd,
    predecessor: Predecessor,
    preflight: Preflight,
}

/// Receives the broker's first message and runs the engine that it asks for.
pub(crate) fn run(channel: PacketChannel) -> Result<(), ServeError> {
    let (message, mut fds) = channel.receive::<ToEngine>().map_err(ServeError::Control)?;
    match message {
        ToEngine::Start { version, newest, session, config, predecessor } => {
            let version = agree(version, newest)?;
            let fds = StartFds::take(fds).ok_or(ServeError::Protocol)?;
            let _session = tracing::info_span!("session", id = %session).entered();
            start(channel, version, &config, fds, predecessor)
        }
        ToEngine::Preflight { version, newest, config } if fds.len() == 1 => {
            let version = agree(version, newest)?;
            let preflight = prepare_or_report(&channel, &config, fds.remove(0))?.preflight;
            channel.send(&FromEngine::Ready { preflight, version: Some(version) }, &[]).map_err(ServeError::Control)
        }
        _ => Err(ServeError::Protocol),
    }
}

/// The version of the messages that broker and engine speak.
fn agree(version: u32, newest: Option<u32>) -> Result<u32, ServeError> {
    let theirs = Versions::of_message(version, newest);
    Versions::OURS.common(theirs).ok_or(ServeError::Version(theirs))
}

/// A page that nobody reads, in place of one whose layout this engine does not know: the broker is of another release.
fn own_page<P>(error: io::Error, create: fn() -> io::Result<(OwnedFd, P)>) -> io::Result<P> {
    if error.kind() != io::ErrorKind::InvalidData {
        return Err(error);
    }
    tracing::warn!(%error, "this engine's requests are not counted or traced until the broker is of its release");
    create().map(|(_, page)| page)
}

fn prepare_or_report(channel: &PacketChannel, config: &EngineConfig, source: OwnedFd) -> Result<Prepared, ServeError> {
    prepare(config, source).map_err(|finding| refuse(channel, finding))
}

fn refuse(channel: &PacketChannel, finding: Finding) -> ServeError {
    // If the broker is gone as well, the returned error is the one to report.
    let _ = channel.send(&FromEngine::Failed { finding: finding.clone() }, &[]);
    ServeError::Refused(finding)
}

fn start(
    channel: PacketChannel,
    version: u32,
    config: &EngineConfig,
    fds: StartFds,
    predecessor: Predecessor,
) -> Result<(), ServeError> {
    let counters = Counters::map(&fds.counters).or_else(|error| own_page(error, Counters::create));
    let counters = Arc::new(counters.map_err(ServeError::Counters)?);
    let trace = TraceRing::map(&fds.trace).or_else(|error| own_page(error, TraceRing::create));
    let trace = trace.map_err(ServeError::Trace)?;
    let ledger =
        Ledger::map(&fds.ledger, config.max_inodes).map_err(|error| refuse(&channel, unusable_ledger(&error)))?;
    let config = &as_agreed(config, ledger.init().as_ref().map(|(_, reply)| reply.as_slice()));
    let Prepared { library, preflight, places } = prepare_or_report(&channel, config, fds.source)?;
    if !config.writable() {
        seccomp::forbid_writing().map_err(ServeError::Seccomp)?;
    }
    let root = root_stamp(Path::new(&library.root_dir)).map_err(ServeError::FileSystem)?;
    let shared = Arc::new(SharedState::new(ledger, FdStash::new(PacketChannel::from_fd(fds.stash)), root));
    let orphaned = OrphanedFileServer::new(&library, config.writable()).map_err(ServeError::FileSystem)?;
    let session = Session {
        channel,
        version,
        shared: shared.clone(),
        counters: counters.clone(),
        trace,
        listener: fds.listener,
        predecessor,
        preflight,
    };
    let by_handle = library.inode_file_handles != InodeFileHandlesMode::Never;
    // The library opens its descriptors of /proc and of the root here, before the system call filter is installed.
    if config.writable() {
        let fs = StaleHandles::new(PassthroughFs::new(library).map_err(ServeError::FileSystem)?, by_handle);
        let fs = SessionFs::new(fs, shared, counters, orphaned, config, places).map_err(ServeError::SetUp)?;
        serve(session, fs, config)
    } else {
        let fs = StaleHandles::new(PassthroughFsRo::new(library).map_err(ServeError::FileSystem)?, by_handle);
        let fs = SessionFs::new(fs, shared, counters, orphaned, config, places).map_err(ServeError::SetUp)?;
        serve(session, fs, config)
    }
}

fn serve<F>(session: Session, fs: SessionFs<F>, config: &EngineConfig) -> Result<(), ServeError>
where
    F: FileSystem + Send + Sync + 'static,
{
    let orphans = fs.orphan_scan();
    let audit = fs.audit();
    let mount_table = fs.mount_table();
    let sweep = fs.directory_sweep();
    seccomp::install(config.writable()).map_err(ServeError::Seccomp)?;
    let Session { channel, version, shared, counters, trace, listener, predecessor, preflight } = session;
    let fs = Guard::new(fs, counters.clone());
    let device = Arc::new(Device::new(fs, shared, counters, trace, predecessor).map_err(ServeError::SetUp)?);
    device.replay_init().map_err(|error| refuse(&channel, next_mount(&error)))?;
    // After the INIT has been replayed: lookups depend on settings that the library takes from it.
    audit.map_or(Ok(()), Audit::start).map_err(ServeError::SetUp)?;
    sweep.start().map_err(ServeError::SetUp)?;
    let ready = FromEngine::Ready { preflight, version: Some(version) };
    let mut daemon = connect(&device, mount_table, listener, &channel, &ready)?;
    thread::Builder::new()
        .name("control".into())
        .spawn(move || control::run(&channel, &device, &orphans))
        .map_err(ServeError::SetUp)?;
    match daemon.wait() {
        Ok(()) | Err(vhost_user_backend::Error::HandleRequest(vhost::vhost_user::Error::Disconnected)) => Ok(()),
        Err(error) => Err(ServeError::VhostUser(error)),
    }
}

/// Reports that the engine is ready, and accepts the broker's vhost-user connection.
fn connect<F>(
    device: &Arc<Device<F>>,
    mount_table: RawFd,
    listener: OwnedFd,
    channel: &PacketChannel,
    ready: &FromEngine,
) -> Result<VhostUserDaemon<Arc<Device<F>>>, ServeError>
where
    F: FileSystem + Send + Sync + 'static,
{
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon =
        VhostUserDaemon::new("vhost-user".into(), device.clone(), memory).map_err(ServeError::VhostUser)?;
    for handler in daemon.get_epoll_handlers() {
        let watch = |fd, events, number| handler.register_listener(fd, events, u64::from(number));
        watch(device.resume_fd(), EventSet::IN, RESUME_EVENT).map_err(ServeError::SetUp)?;
        watch(mount_table, EventSet::PRIORITY, MOUNTS_EVENT).map_err(ServeError::SetUp)?;
    }
    channel.send(ready, &[]).map_err(ServeError::Control)?;
    // SAFETY: the descriptor is a listening socket that nothing else owns; `Listener` owns it from here on.
    let mut listener = unsafe { Listener::from_raw_fd(listener.into_raw_fd()) };
    daemon.start(&mut listener).map_err(ServeError::VhostUser)?;
    Ok(daemon)
}

/// The configuration with READDIRPLUS as the guest agreed to it in FUSE_INIT: the configuration applies to the next mount.
fn as_agreed(config: &EngineConfig, reply: Option<&[u8]>) -> EngineConfig {
    // The flags of fuse_init_out, after the header and three other words.
    const FLAGS: std::ops::Range<usize> = 28..32;
    let flags = reply.and_then(|reply| reply.get(FLAGS)?.try_into().ok()).map(u32::from_le_bytes);
    let agreed = flags.map(|flags| FsOptions::from_bits_truncate(flags.into()).contains(FsOptions::DO_READDIRPLUS));
    EngineConfig { readdirplus: agreed.unwrap_or(config.readdirplus), ..config.clone() }
}

fn unusable_ledger(error: &io::Error) -> Finding {
    Finding {
        reason: Reason::RemountRequired,
        message: format!("this engine cannot read the session's ledger: {error}"),
        remedy: "restart the VM; until then the session keeps its current engine".into(),
    }
}

fn next_mount(why: &dyn std::fmt::Display) -> Finding {
    Finding {
        reason: Reason::RemountRequired,
        message: format!("this engine and configuration cannot serve the guest's current mount: {why}"),
        remedy: "unmount and mount again in the guest, or revert the change".into(),
    }
}
