//! The runtime directory: a lock for one broker at a time, another for brokers that stand by, and its paths.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

/// Time for which a broker that starts tries the lock. A broker that was killed can leave a child that has not yet started
/// the program of an engine, and such a child still has the lock for an instant; so has a broker that stands by and tries it.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Interval between tries.
const LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// Why the runtime directory cannot be used.
#[derive(Debug, Error)]
pub enum RuntimeDirError {
    /// Another broker has locked it.
    #[error("runtime directory {directory} belongs to a broker that runs as process {holder}")]
    Held {
        /// The directory.
        directory: PathBuf,
        /// The content of the lock file about its holder.
        holder: String,
    },
    /// A file or directory in it cannot be created or used.
    #[error("{path}: {error}")]
    Io {
        /// Its path.
        path: PathBuf,
        /// The error.
        error: io::Error,
    },
}

/// The runtime directory, without its lock.
#[derive(Debug)]
pub(crate) struct UnlockedDir {
    path: PathBuf,
}

/// A place among the brokers that stand by, until this is dropped.
#[derive(Debug)]
pub(crate) struct StandbyLock(#[expect(dead_code, reason = "dropping it unlocks the file")] File);

/// The runtime directory, locked until this is dropped.
#[derive(Debug)]
pub struct RuntimeDir {
    path: PathBuf,
    _lock: File,
}

impl UnlockedDir {
    /// Creates the directory if it is missing.
    pub(crate) fn open(directory: &Path) -> Result<Self, RuntimeDirError> {
        // VMMs run as other users and must reach their sockets.
        make(directory, 0o755)?;
        let path = directory.canonicalize().map_err(|error| at(directory, error))?;
        Ok(UnlockedDir { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the lock; a broker that serves keeps it for longer than this waits.
    pub(crate) fn lock_at_start(&self) -> Result<RuntimeDir, RuntimeDirError> {
        let end = Instant::now() + LOCK_PATIENCE;
        loop {
            match self.lock() {
                Err(RuntimeDirError::Held { .. }) if Instant::now() < end => thread::sleep(LOCK_INTERVAL),
                taken => return taken,
            }
        }
    }

    /// Takes the lock without waiting, before it touches anything else.
    pub(crate) fn lock(&self) -> Result<RuntimeDir, RuntimeDirError> {
        let lock = take_lock(&self.path)?;
        make(&self.path.join("engines"), 0o700)?;
        make(&self.path.join("shares"), 0o755)?;
        Ok(RuntimeDir { path: self.path.clone(), _lock: lock })
    }

    /// Shows the broker that ends that another one is ready to take over.
    pub(crate) fn stand_by(&self) -> Result<StandbyLock, RuntimeDirError> {
        let path = standby_lock(&self.path);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(|error| at(&path, error))?;
        // A broker that ends holds the other lock for an instant.
        flock(&file, FlockOperation::LockShared).map_err(|errno| at(&path, errno.into()))?;
        Ok(StandbyLock(file))
    }
}

impl RuntimeDir {
    /// True if another broker is ready to take over.
    pub(crate) fn has_standby(&self) -> bool {
        let Ok(file) = OpenOptions::new().write(true).open(standby_lock(&self.path)) else { return false };
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn control_socket(&self) -> PathBuf {
        self.path.join("broker.sock")
    }

    /// List of the sessions that exist.
    pub(crate) fn session_list(&self) -> PathBuf {
        self.path.join("sessions")
    }

    /// Directory of short-lived sockets to engines; only the broker can enter it.
    pub(crate) fn engine_sockets(&self) -> PathBuf {
        self.path.join("engines")
    }
}

fn standby_lock(directory: &Path) -> PathBuf {
    directory.join("standby.lock")
}

fn take_lock(directory: &Path) -> Result<File, RuntimeDirError> {
    let path = directory.join("broker.lock");
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o644);
    let mut lock = options.open(&path).map_err(|error| at(&path, error))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        let mut holder = String::new();
        lock.read_to_string(&mut holder).map_err(|error| at(&path, error))?;
        return Err(RuntimeDirError::Held { directory: directory.into(), holder: holder.trim().into() });
    }
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(|error| at(&path, error))?;
    Ok(lock)
}

/// Sets the mode despite the umask, but never on a directory that existed before.
fn make(directory: &Path, mode: u32) -> Result<(), RuntimeDirError> {
    if let Some(parent) = directory.parent().filter(|parent| !parent.exists()) {
        make(parent, 0o755)?;
    }
    match DirBuilder::new().mode(mode).create(directory) {
        Ok(()) => {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(directory, permissions).map_err(|error| at(directory, error))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => Ok(()),
        Err(error) => Err(at(directory, error)),
    }
}

fn at(path: &Path, error: io::Error) -> RuntimeDirError {
    RuntimeDirError::Io { path: path.into(), error }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn second_broker_learns_who_holds_the_lock() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("a/run");
        let second = UnlockedDir::open(&directory).unwrap();
        let first = second.lock().unwrap();
        match second.lock() {
            Err(RuntimeDirError::Held { holder, .. }) => assert_eq!(holder, std::process::id().to_string()),
            other => panic!("{other:?}"),
        }
        let mode = |name: &str| std::fs::metadata(directory.join(name)).unwrap().mode() & 0o777;
        assert_eq!((mode("engines"), mode("shares"), mode(".")), (0o700, 0o755, 0o755));
        drop(first);
        second.lock().unwrap();
    }

    #[test]
    fn lock_that_is_held_for_an_instant_is_waited_for() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = UnlockedDir::open(scratch.path()).unwrap();
        let leftover = directory.lock().unwrap();
        let released = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            drop(leftover);
        });
        directory.lock_at_start().unwrap();
        released.join().unwrap();
    }

    #[test]
    fn broker_that_ends_learns_whether_others_stand_by() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = UnlockedDir::open(scratch.path()).unwrap();
        let serving = directory.lock().unwrap();
        assert!(!serving.has_standby());
        let places = [directory.stand_by().unwrap(), directory.stand_by().unwrap()];
        assert!(serving.has_standby() && serving.has_standby());
        drop(places);
        assert!(!serving.has_standby());
    }

    #[test]
    fn file_instead_of_a_directory_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(UnlockedDir::open(&file), Err(RuntimeDirError::Io { .. })));
    }
}
