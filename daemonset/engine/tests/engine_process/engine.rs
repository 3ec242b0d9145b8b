//! An engine as the broker starts it, with the guest connected directly.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use tempfile::TempDir;
use testkit::guest::{Guest, GuestConfig};
use virtiofs_config::EngineConfig;
use virtiofs_contract::VERSION;
use virtiofs_contract::channel::PacketChannel;
use virtiofs_contract::counters::Counters;
use virtiofs_contract::engine::{CONTROL_FD, FromEngine, Predecessor, QUEUES, StashReply, StashRequest, ToEngine};
use virtiofs_contract::preflight::{Finding, Preflight};
use virtiofs_contract::trace::TraceRing;

/// What outlives an engine of a session: shared memory and stashed files.
pub(crate) struct Session {
    page: OwnedFd,
    ledger: OwnedFd,
    trace: OwnedFd,
    stashed: Arc<Mutex<HashMap<u64, OwnedFd>>>,
}

impl Session {
    pub(crate) fn new() -> Self {
        let ledger = memfd_create(c"ledger", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        let ledger = File::from(ledger);
        ledger.set_len(64 << 20).unwrap();
        fcntl(&ledger, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK)).unwrap();
        let page = Counters::create().unwrap().0;
        let trace = TraceRing::create().unwrap().0;
        Session { page, ledger: ledger.into(), trace, stashed: Arc::default() }
    }

    /// The same session, for another engine.
    fn share(&self) -> Self {
        let [page, ledger, trace] = [&self.page, &self.ledger, &self.trace].map(|fd| fd.try_clone().unwrap());
        Session { page, ledger, trace, stashed: self.stashed.clone() }
    }

