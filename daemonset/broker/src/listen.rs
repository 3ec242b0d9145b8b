//! Listening sockets: created at paths with owner and mode or not at all, and never in place of another file; or made by
//! whoever requests the endpoint.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Stat, chmod, chownat, fstat, openat, renameat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Gid, Uid};
use thiserror::Error;
use virtiofs_contract::control::{EndpointKind, SocketSpec};

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Why a socket cannot be created.
#[derive(Debug, Error)]
pub(crate) enum ListenError {
    #[error("socket path {0} names no file in a directory")]
    NotAPath(PathBuf),
    #[error("directory {directory} of the socket: {error}")]
    Directory { directory: PathBuf, error: io::Error },
    #[error("the descriptor sent for the directory of {0} is not a directory")]
    NotADirectory(PathBuf),
    #[error("the descriptor sent as the socket {0} is not a Unix socket that listens")]
    NotListening(PathBuf),
    #[error("{0} exists and is not a socket")]
    Foreign(PathBuf),
    #[error("another process listens on {0}")]
    Taken(PathBuf),
    #[error("socket {0}: the file system of its directory does not respond")]
    Blocked(PathBuf),
    #[error("socket {0} was removed while it was being changed")]
    Removed(PathBuf),
    #[error("socket {path}: {error}")]
    Io { path: PathBuf, error: io::Error },
}

/// A path below an open directory that fits into `sun_path` (108 bytes), however long the path of the directory is.
pub(crate) fn path_below(directory: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}

/// A socket that listens. Its directory may be on a file system that hangs; the comments of methods that may block say so.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    listener: UnixListener,
    /// Where it was bound; none: the requester made it, and its path is the requester's concern.
    path: Option<BoundPath>,
    identity: (u64, u64),
    /// What the last check found.
    in_place: AtomicBool,
}

/// The path of a socket.
#[derive(Debug)]
struct BoundPath {
    directory: OwnedFd,
    name: OsString,
}

/// What a request says about where to listen.
#[derive(Debug)]
pub(crate) enum Given {
    /// At the path of the socket.
    Path,
    /// In this directory.
    Directory(Directory),
    /// At this socket.
    Listener(UnixListener),
}

impl Given {
    /// From the descriptor of a request, if it has one. May block.
    pub(crate) fn new(kind: EndpointKind, fd: Option<OwnedFd>, path: &Path) -> Result<Self, ListenError> {
        match fd {
            None => Ok(Given::Path),
            Some(fd) if kind == EndpointKind::Listener && listens(&fd) => Ok(Given::Listener(fd.into())),
            Some(_) if kind == EndpointKind::Listener => Err(ListenError::NotListening(path.into())),
            Some(fd) => Directory::given(fd, path).map(Given::Directory),
        }
    }

    /// True if this socket is what the request describes. May block.
    pub(crate) fn is(&self, socket: &BoundSocket) -> bool {
        match self {
            Given::Path => true,
            Given::Directory(directory) => socket.is_in(directory),
            Given::Listener(listener) => {
                socket.path.is_none() && own_identity(listener).is_ok_and(|given| given == socket.identity)
            }
        }
    }
}

/// True if this is a Unix stream socket that listens.
fn listens(fd: &OwnedFd) -> bool {
    use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
    socket_domain(fd).is_ok_and(|domain| domain == AddressFamily::UNIX)
        && socket_type(fd).is_ok_and(|kind| kind == SocketType::STREAM)
        && socket_acceptconn(fd).unwrap_or(false)
}

/// The directory of a socket, opened.
#[derive(Debug)]
pub(crate) struct Directory(OwnedFd);

impl Directory {
    /// Opens the directory of a socket's path.
    pub(crate) fn of_path(path: &Path) -> Result<Self, ListenError> {
        let parent = path.parent().ok_or_else(|| ListenError::NotAPath(path.into()))?;
        openat(CWD, parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map(Directory)
            .map_err(|errno| ListenError::Directory { directory: parent.into(), error: errno.into() })
    }

    /// The directory whose descriptor was sent for the socket of this path.
    pub(crate) fn given(fd: OwnedFd, path: &Path) -> Result<Self, ListenError> {
        match fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Ok(FileType::Directory) => Ok(Directory(fd)),
            _ => Err(ListenError::NotADirectory(path.into())),
        }
    }

