//! The part of a session that other threads may read.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{EngineBinary, LastReplacement, OldestRequest, SessionState, SessionStatus, Trace};
use virtiofs_contract::counters::{InProgress, Replacements, Totals};
use virtiofs_contract::preflight::{Finding, Preflight};

use crate::engine::persistent::PersistentState;
use crate::engine::root::Root;
use crate::holder::Hold;
use crate::poll::monotonic_ns;
use crate::record::store::Stored;

/// The shared part of one session.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) id: String,
    vmm_pid: i32,
    pub(crate) connected_at: u64,
    /// The state that outlives the session's engines.
    pub(crate) persistent: Arc<PersistentState>,
    /// The last requested generation.
    generations: AtomicU64,
    view: Mutex<View>,
    /// True if its lines are not logged: there are too many like it, and it has not served yet.
    quiet: Arc<AtomicBool>,
}

/// The changing part of the status.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    /// True once the VMM has sent a valid message. Before that, this is a connection and not a session.
    pub(crate) begun: bool,
    pub(crate) state: SessionState,
    pub(crate) engine_pid: Option<u32>,
    /// Engines that have served, and engines that were started, standby engines included.
    pub(crate) engines: u64,
    pub(crate) engines_started: u64,
    pub(crate) config: EngineConfig,
    pub(crate) guest_memory: u64,
    pub(crate) preflight: Option<Preflight>,
    pub(crate) finding: Option<Finding>,
    pub(crate) replacements: Replacements,
    /// The directory that its engine serves.
    pub(crate) root: Option<Root>,
    /// The directory that was served when the path of the source was found to lead elsewhere, and where it leads.
    pub(crate) moved: Option<(Root, String)>,
    pub(crate) last_replacement: Option<LastReplacement>,
    pub(crate) desired_generation: u64,
    pub(crate) active_generation: u64,
    pub(crate) engine_binary: Option<EngineBinary>,
    /// The last node that the engine described, and its path.
    pub(crate) described: Option<(u64, Option<String>)>,
}

impl View {
    /// That of a connection without an engine.
    fn of(config: EngineConfig) -> Self {
        View {
            begun: false,
            state: SessionState::Connecting,
            engine_pid: None,
            engines: 0,
            engines_started: 0,
            config,
            guest_memory: 0,
            preflight: None,
            finding: None,
            replacements: Replacements::default(),
            root: None,
            moved: None,
            last_replacement: None,
            desired_generation: 0,
            active_generation: 0,
            engine_binary: None,
            described: None,
        }
    }
}

impl Shared {
    pub(crate) fn new(
        id: String,
        vmm: impl AsFd,
        config: EngineConfig,
        quiet: Arc<AtomicBool>,
        hold: Hold,
    ) -> std::io::Result<Self> {
        let persistent = Arc::new(PersistentState::new(config.max_inodes, hold)?);
        // rustix rejects process id 0, which the kernel reports for a process in another PID namespace.
        let peer = getsockopt(&vmm, PeerCredentials)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (generations, view) = (AtomicU64::new(0), Mutex::new(View::of(config)));
        Ok(Shared { id, vmm_pid: peer.pid(), connected_at: now, persistent, generations, view, quiet })
    }

    /// That of a session that began under an earlier broker.
    pub(crate) fn restored(stored: &Stored, persistent: PersistentState) -> Self {
        let Stored { session, vmm_pid, connected_at, progress, .. } = stored;
        let active = progress.active.as_ref().unwrap_or(&progress.desired);
        let view = View {
            begun: progress.begun,
            engines: progress.engines_served,
            engines_started: progress.engines_started,
            replacements: progress.replacements.clone(),
            ..View::of(active.config.clone())
        };
        Shared {
            id: session.clone(),
            vmm_pid: *vmm_pid,
            connected_at: *connected_at,
            persistent: Arc::new(persistent),
            generations: AtomicU64::new(progress.desired.generation),
            view: Mutex::new(view),
            quiet: Arc::default(),
        }
    }

    pub(crate) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if its lines are not to be logged.
    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet.load(Relaxed)
    }

    /// Logs its lines from now on.
    pub(crate) fn speak(&self) {
        self.quiet.store(false, Relaxed);
    }

    /// A new generation. The caller holds the lock of the endpoint, so that commands arrive in the order of generations.
    pub(crate) fn next_generation(&self) -> u64 {
        self.generations.fetch_add(1, Relaxed) + 1
    }

    /// The oldest request in progress.
    fn oldest_request(&self, view: &View) -> Option<OldestRequest> {
        let InProgress { since_ns, opcode, node } = self.persistent.oldest_request()?;
        let age_ms = monotonic_ns().saturating_sub(since_ns) / 1_000_000;
        let path = view.described.as_ref().filter(|(described, _)| *described == node);
        Some(OldestRequest { age_ms, opcode, node, path: path.and_then(|(_, path)| path.clone()) })
    }

    fn trace(&self) -> Option<Trace> {
        let left = Duration::from_nanos(self.persistent.trace.enabled_until().checked_sub(monotonic_ns())?);
        let until = (SystemTime::now() + left).duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Some(Trace { until })
    }

    pub(crate) fn vmm_pid(&self) -> i32 {
        self.vmm_pid
    }

    pub(crate) fn totals(&self) -> Totals {
        Totals { replacements: self.view().replacements.clone(), ..self.persistent.totals() }
    }

    /// Records whether the path of the source leads to `served`, and where else it leads. Ignored if another directory is
    /// served by now.
    pub(crate) fn source_moved(&self, served: Root, leads_to: Option<String>) {
        let mut view = self.view();
        if view.root != Some(served) {
            return;
        }
        let is_new = view.moved.as_ref().map(|(root, _)| *root) != Some(served);
        if let Some(how) = leads_to.as_ref().filter(|_| is_new) {
            tracing::warn!(session = self.id, "source moved: {how}");
            self.persistent.count_source_gone();
        }
        view.moved = leads_to.map(|how| (served, how));
    }

    pub(crate) fn status(&self) -> SessionStatus {
        let view = self.view().clone();
        let inodes_limit = view.config.max_inodes.min(self.persistent.max_inodes);
        SessionStatus {
            id: self.id.clone(),
            state: view.state,
            vmm_pid: self.vmm_pid,
            connected_at: self.connected_at,
            engine_pid: view.engine_pid,
            engines: view.engines,
            oldest_request: self.oldest_request(&view),
            trace: self.trace(),
            stashed_files: self.persistent.stash.count() as u64,
            engine_binary: view.engine_binary,
            active_generation: view.active_generation,
            desired_generation: view.desired_generation,
            last_replacement: view.last_replacement,
            engine: view.config,
            guest_memory: view.guest_memory,
            charged_memory: self.persistent.group().and_then(|group| group.charged()),
            preflight: view.preflight,
            finding: view.finding,
            open_files: view.engine_pid.map_or(0, open_files),
            held: self.persistent.held(),
            inodes_limit,
            totals: self.totals(),
            stale_events: self.persistent.stale_events(),
            unreachable_memory: self.persistent.unreachable_memory(),
            source_gone: view.moved.filter(|(root, _)| Some(*root) == view.root).map(|(_, how)| how),
        }
    }
}

/// Number of open descriptors of a process. Since Linux 6.2 it is the size of the directory; before, they are counted.
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
