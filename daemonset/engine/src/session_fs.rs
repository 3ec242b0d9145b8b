//! The file system of one session: the library's, with the guest's node ids and handles kept in the ledger.
//!
//! The guest never sees a number of the library's. Its node ids and handles are the ledger's, and each is resolved to
//! the library's number when this engine first uses it. Operations that must not run twice record the state before them,
//! from which the next engine derives whether they took effect.
//!
//! | module | concern |
//! |---|---|
//! | `operations` | the FUSE operations, in the guest's numbers |
//! | `request` | the identity of the request, passed by value |
//! | `state`: `nodes`, `handles`, `fd_stash`, `check_queue`, `takeover` | what this engine knows beyond the ledger; each part owns its state |
//! | `held_names`, `open_directories`, `stamp` | names that the guest holds, confirmed without the library |
//! | `recent_lookups` | files that may be replaced before the request that follows their LOOKUP |
//! | `resolve`, `names`, `opening`, `open_files`, `attributes`, `file_capabilities`, `removed`, `removed_directory` | nodes, names, open files, changes of files |
//! | `identity` | which file a node is, and the inode number that the guest sees |
//! | `replay` | whether a repeated operation took effect the first time; pure functions |
//! | `staleness`, `audit`, `orphan_scan` | what other processes did to what the guest holds |
//! | `unmapped_ids` | errors of users and groups that this engine cannot act for |
//! | `paths`, `library_io` | paths for people; access to the library's open files |

mod attributes;
mod audit;
mod check_queue;
mod errors;
mod fd_stash;
mod file_capabilities;
mod handles;
mod held_names;
mod identity;
mod library_io;
mod names;
mod nodes;
mod open_directories;
mod open_files;
mod opening;
mod operations;
mod orphan_scan;
mod paths;
mod recent_lookups;
mod removed;
mod removed_directory;
mod replay;
mod request;
mod resolve;
mod staleness;
mod stamp;
mod state;
mod takeover;
mod unmapped_ids;

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtiofs_config::EngineConfig;
use virtiofs_contract::counters::Counters;
use virtiofs_contract::engine::Predecessor;
use virtiofsd::filesystem::FileSystem;

use crate::ledger::{CompletionLog, Ledger, PriorState, RequestId, RequestStatus};
use crate::limits::highest_for_guest;
use crate::mapped_ids::MappedIds;
use crate::orphaned::OrphanedFileServer;
pub(crate) use audit::Audit;
pub(crate) use fd_stash::FdStash;
pub(crate) use identity::HostTree;
pub(crate) use open_directories::DirectorySweep;
pub(crate) use orphan_scan::OrphanScan;
pub(crate) use request::RequestContext;
use state::State;

/// What the device, the file system and the background threads share.
pub(crate) struct SharedState {
    state: Mutex<State>,
    /// Notified when the audit has something to check.
    wake_audit: Condvar,
    /// Notified when a directory or a file is kept open.
    wake_sweep: Condvar,
}