    /// A directory that an earlier broker used.
    pub(crate) fn held(fd: OwnedFd) -> Self {
        Directory(fd)
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        own_identity(&self.0)
    }
}

impl BoundSocket {
    /// Binds at the path, or in the given directory, or takes the given socket.
    pub(crate) fn at(given: Given, spec: &SocketSpec) -> Result<Self, ListenError> {
        match given {
            Given::Path => Self::bind(spec),
            Given::Directory(directory) => Self::bind_in(directory, spec),
            Given::Listener(listener) => Self::of_requester(listener, &spec.path),
        }
    }

    /// A socket that the requester made.
    pub(crate) fn of_requester(listener: UnixListener, path: &Path) -> Result<Self, ListenError> {
        let identity = own_identity(&listener);
        let identity = identity.map_err(|error| ListenError::Io { path: path.into(), error })?;
        Ok(Self::new(listener, None, identity))
    }

    /// Binds in the directory of the path.
    pub(crate) fn bind(spec: &SocketSpec) -> Result<Self, ListenError> {
        Self::bind_in(Directory::of_path(&spec.path)?, spec)
    }

    /// Binds under a temporary name, sets owner and mode, listens, and renames the socket, so that whoever finds it can
    /// connect. Replaces a socket on which nobody listens.
    pub(crate) fn bind_in(Directory(directory): Directory, spec: &SocketSpec) -> Result<Self, ListenError> {
        let name = spec.path.file_name().ok_or_else(|| ListenError::NotAPath(spec.path.clone()))?.to_owned();
        remove_dead_socket(directory.as_fd(), &name, &spec.path)?;
        let temporary_name =
            OsString::from(format!(".virtiofs-{}-{}", std::process::id(), SERIAL.fetch_add(1, Relaxed)));
        let bound = Self::bind_as(spec, directory, name, &temporary_name);
        bound.map_err(|error| ListenError::Io { path: spec.path.clone(), error })
    }

    fn bind_as(spec: &SocketSpec, directory: OwnedFd, name: OsString, temporary: &OsStr) -> io::Result<Self> {
        unlink_if_there(directory.as_fd(), temporary)?;
        let listener = UnixListener::bind(path_below(directory.as_fd(), temporary))?;
        let finished = set_access_at(directory.as_fd(), temporary, spec)
            .and_then(|()| identity_at(directory.as_fd(), temporary))
            .and_then(|identity| Ok(renameat(&directory, temporary, &directory, &name).map(|()| identity)?));
        match finished {
            Ok(identity) => Ok(Self::new(listener, Some(BoundPath { directory, name }), identity)),
            Err(error) => {
                unlink_if_there(directory.as_fd(), temporary)?;
                Err(error)
            }
        }
    }

    fn new(listener: UnixListener, path: Option<BoundPath>, identity: (u64, u64)) -> Self {
        BoundSocket { listener, path, identity, in_place: AtomicBool::new(true) }
    }

    /// The socket of an earlier broker.
    pub(crate) fn restored(
        listener: OwnedFd,
        Directory(directory): Directory,
        path: &Path,
        identity: (u64, u64),
    ) -> Result<Self, ListenError> {
        let name = path.file_name().ok_or_else(|| ListenError::NotAPath(path.into()))?.to_owned();
        Ok(Self::new(UnixListener::from(listener), Some(BoundPath { directory, name }), identity))
    }

