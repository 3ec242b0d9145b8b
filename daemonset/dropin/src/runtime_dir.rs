//! A directory for the sockets of one session's processes: private, short-lived, and removed at the end.
//!
//! A process that is killed leaves its directory behind. The next one of the same user removes it: nobody holds its lock.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

const PREFIX: &str = "virtiofsd-live.";
const LOCK: &str = "lock";

/// The directory. Dropped, it is removed.
#[derive(Debug)]
pub(crate) struct RuntimeDir {
    directory: TempDir,
    _lock: File,
}

impl RuntimeDir {
    /// Creates one in the first of these directories where it is possible.
    pub(crate) fn create(bases: &[PathBuf]) -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for base in bases {
            match Self::create_in(base) {
                Ok(created) => return Ok(created),
                Err(error) => last = io::Error::new(error.kind(), format!("{}: {error}", base.display())),
            }
        }
        Err(last)
    }

    fn create_in(base: &Path) -> io::Result<Self> {
        sweep(base);
        let private = Permissions::from_mode(0o700);
        let directory = tempfile::Builder::new().prefix(PREFIX).rand_bytes(8).permissions(private).tempdir_in(base)?;
        let unnamed = directory.path().join("lock.new");
        let lock = File::create_new(&unnamed)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        // Not before: another process takes a directory whose lock is free for abandoned.
        fs::rename(&unnamed, directory.path().join(LOCK))?;
        Ok(RuntimeDir { directory, _lock: lock })
    }

    /// Runtime directory of the broker.
    pub(crate) fn broker(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    /// Directory of the keeper.
    pub(crate) fn keeper(&self) -> PathBuf {
        self.directory.path().join("keeper")
    }
}

/// Where the directory may be: `/run` for root, the user's runtime directory, the directory for temporary files.
pub(crate) fn bases(root: bool, user_runtime_dir: Option<&OsStr>) -> Vec<PathBuf> {
    let system = root.then(|| PathBuf::from("/run"));
    let user = user_runtime_dir.map(PathBuf::from).filter(|path| path.is_absolute());
    system.into_iter().chain(user.filter(|_| !root)).chain([std::env::temp_dir(), "/tmp".into()]).collect()
}

/// Removes directories whose process has ended. Those of other users cannot be opened.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && is_abandoned(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A directory without a lock file is one that is being created.
fn is_abandoned(directory: &Path) -> bool {
    let open = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
    let lock = rustix::fs::open(directory.join(LOCK), open, rustix::fs::Mode::empty());
    lock.is_ok_and(|lock| flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_is_removed_at_the_end_or_by_the_next() {
        let base = tempfile::tempdir().unwrap();
        let count = || fs::read_dir(base.path()).unwrap().count();
        let first = RuntimeDir::create_in(base.path()).unwrap();
        let second = RuntimeDir::create_in(base.path()).unwrap();
        assert_eq!(count(), 2, "one that is used stays");
        drop(second);
        assert_eq!(count(), 1);
        // As after a SIGKILL.
        let RuntimeDir { directory, _lock } = first;
        let abandoned = directory.keep();
        drop(_lock);
        let third = RuntimeDir::create_in(base.path()).unwrap();
        assert!(!abandoned.exists());
        let mode = fs::metadata(third.directory.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);
        drop(third);
        assert_eq!(count(), 0);
    }

    #[test]
    fn unusable_directories_are_skipped() {
        let base = tempfile::tempdir().unwrap();
        let created = RuntimeDir::create(&["/nowhere".into(), base.path().into()]).unwrap();
        assert!(created.broker().starts_with(base.path()));
        let error = RuntimeDir::create(&["/nowhere".into()]).unwrap_err();
        assert!(error.to_string().contains("/nowhere"), "{error}");
    }
}
