//! The state of the session's file system, behind one lock. Each part owns its own state.

use crate::ledger::Ledger;

use super::check_queue::{CheckQueue, NameChanges};
use super::fd_stash::FdStash;
use super::handles::OpenHandles;
use super::identity::FileSystems;
use super::nodes::NodeBindings;
use super::open_directories::OpenDirectories;
use super::recent_lookups::RecentLookups;
use super::request::CurrentRequest;
use super::takeover::Takeover;

/// The parts, which are locked together.
pub(crate) struct State {
    /// What the guest holds, in memory that outlives this engine.
    pub(super) ledger: Ledger,
    /// What the guest's nodes are in this engine.
    pub(super) nodes: NodeBindings,
    /// Directories that are kept open.
    pub(super) directories: OpenDirectories,
    /// Files that are kept open for the request that follows their LOOKUP.
    pub(super) recent: RecentLookups,
    /// What the guest's handles are in this engine.
    pub(super) handles: OpenHandles,
    /// Which file systems there are below the root.
    pub(super) file_systems: FileSystems,
    /// Open files that the broker keeps.
    pub(super) stash: FdStash,
    /// Changes of names by the guest itself.
    pub(super) name_changes: NameChanges,
    /// Nodes that the guest opened by a name in its cache.
    pub(super) to_check: CheckQueue,
    /// Whose the ledger is.
    pub(super) takeover: Takeover,
    /// The request that passes through the library.
    pub(super) current: CurrentRequest,
    /// True while the FUSE_INIT of an earlier engine is repeated for this one.
    pub(super) replaying_init: bool,
}

impl State {
    /// The state of an engine that has not taken over yet.
    pub(super) fn new(ledger: Ledger, stash: FdStash) -> Self {
        State {
            ledger,
            nodes: NodeBindings::default(),
            directories: OpenDirectories::default(),
            recent: RecentLookups::default(),
            handles: OpenHandles::default(),
            file_systems: FileSystems::default(),
            stash,
            name_changes: NameChanges::default(),
            to_check: CheckQueue::default(),
            takeover: Takeover::default(),
            current: CurrentRequest::default(),
            replaying_init: false,
        }
    }

    /// True if no directory and no file is kept open for later requests.
    pub(super) fn keeps_nothing(&self) -> bool {
        self.directories.is_empty() && self.recent.is_empty()
    }

    /// The guest holds nothing any more.
    pub(super) fn clear(&mut self) {
        self.name_changes.count();
        self.ledger.clear();
        self.nodes = NodeBindings::default();
        self.directories = OpenDirectories::default();
        self.recent = RecentLookups::default();
        self.handles = OpenHandles::default();
        self.stash.release_all();
    }
}