    /// Waits until so many files are stashed: a release is not answered, so it may take a moment.
    pub(crate) fn expect_stashed(&self, files: usize) {
        let stashed = || self.stashed.lock().unwrap().len();
        for _ in 0..1000 {
            if stashed() == files {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(stashed(), files, "stashed files");
    }

    /// A new engine's end of the stash's channel, and the thread that serves the other end until the engine ends.
    fn stash_channel(&self) -> (PacketChannel, JoinHandle<()>) {
        let (ours, theirs) = PacketChannel::pair().unwrap();
        let stashed = self.stashed.clone();
        let thread = std::thread::spawn(move || {
            while let Ok((question, fds)) = ours.receive::<StashRequest>() {
                let mut stashed = stashed.lock().unwrap();
                // A killed engine does not receive the reply.
                let _ = match question {
                    StashRequest::Stash { request, handle } => {
                        stashed.insert(handle, fds.into_iter().next().unwrap());
                        ours.send(&StashReply::Stashed { request, accepted: true }, &[])
                    }
                    StashRequest::Fetch { request, handle } => {
                        let file = stashed.get(&handle).map(AsFd::as_fd);
                        ours.send(&StashReply::Fetched { request, found: file.is_some() }, file.as_slice())
                    }
                    StashRequest::Release { handle } => {
                        stashed.remove(&handle);
                        Ok(())
                    }
                    StashRequest::ReleaseAll => {
                        stashed.clear();
                        Ok(())
                    }
                };
            }
        });
        (theirs, thread)
    }
}

/// An engine process and the broker's ends of its channels. It is killed when dropped.
pub(crate) struct Engine {
    process: Child,
    session: Session,
    pub(crate) control: PacketChannel,
    pub(crate) counters: Counters,
    pub(crate) preflight: Preflight,
    /// Serves the fd stash; none once the engine has ended.
    stash: Option<JoinHandle<()>>,
    directory: TempDir,
}

impl Engine {
    /// Starts an engine that serves `source`.
    pub(crate) fn start(source: &Path, config: EngineConfig) -> Result<Engine, Finding> {
        Self::follow(Session::new(), source, config, Predecessor::Quiesced, None)
    }

    /// Kills the engine and starts another one for the session.
    pub(crate) fn killed(self, source: &Path, config: EngineConfig) -> Result<Engine, Finding> {
        self.killed_with_death_at(source, config, None)
    }

    /// The same; the new engine kills itself before its store number `die_at` to the ledger.
    pub(crate) fn killed_with_death_at(
        mut self,
        source: &Path,
        config: EngineConfig,
        die_at: Option<u64>,
    ) -> Result<Engine, Finding> {
        self.end();
        let session = std::mem::replace(&mut self.session, Session::new());
        Self::follow(session, source, config, Predecessor::Killed, die_at)
    }

    /// Starts a standby engine while this one serves.
    pub(crate) fn standby(&self, source: &Path, config: EngineConfig) -> Result<Engine, Finding> {
        Self::follow(self.session.share(), source, config, Predecessor::Killed, None)
    }

    /// Quiesces the engine and starts another one for the session.
    pub(crate) fn handed_over(mut self, source: &Path, config: EngineConfig) -> Result<Engine, Finding> {
        self.control.send(&ToEngine::Quiesce, &[]).unwrap();
        for ring in 0..QUEUES as u16 {
            assert_eq!(self.control.receive::<FromEngine>().unwrap().0, FromEngine::Quiesced { ring });
        }
        let session = std::mem::replace(&mut self.session, Session::new());
        drop(self);
        Self::follow(session, source, config, Predecessor::Quiesced, None)
    }

    /// True if the process is running.
    #[cfg(feature = "die-at-store")]
    pub(crate) fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    fn follow(
        session: Session,
        source: &Path,
        config: EngineConfig,
        predecessor: Predecessor,
        die_at: Option<u64>,
    ) -> Result<Engine, Finding> {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vu.sock")).unwrap();
        let counters = Counters::map(&session.page).unwrap();
        let (process, control) = spawn(die_at);
        let start = ToEngine::Start { version: VERSION, newest: None, session: "test".into(), config, predecessor };
        let (source, (stash, thread)) = (open_path(source), session.stash_channel());
        let (page, ledger, trace) = (session.page.as_fd(), session.ledger.as_fd(), session.trace.as_fd());
        control.send(&start, &[source.as_fd(), listener.as_fd(), page, ledger, stash.as_fd(), trace]).unwrap();
        drop(stash);
        let (preflight, stash) = (no_preflight(), Some(thread));
        let mut engine = Engine { process, session, control, counters, preflight, stash, directory };
        match engine.control.receive::<FromEngine>().unwrap().0 {
            FromEngine::Ready { preflight, .. } => {
                engine.preflight = preflight;
                Ok(engine)
            }
            FromEngine::Failed { finding } => Err(finding),
            other => panic!("{other:?} instead of Ready"),
        }
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("vu.sock")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Connects and mounts a guest.
    pub(crate) fn boot(&self) -> Guest {
        Guest::boot(self.guest_config()).unwrap()
    }

    pub(crate) fn guest_config(&self) -> GuestConfig {
        GuestConfig::new(self.socket()).small()
    }

    /// A field of /proc/PID/status.
    pub(crate) fn status_field(&self, field: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {field}")).trim().to_owned()
    }

    /// Kills the process. What it sent last is in the stash then, as the broker sees to before the next engine serves.
    fn end(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(stash) = self.stash.take() {
            stash.join().unwrap();
        }
    }

    /// True if the process ends within a few seconds.
    pub(crate) fn ends(&mut self) -> bool {
        (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            self.process.try_wait().unwrap().is_some()
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}

/// The preflight of an engine.
pub(crate) fn preflight(source: &Path, config: EngineConfig) -> Result<Preflight, Finding> {
    let (mut process, control) = spawn(None);
    control
        .send(&ToEngine::Preflight { version: VERSION, newest: None, config }, &[open_path(source).as_fd()])
        .unwrap();
    let answer = control.receive::<FromEngine>().unwrap().0;
    process.wait().unwrap();
    match answer {
        FromEngine::Ready { preflight, .. } => Ok(preflight),
        FromEngine::Failed { finding } => Err(finding),
        other => panic!("{other:?} instead of Ready"),
    }
}

fn spawn(die_at: Option<u64>) -> (Child, PacketChannel) {
    let (ours, theirs) = PacketChannel::pair().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtiofs-engine"));
    command.envs(die_at.map(|store| ("VIRTIOFS_DIE_AT_STORE", store.to_string())));
    let fd = theirs.as_fd().as_raw_fd();
    // SAFETY: dup2, fcntl and prctl are async-signal-safe, and nothing else is called between fork and exec.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            let theirs = std::os::fd::BorrowedFd::borrow_raw(fd);
            if fd == CONTROL_FD {
                nix::fcntl::fcntl(theirs, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
            } else {
                nix::unistd::dup2_raw(theirs, CONTROL_FD).map(std::mem::forget)?;
            }
            Ok(())
        });
    }
    (command.spawn().unwrap(), ours)
}

fn open_path(source: &Path) -> File {
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(source).unwrap()
}

fn no_preflight() -> Preflight {
    Preflight {
        sandbox: virtiofs_config::Sandbox::Auto,
        user_namespace: false,
        confinement: Default::default(),
        capabilities: Vec::new(),
        inode_file_handles: virtiofs_config::InodeFileHandles::Never,
        mounts: Vec::new(),
        open_files: 0,
        guest_open_files: 0,
        limits: virtiofs_config::Limits::default(),
        findings: Vec::new(),
    }
}
