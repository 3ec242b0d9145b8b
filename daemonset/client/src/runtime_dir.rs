//! The runtime directory: paths of its sockets and files, and the lock that admits one agent.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use thiserror::Error;

/// Longest path of the directory in bytes: a socket's path has at most 107, and the socket of the share with the shortest
/// name takes 14 of them, more than the broker's.
const LONGEST: usize = 107 - "/shares/x.sock".len();

/// Why the runtime directory cannot be used.
#[derive(Debug, Error)]
pub enum RuntimeDirError {
    /// A directory could not be created or resolved.
    #[error("runtime directory {path}: {error}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The lock file could not be opened or locked.
    #[error("lock {path}: {error}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The path is too long for sockets in it (unix(7)).
    #[error("runtime directory {0}: the path is too long for sockets in it; use at most {LONGEST} bytes")]
    TooLong(PathBuf),
    /// Another agent runs here.
    #[error("another agent runs in {0}; stop it first, or choose another --runtime-dir")]
    Taken(PathBuf),
}

/// Paths below one runtime directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeDir {
    root: PathBuf,
}

impl RuntimeDir {
    /// The paths below `root`. Creates nothing.
    pub fn at(root: &Path) -> Self {
        RuntimeDir { root: root.to_path_buf() }
    }

    /// Creates the directory and the one for sockets if they are missing.
    ///
    /// # Errors
    /// A directory cannot be created, or the path is too long.
    pub fn prepare(root: &Path) -> Result<Self, RuntimeDirError> {
        let failed = |error| RuntimeDirError::Directory { path: root.to_path_buf(), error };
        if let Some(parent) = root.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        make(root).map_err(failed)?;
        let prepared = RuntimeDir { root: fs::canonicalize(root).map_err(failed)? };
        if prepared.root.as_os_str().len() > LONGEST {
            return Err(RuntimeDirError::TooLong(prepared.root));
        }
        make(&prepared.sockets()).map_err(failed)?;
        Ok(prepared)
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The broker's control socket.
    pub fn broker_socket(&self) -> PathBuf {
        self.root.join("broker.sock")
    }

    /// The agent's published report; see [`crate::published`].
    pub fn published(&self) -> PathBuf {
        self.root.join("agent.json")
    }

    /// The socket at which VMMs connect to a share.
    pub fn share_socket(&self, share: &str) -> PathBuf {
        self.sockets().join(format!("{share}.sock"))
    }

    fn sockets(&self) -> PathBuf {
        self.root.join("shares")
    }

    fn lock_file(&self) -> PathBuf {
        self.root.join("agent.lock")
    }

    /// Locks the directory: this process is its only agent while the value lives.
    ///
    /// # Errors
    /// [`RuntimeDirError::Taken`] if another agent holds the lock.
    pub fn lock(&self) -> Result<Lock, RuntimeDirError> {
        let path = self.lock_file();
        let failed = |error| RuntimeDirError::Lock { path: path.clone(), error };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
            Ok(_) => Ok(Lock { _file: file }),
            Err(Errno::EAGAIN | Errno::EACCES) => Err(RuntimeDirError::Taken(self.root.clone())),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// True if an agent holds the lock. Does not take it, so an agent that starts at this moment is not rejected.
    pub fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.lock_file()) else { return false };
        let mut lock = whole_file(libc::F_WRLCK);
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
    }

    /// Removes what an agent leaves at its end: its published report, and sockets without a listener.
    pub fn clear(&self, shares: impl Iterator<Item = String>) {
        let sockets = shares.map(|share| self.share_socket(&share));
        for path in sockets.chain([self.broker_socket(), self.published()]) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove a file left in the runtime directory");
                }
                _ => {}
            }
        }
    }
}

/// Creates a directory with mode 0755 whatever the umask: VMMs of other users reach the sockets through it, and each
/// socket's own mode says who may connect. A directory that exists keeps its mode.
fn make(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Held by the agent of a runtime directory. The kernel releases the lock when the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

fn whole_file(kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// The default: `/run/virtiofs` for root, else `/run/user/UID/virtiofs`.
pub fn default_root() -> PathBuf {
    let user = nix::unistd::geteuid();
    if user.is_root() {
        return PathBuf::from("/run/virtiofs");
    }
    PathBuf::from(format!("/run/user/{user}/virtiofs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_too_long_for_sockets_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let scratch = scratch.path().canonicalize().unwrap();
        for (length, fits) in [(LONGEST, true), (LONGEST + 1, false)] {
            let root = scratch.join("r".repeat(length - scratch.as_os_str().len() - 1));
            let prepared = RuntimeDir::prepare(&root);
            assert_eq!(prepared.is_ok(), fits, "{prepared:?}");
            let Ok(prepared) = prepared else { continue };
            std::os::unix::net::UnixListener::bind(prepared.share_socket("x")).unwrap();
        }
    }

    #[test]
    fn a_second_agent_is_rejected_until_the_first_ends() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::prepare(folder.path()).unwrap();
        assert!(!dir.is_locked());
        let lock = dir.lock().unwrap();
        assert!(dir.is_locked());
        assert!(matches!(dir.lock(), Err(RuntimeDirError::Taken(_))));
        drop(lock);
        assert!(!dir.is_locked());
        dir.lock().unwrap();
    }

    #[test]
    fn clearing_spares_other_sockets() {
        let folder = tempfile::tempdir().unwrap();
        let dir = RuntimeDir::prepare(folder.path()).unwrap();
        for name in ["ours", "theirs"] {
            fs::write(dir.share_socket(name), "").unwrap();
        }
        dir.clear(["ours".to_owned(), "never-made".to_owned()].into_iter());
        assert!(!dir.share_socket("ours").exists());
        assert!(dir.share_socket("theirs").exists());
    }
}
