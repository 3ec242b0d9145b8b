//! Stock virtiofsd: the reference that the engine is compared with, and a check of this harness.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::parts::Parts;
use crate::process::Process;

const START: Duration = Duration::from_secs(60);

/// A stock virtiofsd that serves one guest. Killed on drop.
pub struct Stock {
    process: Process,
    socket: PathBuf,
    _dir: TempDir,
}

impl Stock {
    /// Starts virtiofsd on `shared` with these additional options, and waits for its socket.
    ///
    /// # Errors
    /// If it does not start; the message has its log.
    pub fn start(parts: &Parts, shared: &Path, options: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("stock-").tempdir().context("making a directory for virtiofsd")?;
        let socket = dir.path().join("socket");
        let mut command = Command::new(&parts.virtiofsd);
        command.arg("--shared-dir").arg(shared).arg("--socket-path").arg(&socket).args(options);
        let process = Process::start(command, &dir.path().join("virtiofsd.log"), Duration::from_secs(5))?;
        wait_for_socket(&process, &socket)?;
        Ok(Self { process, socket, _dir: dir })
    }

    /// Path of its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        self.process.log_tail()
    }
}

/// Waits until `process` has created the socket.
pub(crate) fn wait_for_socket(process: &Process, socket: &Path) -> Result<()> {
    let until = Instant::now() + START;
    while !socket.exists() {
        if let Some(status) = process.ended()? {
            bail!("the process ended with {status} before it created {}\n{}", socket.display(), process.log_tail());
        }
        ensure!(Instant::now() < until, "{} did not appear\n{}", socket.display(), process.log_tail());
        process.wait_for(Duration::from_millis(10))?;
    }
    Ok(())
}