    /// Device and inode number of the socket's file, or of the socket itself if the requester made it.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// The directory, opened for reading: systemd stores no descriptor that was opened with `O_PATH`. None: it may only
    /// be searched. May block.
    pub(crate) fn readable_directory(&self) -> Option<OwnedFd> {
        let path = self.path.as_ref()?;
        openat(&path.directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// True if it is in this directory. May block.
    pub(crate) fn is_in(&self, directory: &Directory) -> bool {
        let own = self.path.as_ref().and_then(|path| own_identity(&path.directory).ok());
        own.is_some_and(|own| directory.identity().is_ok_and(|other| own == other))
    }

    /// Checks whether the path still leads to this socket. May block.
    pub(crate) fn check(&self) -> bool {
        let leads_here = |path: &BoundPath| identity_at(path.directory.as_fd(), &path.name).ok() == Some(self.identity);
        let found = self.path.as_ref().is_none_or(leads_here);
        self.in_place.store(found, Relaxed);
        found
    }

    /// What the last [`check`](Self::check) found. Does not block.
    pub(crate) fn in_place(&self) -> bool {
        self.in_place.load(Relaxed)
    }

    /// Nobody can connect until the next check has found it.
    pub(crate) fn presume_missing(&self) {
        self.in_place.store(false, Relaxed);
    }

    /// Sets owner, group and mode. May block.
    pub(crate) fn set_access(&self, spec: &SocketSpec) -> io::Result<()> {
        self.path.as_ref().map_or(Ok(()), |path| set_access_at(path.directory.as_fd(), &path.name, spec))
    }

    /// Removes the path, unless another file is there by now. May block.
    pub(crate) fn unlink(&self) {
        if self.check()
            && let Some(path) = &self.path
            && let Err(error) = unlink_if_there(path.directory.as_fd(), &path.name)
        {
            tracing::warn!(socket = ?path.name, %error, "socket not unlinked");
        }
    }
}

fn own_identity(fd: &impl AsFd) -> io::Result<(u64, u64)> {
    let Stat { st_dev, st_ino, .. } = fstat(fd)?;
    Ok((st_dev, st_ino))
}

/// Removes a socket on which nobody listens. Any other file is an error.
fn remove_dead_socket(directory: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<(), ListenError> {
    match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(ListenError::Io { path: path.into(), error: errno.into() }),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => Err(ListenError::Foreign(path.into())),
        Ok(_) if answers(directory, name) => Err(ListenError::Taken(path.into())),
        Ok(_) => Ok(()),
    }
}

/// Connects through a descriptor of the socket file, because its name alone may be longer than `sun_path`. Does not wait
/// for a listener that does not accept.
fn answers(directory: BorrowedFd<'_>, name: &OsStr) -> bool {
    let Ok(file) = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) else {
        return false;
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connected = SocketAddrUnix::new(format!("/proc/self/fd/{}", file.as_raw_fd())).and_then(|address| {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)
    });
    matches!(connected, Ok(()) | Err(Errno::AGAIN))
}

/// Uses a descriptor, because a user who may write in the directory can replace the socket by a symbolic link at any
/// time.
fn set_access_at(directory: BorrowedFd<'_>, name: &OsStr, spec: &SocketSpec) -> io::Result<()> {
    let file = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("something else is there by now"));
    }
    let (owner, group) = (spec.owner.map(Uid::from_raw), spec.group.map(Gid::from_raw));
    if owner.is_some() || group.is_some() {
        chownat(&file, "", owner, group, AtFlags::EMPTY_PATH)?;
    }
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(chmod(itself, Mode::from_raw_mode(spec.mode))?)
}

