//! Runs a probe as an engine would run.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Uid, fork, setresgid, setresuid};
use tempfile::TempDir;
use testkit::skip::require_that;
use virtiofs_config::{Access, EngineConfig, InodeFileHandles, Sandbox};
use virtiofs_contract::preflight::Preflight;
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::passthrough::read_only::PassthroughFsRo;

use crate::prepare::{Prepared, prepare};
use crate::seccomp;

/// How a probe ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The call succeeded.
    Reached,
    /// The call returned this error.
    Denied(i32),
    /// The filter ended the process.
    Killed,
}

/// Who starts the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// Root with all capabilities: sandbox `Namespace`.
    Root,
    /// Root as in the chart's pods, without CAP_SYS_ADMIN: sandbox `Chroot`.
    Pod,
    /// The same, where user namespaces are denied as well.
    PodWithoutUserNamespaces,
    /// An ordinary user: sandbox `Namespace` in a user namespace.
    User,
    /// An ordinary user with sandbox `None`.
    UserUnconfined,
    /// Root with these capabilities.
    With(&'static [Capability]),
}

pub(super) const ALL: [Start; 5] =
    [Start::Root, Start::Pod, Start::PodWithoutUserNamespaces, Start::User, Start::UserUnconfined];

/// The modes that are confined to the source, whatever the share's options are.
pub(super) const STRICT: [Start; 3] = [Start::Root, Start::Pod, Start::User];

/// What the chart gives the broker.
pub(super) const POD: [Capability; 9] = [
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_SETPCAP,
];

const USER: u32 = 7531;

/// Exit status of a child whose engine could not be prepared.
const NOT_PREPARED: i32 = 200;

/// A directory with a source in it, and a file beside it that no engine may reach.
pub(super) struct Scene {
    directory: TempDir,
}

/// The content of the file outside the source.
pub(super) const SECRET: &[u8] = b"another tenant's";

impl Scene {
    /// None: this is not root, and skips are allowed.
    pub(super) fn new() -> Option<Self> {
        if !require_that("root", nix::unistd::geteuid().is_root()) {
            return None;
        }
        // Not in /tmp: a test may run while others fill it. 0755, so that the ordinary user may enter it.
        let directory = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
        let scene = Scene { directory };
        fs::create_dir_all(scene.source().join("sub/deep")).unwrap();
        fs::write(scene.source().join("file"), "data").unwrap();
        fs::create_dir(scene.path().join("outside")).unwrap();
        fs::write(scene.secret(), SECRET).unwrap();
        for path in ["source", "source/sub", "source/file", "outside/secret"] {
            nix::unistd::chown(&scene.path().join(path), Some(USER.into()), Some(USER.into())).unwrap();
        }
        Some(scene)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().canonicalize().unwrap()
    }

    pub(super) fn source(&self) -> PathBuf {
        self.path().join("source")
    }

    pub(super) fn secret(&self) -> PathBuf {
        self.path().join("outside/secret")
    }

    /// Runs a probe in an engine of this scene. The probe returns the result of a system call.
    pub(super) fn probe(&self, start: Start, access: Access, probe: impl FnOnce() -> io::Result<i64>) -> Outcome {
        self.probe_with(start, start.config(access), probe)
    }

    pub(super) fn probe_with(
        &self,
        start: Start,
        config: EngineConfig,
        probe: impl FnOnce() -> io::Result<i64>,
    ) -> Outcome {
        let run = || match engine(start, &config, &self.source()) {
            Ok(_held) => probe().map_or_else(|error| error.raw_os_error().unwrap_or(199), |_| 0),
            Err(error) => {
                eprintln!("{start:?}: {error}");
                NOT_PREPARED
            }
        };
        match in_child(run) {
            WaitStatus::Exited(_, 0) => Outcome::Reached,
            WaitStatus::Exited(_, errno) if errno < NOT_PREPARED => Outcome::Denied(errno),
            WaitStatus::Signaled(_, Signal::SIGSYS, _) => Outcome::Killed,
            other => panic!("{start:?}: {other:?}"),
        }
    }

