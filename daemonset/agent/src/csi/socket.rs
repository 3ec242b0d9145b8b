//! The plugin's sockets, at paths that the kubelet knows.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;

/// Time between two attempts to become the only plugin.
const LOCK_EVERY: Duration = Duration::from_millis(200);

/// Held by the only plugin of a node. The kernel releases it when the process ends.
pub(super) struct PluginLock {
    _file: File,
}

impl PluginLock {
    /// Waits until no other agent is the plugin. If two agents of one node registered, the end of either would unregister the
    /// driver.
    ///
    /// # Errors
    /// The directory or the lock file cannot be created.
    pub(super) async fn take(directory: &Path) -> anyhow::Result<Self> {
        make_directory(directory).with_context(|| format!("directory {}", directory.display()))?;
        let path = directory.join("agent.lock");
        let failed = || format!("lock {}", path.display());
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).mode(0o600).open(&path).with_context(failed)?;
        let mut waits = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(PluginLock { _file: file }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error).with_context(failed),
            }
            if !std::mem::replace(&mut waits, true) {
                tracing::info!("another agent serves the kubelet; standing by");
            }
            sleep(LOCK_EVERY).await;
        }
    }
}

/// Creates a directory with the mode that the kubelet uses.
pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

/// A listening socket. Dropping it removes the file if it is still the same.
pub(super) struct Bound {
    path: PathBuf,
    identity: (u64, u64),
}

impl Bound {
    /// Listens at a path and replaces the socket of an earlier agent. Also returns the stream of connections.
    ///
    /// # Errors
    /// The path is no socket, or the socket cannot be created.
    pub(super) fn at(path: &Path) -> anyhow::Result<(Self, UnixListenerStream)> {
        Self::bind(path).with_context(|| format!("socket {}", path.display()))
    }

    fn bind(path: &Path) -> io::Result<(Self, UnixListenerStream)> {
        if let Some(parent) = path.parent() {
            make_directory(parent)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
            Ok(_) => return Err(io::Error::other("not a socket")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let listener = UnixListener::bind(path)?;
        let bound = Bound { path: path.to_path_buf(), identity: identity(path)? };
        Ok((bound, UnixListenerStream::new(listener)))
    }

    /// True if the file is still this socket.
    pub(super) fn in_place(&self) -> bool {
        identity(&self.path).is_ok_and(|found| found == self.identity)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if self.in_place() {
            // The next agent replaces a remaining file.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}
