//! An engine as the broker would start it, with the guest connected to it directly.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

use tempfile::TempDir;
use testkit::guest::{Guest, GuestConfig};
use virtiofs_contract::VERSION;
use virtiofs_contract::channel::PacketChannel;
use virtiofs_contract::config::EngineConfig;
use virtiofs_contract::counters::Counters;
use virtiofs_contract::engine::{CONTROL_FD, FromEngine, ToEngine};
use virtiofs_contract::preflight::{Finding, Preflight};

/// An engine process and the broker's ends of its channels. It is killed when dropped.
pub(crate) struct Engine {
    process: Child,
    pub(crate) control: PacketChannel,
    pub(crate) counters: Counters,
    pub(crate) preflight: Preflight,
    directory: TempDir,
}

impl Engine {
    /// Starts an engine that serves `source`.
    pub(crate) fn start(source: &Path, config: EngineConfig) -> Result<Engine, Finding> {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vu.sock")).unwrap();
        let (page, counters) = Counters::create().unwrap();
        let (process, control) = spawn();
        let start = ToEngine::Start { version: VERSION, session: "test".into(), config };
        control.send(&start, &[open_path(source).as_fd(), listener.as_fd(), page.as_fd()]).unwrap();
        let mut engine = Engine { process, control, counters, preflight: no_preflight(), directory };
        match engine.control.receive::<FromEngine>().unwrap().0 {
            FromEngine::Ready { preflight } => {
                engine.preflight = preflight;
                Ok(engine)
            }
            FromEngine::Failed { finding } => Err(finding),
            other => panic!("{other:?} instead of Ready"),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Connects and mounts a guest.
    pub(crate) fn boot(&self) -> Guest {
        Guest::boot(self.guest_config()).unwrap()
    }

    pub(crate) fn guest_config(&self) -> GuestConfig {
        GuestConfig::new(self.directory.path().join("vu.sock")).small()
    }

    /// A field of /proc/PID/status.
    pub(crate) fn status_field(&self, field: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {field}")).trim().to_owned()
    }

    /// Has the process ended within some seconds?
    pub(crate) fn ends(&mut self) -> bool {
        (0..500).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            self.process.try_wait().unwrap().is_some()
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What an engine finds when it only tries.
pub(crate) fn preflight(source: &Path, config: EngineConfig) -> Result<Preflight, Finding> {
    let (mut process, control) = spawn();
    control.send(&ToEngine::Preflight { version: VERSION, config }, &[open_path(source).as_fd()]).unwrap();
    let answer = control.receive::<FromEngine>().unwrap().0;
    process.wait().unwrap();
    match answer {
        FromEngine::Ready { preflight } => Ok(preflight),
        FromEngine::Failed { finding } => Err(finding),
        other => panic!("{other:?} instead of Ready"),
    }
}

fn spawn() -> (Child, PacketChannel) {
    let (ours, theirs) = PacketChannel::pair().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtiofs-engine"));
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
        sandbox: virtiofs_contract::config::Sandbox::Auto,
        user_namespace: false,
        capabilities: Vec::new(),
        inode_file_handles: virtiofs_contract::config::InodeFileHandles::Never,
        mounts: Vec::new(),
        open_files: 0,
        guest_open_files: 0,
        findings: Vec::new(),
    }
}
