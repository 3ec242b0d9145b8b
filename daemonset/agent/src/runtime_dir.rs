//! The runtime directory: who finds what where, and the lock that keeps a second agent out.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use thiserror::Error;

/// Longest path of the directory: a socket's path has 107 bytes, and the share's with the shortest name has 14 below
/// the directory, more than the broker's.
const LONGEST: usize = 107 - "/shares/x.sock".len();

/// Why the runtime directory cannot be used.
#[derive(Debug, Error)]
pub(crate) enum RuntimeDirError {
    /// A directory could not be made or resolved.
    #[error("runtime directory {path}: {error}")]
    Directory { path: PathBuf, error: io::Error },
    /// The lock file could not be opened or locked.
    #[error("lock {path}: {error}")]
    Lock { path: PathBuf, error: io::Error },
    /// Nobody could connect to a socket below it (unix(7)).
    #[error("runtime directory {0}: its path is too long for sockets below it; {LONGEST} bytes are possible")]
    TooLong(PathBuf),
    /// Another agent works here.
    #[error("another agent works in {0}; end it first, or choose another --runtime-dir")]
    Taken(PathBuf),
}

/// Paths below one runtime directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RuntimeDir {
    root: PathBuf,
}

impl RuntimeDir {
    /// The paths below `root`; nothing is made or looked at.
    pub(crate) fn at(root: &Path) -> Self {
        RuntimeDir { root: root.to_path_buf() }
    }

    /// Makes the directory and the one for sockets where they are missing.
    pub(crate) fn prepare(root: &Path) -> Result<Self, RuntimeDirError> {
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
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The broker's control socket.
    pub(crate) fn broker_socket(&self) -> PathBuf {
        self.root.join("broker.sock")
    }

    /// What the agent knows and the broker does not; see [`crate::published`].
    pub(crate) fn published(&self) -> PathBuf {
        self.root.join("agent.json")
    }

    /// The socket at which VMMs connect to a share.
    pub(crate) fn share_socket(&self, share: &str) -> PathBuf {
        self.sockets().join(format!("{share}.sock"))
    }

    fn sockets(&self) -> PathBuf {
        self.root.join("shares")
    }

    fn lock_file(&self) -> PathBuf {
        self.root.join("agent.lock")
    }

    /// Makes this process the only agent of the directory for as long as the value lives.
    pub(crate) fn lock(&self) -> Result<Lock, RuntimeDirError> {
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

    /// Does an agent work here? Asked without taking the lock, so an agent that starts at this moment is not
    /// turned away.
    pub(crate) fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.lock_file()) else { return false };
        let mut lock = whole_file(libc::F_WRLCK);
        fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
    }

    /// Takes away what an agent that has ended leaves of no use: its published state, and sockets at which
    /// nobody listens any more.
    pub(crate) fn clear(&self, shares: impl Iterator<Item = String>) {
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

/// Makes a directory through which VMMs of other users reach the sockets, whatever the umask; who may connect is
/// for each socket to say. A directory that was there keeps its mode.
fn make(directory: &Path) -> io::Result<()> {
    match fs::create_dir(directory) {
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Held by the one agent of a runtime directory. The kernel gives the lock up with the process, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
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

/// Where agent, broker and `status` meet when nothing else is said: `/run/virtiofs` for root, else a directory
/// of the user's own.
pub(crate) fn default_root() -> PathBuf {
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
    fn a_directory_too_long_for_sockets_is_refused() {
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
    fn a_second_agent_is_turned_away_until_the_first_has_ended() {
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
    fn clearing_spares_what_is_not_ours() {
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
