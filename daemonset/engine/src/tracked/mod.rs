//! The library's file system, with the guest's view of it kept in the ledger.
//!
//! The guest never sees a number of the library's: its node ids and handles are the ledger's, and each is
//! resolved to the library's when it is first used in this engine. What must not happen twice is looked at
//! before it is done, and recognised when it is asked again.

mod attributes;
mod audit;
mod files;
mod filesystem;
mod names;
mod orphans;
mod parking;
mod paths;
mod removed;
mod replay;
mod resolve;
mod seams;
mod staleness;
mod state;

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtiofs_config::EngineConfig;
use virtiofs_contract::counters::Counters;
use virtiofs_contract::engine::{Predecessor, QUEUES};
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::soft_idmap::{GuestGid, GuestUid};

use crate::adopted::AdoptedFiles;
use crate::ledger::{Before, Course, Full, Ledger, Log, Ticket};
use crate::limits::highest_for_guest;
pub(crate) use audit::Audit;
use audit::ToCheck;
pub(crate) use orphans::Orphans;
pub(crate) use parking::Parking;
use state::{Bindings, Current, State};

/// What device and file system share: the ledger, and what this engine knows beyond it.
pub(crate) struct Core {
    state: Mutex<State>,
    /// There is something to check.
    wake: Condvar,
}

impl Core {
    /// `root` stands for the directory that is served: equal for the same one, never 0.
    pub(crate) fn new(mut ledger: Ledger, parking: Parking, root: u64) -> Self {
        ledger.serve(root);
        let state = State {
            ledger,
            bindings: Bindings::default(),
            parking,
            current: Current::default(),
            replaying_init: false,
            changes: 0,
            unsettled: [false; QUEUES],
            resting: true,
            root_changed: false,
            to_check: ToCheck::default(),
        };
        Core { state: Mutex::new(state), wake: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine before this one has come to its end: the ledger is this engine's now.
    pub(crate) fn take_over(&self, predecessor: Predecessor) {
        let mut state = self.lock();
        state.ledger.take_over(predecessor);
        state.unsettled = std::array::from_fn(|ring| state.ledger.has_begun(ring));
        state.root_changed = state.ledger.accept_root();
        state.resting = false;
        if state.root_changed {
            tracing::info!("the share's source is another directory now: the guest finds its way anew");
        }
        drop(state);
        self.wake.notify_one();
    }

    /// From now on this engine writes nothing to the ledger unless a ring asks.
    pub(crate) fn rest(&self) {
        self.lock().resting = true;
    }

    /// The ledger is this engine's again.
    pub(crate) fn go_on(&self) {
        self.lock().resting = false;
        self.wake.notify_one();
    }

    /// A request of `ring` has been done that a dead engine had begun.
    pub(crate) fn settled(&self, ring: usize) {
        self.lock().unsettled[ring] = false;
    }

    /// `ring` is about to serve a request: is it a new one? If so, or if it is to run again, its record begins.
    pub(crate) fn begin(&self, ring: usize, position: u16, unique: u64, opcode: u32) -> Course {
        let ticket = Ticket { position, unique };
        let mut state = self.lock();
        let course = state.ledger.course(ring, &ticket);
        match course {
            Course::Fresh => state.ledger.begin(ring, &ticket),
            Course::Again { .. } => {
                // It may have been parked when it was opened; the guest was never told of it.
                if let Some(fh) = state.ledger.taken_handle(ring) {
                    state.parking.release(fh);
                }
                state.ledger.begin_again(ring);
            }
            Course::Answered { .. } => {}
        }
        state.unsettled[ring] = matches!(course, Course::Again { .. });
        state.current = Current { opcode, again: matches!(course, Course::Again { .. }) };
        course
    }

    /// The end of requests, for the device alone.
    pub(crate) fn log(&self) -> Log {
        self.lock().ledger.log()
    }

    /// What guest and session agreed on, if the guest has mounted.
    pub(crate) fn init(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        self.lock().ledger.init()
    }

    /// The guest has mounted, and this is what was agreed.
    pub(crate) fn record_init(&self, request: &[u8], reply: &[u8]) {
        self.lock().ledger.record_init(request, reply);
    }

    /// Is the next FUSE_INIT a repetition of the guest's, for this engine alone?
    pub(crate) fn replay_init(&self, on: bool) {
        self.lock().replaying_init = on;
    }
}

/// A file system that tracks what the guest holds.
pub(crate) struct Tracked<F: FileSystem> {
    inner: Arc<F>,
    core: Arc<Core>,
    /// Where stale events are counted; none: nobody looks for them.
    stale: Option<Arc<Counters>>,
    adopted: AdoptedFiles,
    /// Where an append goes of which a part was written before.
    scratch: File,
    negative_timeout: Duration,
    announce_submounts: bool,
    /// Does the guest know what a mount point in its own mount is?
    submounts_agreed: AtomicBool,
    /// Where files can be opened by their handles: the share's root and its submounts. Empty: nowhere.
    mounts: Vec<File>,
    /// No file that the library does not count gets a higher descriptor.
    highest_descriptor: u64,
    /// Nothing can be opened by its handle here, and others may remove files: park what is opened at once.
    park_at_open: bool,
}

impl<F: FileSystem> Tracked<F> {
    pub(crate) fn new(
        inner: F,
        core: Arc<Core>,
        counters: Arc<Counters>,
        adopted: AdoptedFiles,
        config: &EngineConfig,
        mounts: Vec<File>,
    ) -> io::Result<Self> {
        let promised_unchanging = !config.writable() && config.negative_timeout_ms > 0;
        Ok(Tracked {
            inner: Arc::new(inner),
            core,
            stale: config.detect_staleness.then_some(counters),
            adopted,
            scratch: memfd_create(c"virtiofs-scratch", MFdFlags::MFD_CLOEXEC)?.into(),
            negative_timeout: Duration::from_millis(config.negative_timeout_ms),
            announce_submounts: config.announce_submounts,
            submounts_agreed: AtomicBool::new(false),
            highest_descriptor: highest_for_guest(),
            park_at_open: mounts.is_empty() && !promised_unchanging,
            mounts,
        })
    }

    /// What is to look for open files that others have removed.
    pub(crate) fn orphans(&self) -> Orphans<F> {
        Orphans::new(self.inner.clone(), self.core.clone())
    }

    /// What is to look through all that the guest holds, on a thread of its own.
    pub(crate) fn audit(&self) -> Option<Audit<F>> {
        let counters = self.stale.clone()?;
        Some(Audit::new(self.inner.clone(), self.core.clone(), counters))
    }

    /// The state, with what has ended given back to the library.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.core.lock();
        self.settle(&mut state);
        state
    }

    /// What was true before the request at hand was first carried out, and whether that may have happened already.
    /// The first time it is found out by `look`, and recorded.
    fn before(&self, state: &mut State, look: impl FnOnce(&mut State) -> Before) -> (Before, bool) {
        let recorded = state.ledger.before();
        if state.current.again && recorded.known {
            return (recorded, true);
        }
        let found = Before { known: true, ..look(state) };
        state.ledger.set_before(&found);
        (found, false)
    }
}

/// Who the engine is when it looks for itself.
fn ourselves() -> Context {
    Context { uid: GuestUid::from(0), gid: GuestGid::from(0), pid: 0 }
}

fn no_room(_: Full) -> io::Error {
    error(libc::ENFILE)
}

fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}
