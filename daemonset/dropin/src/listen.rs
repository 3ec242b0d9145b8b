//! The pid file and the listening socket, as virtiofsd 1.14 makes them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, umask};
use nix::unistd::{Group, chown};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use thiserror::Error;

use crate::plan::Listen;

/// Why nothing can listen.
#[derive(Debug, Error)]
pub(crate) enum ListenError {
    /// The path names no file.
    #[error("Invalid socket file name")]
    NoFileName,
    /// The directory of the socket is missing.
    #[error("{0} does not exist or is not a directory")]
    Directory(PathBuf),
    /// The pid file is locked by another process, or cannot be created.
    #[error("Error creating pid file '{path}': {error}")]
    PidFile { path: PathBuf, error: io::Error },
    /// The socket cannot be created.
    #[error("Error creating listener: {0}")]
    Bind(io::Error),
    /// There is no such group.
    #[error("Couldn't resolve the group name {0} specified for the socket path")]
    Group(String),
    /// The socket cannot be given to the group.
    #[error("Couldn't set up the group for the socket path: {0}")]
    Chown(io::Error),
    /// The inherited descriptor does not exist.
    #[error("--fd={0} is not an open descriptor")]
    Descriptor(RawFd),
}

/// A socket that listens. Dropped, a socket that this process made is removed.
#[derive(Debug)]
pub(crate) struct Listening {
    socket: OwnedFd,
    /// The path that this process made.
    made: Option<PathBuf>,
    /// Held, because its lock refuses another process.
    _pid_file: Option<File>,
}

impl Listening {
    /// Listens. Changes the umask for a moment: no other thread may run yet.
    pub(crate) fn open(listen: &Listen) -> Result<Self, ListenError> {
        match listen {
            Listen::Path { path, group } => Self::bind(Path::new(path), group.as_deref()),
            Listen::Descriptor(fd) => Self::inherit(*fd),
        }
    }

    fn bind(path: &Path, group: Option<&str>) -> Result<Self, ListenError> {
        let parent = path.parent().ok_or(ListenError::NoFileName)?;
        let directory = Some(parent).filter(|parent| !parent.as_os_str().is_empty());
        if let Some(missing) = directory.filter(|directory| !directory.exists()) {
            return Err(ListenError::Directory(missing.to_path_buf()));
        }
        let others = if group.is_some() { Mode::S_IRWXO } else { Mode::S_IRWXO | Mode::S_IRWXG };
        let before = umask(others);
        let made = bind_with_pid_file(path);
        umask(before);
        let (socket, pid_file) = made?;
        let listening = Listening {
            socket: socket.into(),
            made: Some(std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())),
            _pid_file: Some(pid_file),
        };
        if let Some(name) = group {
            let found = Group::from_name(name).ok().flatten().ok_or_else(|| ListenError::Group(name.into()))?;
            chown(path, None, Some(found.gid)).map_err(|errno| ListenError::Chown(errno.into()))?;
        }
        Ok(listening)
    }

    fn inherit(fd: RawFd) -> Result<Self, ListenError> {
        if fd < 0 || !is_open(fd) {
            return Err(ListenError::Descriptor(fd));
        }
        // SAFETY: it is open, and nothing else in this process uses it: whoever started the process passed it for this.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // Child processes must not inherit it, too.
        fcntl_setfd(&socket, FdFlags::CLOEXEC).map_err(|_| ListenError::Descriptor(fd))?;
        Ok(Listening { socket, made: None, _pid_file: None })
    }

    /// Path of the socket; none: it was inherited.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.made.as_deref()
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            // The VMM may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: the descriptor is used for one call, which reports it if it is not open.
    fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok()
}

/// Replaces whatever is at the path: the lock of the pid file has shown that nobody uses it.
fn bind_with_pid_file(path: &Path) -> Result<(UnixListener, File), ListenError> {
    let mut pid_file = path.as_os_str().to_owned();
    pid_file.push(".pid");
    let pid_file = PathBuf::from(pid_file);
    let locked = virtiofsd::util::write_pid_file(&pid_file);
    let locked = locked.map_err(|error| ListenError::PidFile { path: pid_file, error })?;
    let _ = fs::remove_file(path);
    Ok((UnixListener::bind(path).map_err(ListenError::Bind)?, locked))
}
