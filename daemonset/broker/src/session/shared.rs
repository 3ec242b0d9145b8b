//! What others may see of a session while its thread works.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use virtiofs_contract::config::EngineConfig;
use virtiofs_contract::control::{SessionState, SessionStatus};
use virtiofs_contract::counters::{Exchanges, Totals};
use virtiofs_contract::preflight::{Finding, Preflight};

use super::estate::Estate;
use crate::engine::root::Root;

/// The public side of one session.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) id: String,
    vmm_pid: i32,
    connected_at: u64,
    /// What this session's engines leave to each other.
    pub(crate) estate: Arc<Estate>,
    view: Mutex<View>,
}

/// What changes in the course of a session.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    /// Has the VMM sent a valid message? Before, this is a connection and not a session.
    pub(crate) begun: bool,
    pub(crate) state: SessionState,
    pub(crate) engine_pid: Option<u32>,
    /// Engines that have served, and those that were started for it, spares included.
    pub(crate) engines: u64,
    pub(crate) engines_started: u64,
    pub(crate) config: EngineConfig,
    pub(crate) guest_memory: u64,
    pub(crate) preflight: Option<Preflight>,
    pub(crate) finding: Option<Finding>,
    pub(crate) exchanges: Exchanges,
    /// The directory that its engine serves.
    pub(crate) root: Option<Root>,
    /// The directory that was served when the path of the source was seen to lead elsewhere, and how so.
    pub(crate) departure: Option<(Root, String)>,
}

impl Shared {
    pub(crate) fn new(id: String, vmm: &UnixStream, config: EngineConfig) -> std::io::Result<Self> {
        let estate = Arc::new(Estate::new(config.max_inodes)?);
        // Not rustix's: that knows no process 0, which is what the kernel says of one in another PID namespace.
        let peer = getsockopt(vmm, PeerCredentials)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let view = View {
            begun: false,
            state: SessionState::Connecting,
            engine_pid: None,
            engines: 0,
            engines_started: 0,
            config,
            guest_memory: 0,
            preflight: None,
            finding: None,
            exchanges: Exchanges::default(),
            root: None,
            departure: None,
        };
        Ok(Shared { id, vmm_pid: peer.pid(), connected_at: now, estate, view: Mutex::new(view) })
    }

    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn vmm_pid(&self) -> i32 {
        self.vmm_pid
    }

    pub(crate) fn totals(&self) -> Totals {
        Totals { exchanges: self.view().exchanges.clone(), ..self.estate.totals() }
    }

    /// The path of the source does not lead to `served` any more, or it does: is that news, and does it still matter?
    pub(crate) fn departed(&self, served: Root, departure: Option<String>) {
        let mut view = self.view();
        if view.root != Some(served) {
            return;
        }
        let news = view.departure.as_ref().map(|(root, _)| *root) != Some(served);
        if let Some(how) = departure.as_ref().filter(|_| news) {
            tracing::warn!(session = self.id, "the source is not what is served any more: {how}");
            self.estate.source_gone();
        }
        view.departure = departure.map(|how| (served, how));
    }

    pub(crate) fn status(&self) -> SessionStatus {
        let view = self.view().clone();
        let inodes_limit = view.config.max_inodes.min(self.estate.room);
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
            held: self.estate.held(),
            inodes_limit,
            totals: self.totals(),
            stale_events: self.estate.stale_events(),
            source_gone: view.departure.filter(|(root, _)| Some(*root) == view.root).map(|(_, how)| how),
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