fn identity_at(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<(u64, u64)> {
    let Stat { st_dev, st_ino, .. } = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((st_dev, st_ino))
}

fn unlink_if_there(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    fn spec(path: PathBuf) -> SocketSpec {
        SocketSpec { path, owner: None, group: None, mode: 0o660 }
    }

    #[test]
    fn socket_has_its_mode_and_no_temporary_file_is_left() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("s.sock");
        let socket = BoundSocket::bind(&spec(path.clone())).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        UnixStream::connect(&path).unwrap();
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 1);
        socket.set_access(&SocketSpec { mode: 0o600, ..spec(path.clone()) }).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        socket.unlink();
        assert!(!path.exists());
    }

    #[test]
    fn socket_is_bound_in_the_open_directory() {
        let scratch = tempfile::tempdir().unwrap();
        let (here, there) = (scratch.path().join("here"), scratch.path().join("there"));
        std::fs::create_dir(&here).unwrap();
        std::fs::create_dir(&there).unwrap();
        let spec = spec("/nowhere/at/all/s.sock".into());
        let open = |path: &Path| OwnedFd::from(std::fs::File::open(path).unwrap());
        let socket = BoundSocket::bind_in(Directory::given(open(&here), &spec.path).unwrap(), &spec).unwrap();
        UnixStream::connect(here.join("s.sock")).unwrap();
        assert!(socket.is_in(&Directory::given(open(&here), &spec.path).unwrap()));
        assert!(!socket.is_in(&Directory::given(open(&there), &spec.path).unwrap()));
        socket.unlink();
        assert_eq!(std::fs::read_dir(&here).unwrap().count(), 0);
        std::fs::write(here.join("file"), "").unwrap();
        let refused = Directory::given(open(&here.join("file")), &spec.path);
        assert!(matches!(refused, Err(ListenError::NotADirectory(_))));
    }

    #[test]
    fn link_in_place_of_the_socket_is_not_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let (path, precious) = (scratch.path().join("s.sock"), scratch.path().join("precious"));
        std::fs::write(&precious, "").unwrap();
        std::fs::set_permissions(&precious, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let socket = BoundSocket::bind(&spec(path.clone())).unwrap();
        std::fs::remove_file(&path).unwrap();
        symlink(&precious, &path).unwrap();
        let owned = SocketSpec { owner: Some(rustix::process::getuid().as_raw()), mode: 0o777, ..spec(path) };
        assert!(socket.set_access(&owned).is_err());
        assert_eq!(std::fs::metadata(&precious).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn long_path_can_be_bound() {
        let scratch = tempfile::tempdir().unwrap();
        let deep = scratch.path().join("d".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let long_name = deep.join(format!("{}.sock", "n".repeat(200)));
        let socket = BoundSocket::bind(&spec(long_name.clone())).unwrap();
        assert!(socket.check());
        assert!(matches!(BoundSocket::bind(&spec(long_name)), Err(ListenError::Taken(_))));
    }

    #[test]
    fn only_a_dead_socket_is_replaced() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("s.sock");
        drop(UnixListener::bind(&path).unwrap());
        let socket = BoundSocket::bind(&spec(path.clone())).unwrap();
        assert!(matches!(BoundSocket::bind(&spec(path)), Err(ListenError::Taken(_))));
        assert!(socket.check());
    }

    #[test]
    fn full_backlog_does_not_block() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("s.sock");
        let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        let (answer, answered) = mpsc::channel();
        std::thread::spawn(move || answer.send(BoundSocket::bind(&spec(path))));
        let answer = answered.recv_timeout(Duration::from_secs(60)).expect("it waits for the listener");
        assert!(matches!(answer, Err(ListenError::Taken(_))));
    }

    #[test]
    fn other_files_are_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        let link = scratch.path().join("link");
        symlink("file", &link).unwrap();
        for path in [file.clone(), link] {
            assert!(matches!(BoundSocket::bind(&spec(path)), Err(ListenError::Foreign(_))));
        }
        assert_eq!(std::fs::read_to_string(file).unwrap(), "precious");
        let nowhere = scratch.path().join("missing/s.sock");
        assert!(matches!(BoundSocket::bind(&spec(nowhere)), Err(ListenError::Directory { .. })));
        assert!(matches!(BoundSocket::bind(&spec("/".into())), Err(ListenError::NotAPath(_))));
    }

    #[test]
    fn replaced_socket_is_not_unlinked() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("s.sock");
        let socket = BoundSocket::bind(&spec(path.clone())).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "someone else's").unwrap();
        assert!(!socket.check());
        socket.unlink();
        assert!(path.exists());
    }
}
