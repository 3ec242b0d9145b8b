//! What others may see of a session while its thread works.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use virtiofs_contract::config::EngineConfig;
use virtiofs_contract::control::{SessionState, SessionStatus};
use virtiofs_contract::counters::Counters;
use virtiofs_contract::preflight::{Finding, Preflight};

/// The public side of one session.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) id: String,
    vmm_pid: i32,
    connected_at: u64,
    /// The page that engines of this session count in, and the broker's own view of it.
    pub(crate) counter_page: OwnedFd,
    counters: Counters,
    view: Mutex<View>,
}

/// What changes in the course of a session.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    /// Has the VMM sent a valid message? Before, this is a connection and not a session.
    pub(crate) begun: bool,
    pub(crate) state: SessionState,
    pub(crate) engine_pid: Option<u32>,
    pub(crate) engines: u64,
    pub(crate) config: EngineConfig,
    pub(crate) guest_memory: u64,
    pub(crate) preflight: Option<Preflight>,
    pub(crate) finding: Option<Finding>,
}

impl Shared {
    pub(crate) fn new(id: String, vmm: &UnixStream, config: EngineConfig) -> std::io::Result<Self> {
        let (counter_page, counters) = Counters::create()?;
        let peer = rustix::net::sockopt::socket_peercred(vmm.as_fd())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let view = View {
            begun: false,
            state: SessionState::Connecting,
            engine_pid: None,
            engines: 0,
            config,
            guest_memory: 0,
            preflight: None,
            finding: None,
        };
        Ok(Shared {
            id,
            vmm_pid: peer.pid.as_raw_pid(),
            connected_at: now,
            counter_page,
            counters,
            view: Mutex::new(view),
        })
    }

    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn vmm_pid(&self) -> i32 {
        self.vmm_pid
    }

    pub(crate) fn totals(&self) -> virtiofs_contract::counters::Totals {
        self.counters.totals()
    }

    pub(crate) fn status(&self) -> SessionStatus {
        let view = self.view().clone();
        SessionStatus {
            id: self.id.clone(),
            state: view.state,
            vmm_pid: self.vmm_pid,
            connected_at: self.connected_at,
            engine_pid: view.engine_pid,
            engines: view.engines,
            engine: view.config,
            guest_memory: view.guest_memory,
            preflight: view.preflight,
            finding: view.finding,
            open_files: view.engine_pid.map_or(0, open_files),
            totals: self.totals(),
        }
    }
}

/// Number of descriptors of a process. Since Linux 6.2 the directory's size tells; before, they are counted.
fn open_files(pid: u32) -> u64 {
    let directory = format!("/proc/{pid}/fd");
    match std::fs::metadata(&directory) {
        Ok(metadata) if metadata.len() > 0 => metadata.len(),
        Ok(_) => std::fs::read_dir(directory).map_or(0, |entries| entries.count() as u64),
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_open_files_are_counted() {
        let files: Vec<_> = (0..50).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        assert!(open_files(std::process::id()) >= files.len() as u64);
        assert_eq!(open_files(u32::MAX), 0);
    }
}