    /// Adds a file of the ordinary user to the source.
    pub(super) fn add_file(&self, name: &str, mode: u32) {
        let path = self.source().join(name);
        fs::write(&path, "data").unwrap();
        nix::unistd::chown(&path, Some(USER.into()), Some(USER.into())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// The preflight of an engine of this scene.
    pub(super) fn preflight(&self, start: Start, config: &EngineConfig) -> Preflight {
        self.try_preflight(start, config).unwrap()
    }

    /// The same, or why the engine is refused.
    pub(super) fn try_preflight(&self, start: Start, config: &EngineConfig) -> Result<Preflight, String> {
        let (mut reader, writer) = io::pipe().unwrap();
        let ended = in_child(|| {
            start.become_it();
            let preflight = prepare(config, open_path(&self.source()).into()).map(|prepared| prepared.preflight);
            serde_json::to_writer(&writer, &preflight.map_err(|finding| finding.to_string())).unwrap();
            0
        });
        drop(writer);
        assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{start:?}: {ended:?}");
        serde_json::from_reader(&mut reader).unwrap()
    }
}

impl Start {
    pub(super) fn config(self, access: Access) -> EngineConfig {
        let sandbox = if self == Start::UserUnconfined { Sandbox::None } else { Sandbox::Auto };
        EngineConfig { sandbox, max_inodes: 1000, ..EngineConfig::stock(access) }
    }

    /// The same, with inodes held by descriptors.
    pub(super) fn without_handles(self, access: Access) -> EngineConfig {
        EngineConfig { inode_file_handles: InodeFileHandles::Never, ..self.config(access) }
    }

    /// Root with these capabilities.
    pub(super) fn with(capabilities: Vec<Capability>) -> Self {
        Start::With(capabilities.leak())
    }

    /// Makes this process the one that the broker would start.
    fn become_it(self) {
        match self {
            Start::Root => {}
            Start::Pod => keep(&POD),
            Start::With(capabilities) => keep(capabilities),
            Start::PodWithoutUserNamespaces => {
                seccomp::tests::deny_user_namespaces();
                keep(&POD);
            }
            Start::User | Start::UserUnconfined => {
                nix::unistd::setgroups(&[]).unwrap();
                setresgid(Gid::from_raw(USER), Gid::from_raw(USER), Gid::from_raw(USER)).unwrap();
                setresuid(Uid::from_raw(USER), Uid::from_raw(USER), Uid::from_raw(USER)).unwrap();
                // As after an exec.
                nix::sys::prctl::set_dumpable(true).unwrap();
            }
        }
    }
}

fn keep(capabilities: &[Capability]) {
    let keep: CapsHashSet = capabilities.iter().copied().collect();
    for capability in caps::all().difference(&keep) {
        // The kernel may know fewer than the crate.
        let _ = caps::drop(None, CapSet::Bounding, *capability);
    }
    caps::set(None, CapSet::Effective, &keep).unwrap();
    caps::set(None, CapSet::Permitted, &keep).unwrap();
}

/// Closes what this process has from its parent, where other tests run: an engine is executed, and has none of it.
fn close_inherited() {
    // SAFETY: nothing that runs in this process uses a descriptor that was opened before.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

/// Confines this process as an engine, with the library started. Returns what an engine keeps open.
fn engine(start: Start, config: &EngineConfig, source: &Path) -> Result<Box<dyn std::any::Any>, String> {
    close_inherited();
    start.become_it();
    let prepared = prepare(config, open_path(source).into()).map_err(|finding| finding.to_string())?;
    let Prepared { library, places, .. } = prepared;
    let fs: Box<dyn std::any::Any> = if config.writable() {
        Box::new((PassthroughFs::new(library).map_err(|error| error.to_string())?, places))
    } else {
        seccomp::forbid_writing().map_err(|error| error.to_string())?;
        Box::new((PassthroughFsRo::new(library).map_err(|error| error.to_string())?, places))
    };
    seccomp::install(config.writable()).map_err(|error| error.to_string())?;
    Ok(fs)
}

fn open_path(path: &Path) -> File {
    File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path).unwrap()
}

/// Runs `act` in a child process and returns how that ended. It exits with the returned status.
fn in_child(act: impl FnOnce() -> i32) -> WaitStatus {
    // SAFETY: glibc's fork makes its allocator usable in the child, and the child uses no other lock of this process.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let status = act();
            // SAFETY: ends the child without running what belongs to its parent.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
    }
}

/// The result of a system call.
pub(super) fn result(value: i64) -> io::Result<i64> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

/// A raw system call with up to six arguments.
pub(super) fn call(number: i64, arguments: &[i64]) -> io::Result<i64> {
    let argument = |at: usize| arguments.get(at).copied().unwrap_or(0);
    // SAFETY: probes pass pointers to data that outlives the call, or none at all.
    result(unsafe {
        libc::syscall(number, argument(0), argument(1), argument(2), argument(3), argument(4), argument(5))
    })
}

/// The descriptors that this process may have.
pub(super) fn descriptors() -> impl Iterator<Item = RawFd> {
    0..64
}

/// A descriptor of the share's root in the confined process.
pub(super) fn open_root(config: &EngineConfig, source: &Path) -> File {
    let root = if config.sandbox == Sandbox::None { source } else { Path::new("/") };
    let root = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(root).unwrap();
    assert!(root.as_raw_fd() < 64);
    root
}
