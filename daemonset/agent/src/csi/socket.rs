//! The plugin's own sockets, of which the kubelet knows where they are.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;

/// How often it is tried to become the only plugin.
const TRY_EVERY: Duration = Duration::from_millis(200);

/// Held by the one plugin of a node. The kernel gives it up with the process, however that ends.
pub(super) struct Only {
    _file: File,
}

impl Only {
    /// Waits until no other agent is the plugin. Of two agents of one node, one serves and the other stands by; were
    /// both to register, the end of either would take the driver away.
    ///
    /// # Errors
    /// The directory or the file cannot be made.
    pub(super) async fn take(directory: &Path) -> anyhow::Result<Self> {
        make_directory(directory).with_context(|| format!("directory {}", directory.display()))?;
        let path = directory.join("agent.lock");
        let failed = || format!("lock {}", path.display());
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).mode(0o600).open(&path).with_context(failed)?;
        let mut waits = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Only { _file: file }),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error).with_context(failed),
            }
            if !std::mem::replace(&mut waits, true) {
                tracing::info!("another agent serves the kubelet; standing by");
            }
            sleep(TRY_EVERY).await;
        }
    }
}

/// A directory for which the kubelet's own permissions are the model.
pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

/// A socket of ours. Dropped, it is taken away if it is still there.
pub(super) struct Bound {
    path: PathBuf,
    identity: (u64, u64),
}

impl Bound {
    /// Listens at a path, where a socket of an agent before this one may be left: this is the only one that works here.
    /// Also returns the connections, as a server takes them.
    ///
    /// # Errors
    /// Something else is there, or it cannot be made.
    pub(super) fn at(path: &Path) -> anyhow::Result<(Self, UnixListenerStream)> {
        Self::bind(path).with_context(|| format!("socket {}", path.display()))
    }

    fn bind(path: &Path) -> io::Result<(Self, UnixListenerStream)> {
        if let Some(parent) = path.parent() {
            make_directory(parent)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
            Ok(_) => return Err(io::Error::other("something is there that is not a socket")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let listener = UnixListener::bind(path)?;
        let bound = Bound { path: path.to_path_buf(), identity: identity(path)? };
        Ok((bound, UnixListenerStream::new(listener)))
    }

    /// Is it still there?
    pub(super) fn in_place(&self) -> bool {
        identity(&self.path).is_ok_and(|found| found == self.identity)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if self.in_place() {
            // Whoever comes next replaces what is left.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}