impl SharedState {
    /// `root` identifies the directory that is served: equal for the same directory, never 0.
    pub(crate) fn new(mut ledger: Ledger, stash: FdStash, root: u64) -> Self {
        ledger.set_root(root);
        SharedState {
            state: Mutex::new(State::new(ledger, stash)),
            wake_audit: Condvar::new(),
            wake_sweep: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the ledger over from the engine before this one, which has ended.
    pub(crate) fn take_over(&self, predecessor: Predecessor) {
        let mut state = self.lock();
        state.ledger.take_over(predecessor);
        let unfinished = std::array::from_fn(|ring| state.ledger.has_unfinished(ring));
        let root_changed = state.ledger.update_root();
        state.takeover.take_over(unfinished, root_changed);
        drop(state);
        if root_changed {
            tracing::info!("the source is another directory than before: the guest looks its files up again");
        }
        self.wake_audit.notify_one();
    }

    /// Stops this engine from writing to the ledger unless a ring asks for it.
    pub(crate) fn quiesce(&self) {
        let mut state = self.lock();
        state.takeover.set_quiesced(true);
        let kept = (mem::take(&mut state.directories), mem::take(&mut state.recent));
        drop(state);
        drop(kept);
    }

    /// The state this long after a directory or a file is kept open.
    fn state_after(&self, interval: Duration) -> MutexGuard<'_, State> {
        let waited = self
            .wake_sweep
            .wait_while(self.lock(), |state| state.keeps_nothing())
            .unwrap_or_else(PoisonError::into_inner);
        self.wake_sweep.wait_timeout(waited, interval).unwrap_or_else(PoisonError::into_inner).0
    }

    /// The ledger is this engine's again.
    pub(crate) fn resume(&self) {
        self.lock().takeover.set_quiesced(false);
        self.wake_audit.notify_one();
    }

    /// Begins a request of `ring`, unless an engine before this one has answered it. Returns what the in-flight record
    /// says of it. [`SharedState::finish`] must follow.
    pub(crate) fn begin(&self, ring: usize, position: u16, unique: u64, opcode: u32) -> RequestStatus {
        let id = RequestId { position, unique };
        let mut state = self.lock();
        let status = state.ledger.status(ring, &id);
        let repeated = matches!(status, RequestStatus::Interrupted { .. });
        match status {
            RequestStatus::New => state.ledger.begin(ring, &id),
            RequestStatus::Interrupted { .. } => {
                // It may have been stashed when it was opened; the guest never received its number.
                if let Some(fh) = state.ledger.taken_handle(ring) {
                    state.stash.release(fh);
                }
                state.ledger.restart(ring);
            }
            RequestStatus::Answered { .. } => {}
        }
        state.takeover.set_unfinished(ring, repeated);
        state.current.begin(RequestContext { ring, opcode, repeated });
        status
    }

    /// The request of `ring` has been answered.
    pub(crate) fn finish(&self, ring: usize) {
        let mut state = self.lock();
        state.takeover.set_unfinished(ring, false);
        state.current.finish();
    }

    /// A view of the ledger by which the device records the end of requests.
    pub(crate) fn completion_log(&self) -> CompletionLog {
        self.lock().ledger.completion_log()
    }

    /// The FUSE_INIT request of the guest and its reply, if the guest has mounted.
    pub(crate) fn init(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        self.lock().ledger.init()
    }

    /// Records the FUSE_INIT request of the guest and its reply.
    pub(crate) fn record_init(&self, request: &[u8], reply: &[u8]) {
        self.lock().ledger.record_init(request, reply);
    }

    /// The mount table of this process has changed.
    pub(crate) fn mounts_changed(&self) {
        self.lock().file_systems.mounts_changed();
    }

    /// Says whether the next FUSE_INIT repeats the guest's for this engine alone.
    pub(crate) fn set_replaying_init(&self, on: bool) {
        self.lock().replaying_init = on;
    }
}

/// What of the host the session's file system reaches beside the library.
pub(crate) struct Places {
    /// Where files can be opened by their file handles: the share's root and its submounts. Empty: nowhere.
    pub(crate) mounts: Vec<File>,
    pub(crate) host: HostTree,
    /// The users and groups that exist here.
    pub(crate) mapped_ids: MappedIds,
}

/// A file system that keeps what the guest holds in the ledger.
pub(crate) struct SessionFs<F: FileSystem> {
    library: Arc<F>,
    shared: Arc<SharedState>,
    /// Where stale names and handles are counted; none: detection is off.
    counters: Option<Arc<Counters>>,
    orphaned: OrphanedFileServer,
    /// Takes the data of an append of which a part was written before.
    scratch: File,
    entry_timeout: Duration,
    negative_timeout: Duration,
    announce_submounts: bool,
    /// True if the guest agreed to submounts in FUSE_INIT.
    submounts_agreed: AtomicBool,
    /// Where files can be opened by their file handles: the share's root and its submounts. Empty: nowhere.
    mounts: Vec<File>,
    host: HostTree,
    mapped_ids: MappedIds,
    /// Highest descriptor number for files that the library does not count.
    highest_descriptor: u64,
    /// True if names of extended attributes are translated.
    xattr_names_mapped: bool,
    /// Stash each file when it is opened: nothing can be opened by file handle here, and others may remove files.
    stash_at_open: bool,
}

impl<F: FileSystem> SessionFs<F> {
    pub(crate) fn new(
        library: F,
        shared: Arc<SharedState>,
        counters: Arc<Counters>,
        orphaned: OrphanedFileServer,
        config: &EngineConfig,
        places: Places,
    ) -> io::Result<Self> {
        let Places { mounts, host, mapped_ids } = places;
        let immutable = !config.writable() && config.negative_timeout_ms > 0;
        Ok(SessionFs {
            library: Arc::new(library),
            shared,
            counters: config.detect_staleness.then_some(counters),
            orphaned,
            scratch: memfd_create(c"virtiofs-scratch", MFdFlags::MFD_CLOEXEC)?.into(),
            entry_timeout: Duration::from_millis(config.entry_timeout_ms),
            negative_timeout: Duration::from_millis(config.negative_timeout_ms),
            announce_submounts: config.announce_submounts,
            submounts_agreed: AtomicBool::new(false),
            mapped_ids,
            highest_descriptor: highest_for_guest(),
            xattr_names_mapped: config.xattr_map.is_some(),
            stash_at_open: mounts.is_empty() && !immutable,
            mounts,
            host,
        })
    }

    /// Finds open files that other processes removed.
    pub(crate) fn orphan_scan(&self) -> OrphanScan<F> {
        OrphanScan::new(self.library.clone(), self.shared.clone())
    }

    /// The mount table of this process, which is readable (`EPOLLPRI`) when it has changed.
    pub(crate) fn mount_table(&self) -> RawFd {
        self.host.mountinfo.as_raw_fd()
    }

    /// Closes directories that are not used any more.
    pub(crate) fn directory_sweep(&self) -> DirectorySweep {
        DirectorySweep::new(self.shared.clone())
    }

    /// Checks all that the guest holds, on a thread of its own; none: detection is off.
    pub(crate) fn audit(&self) -> Option<Audit<F>> {
        let counters = self.counters.clone()?;
        Some(Audit::new(self.library.clone(), self.shared.clone(), counters))
    }

    /// The request in progress, and the state for it.
    fn operation(&self) -> (RequestContext, MutexGuard<'_, State>) {
        let mut state = self.shared.lock();
        self.release_ended(&mut state);
        (state.current.get(), state)
    }

    /// The state before the request was first carried out, and whether that may have happened already. The first time
    /// `observe` finds it out, and it is recorded.
    fn prior_state(
        &self,
        state: &mut State,
        request: RequestContext,
        observe: impl FnOnce(&mut State) -> PriorState,
    ) -> (PriorState, bool) {
        let recorded = state.ledger.prior_state(request.ring);
        if request.repeated && recorded.known {
            return (recorded, true);
        }
        let observed = PriorState { known: true, ..observe(state) };
        state.ledger.set_prior_state(request.ring, &observed);
        (observed, false)
    }
}
