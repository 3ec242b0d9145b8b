//! Sources of shares, and what probes found of them.

use std::path::PathBuf;
use std::time::Instant;

use virtiofs_contract::preflight::Finding;

/// A directory that a probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its path without symbolic links.
    pub(crate) path: PathBuf,
    /// Device and inode number. Another pair means another directory.
    pub(crate) identity: (u64, u64),
}

/// Size and free space of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    /// Bytes: total, and available to write.
    pub(crate) bytes: (u64, u64),
    /// Inodes: total, and free.
    pub(crate) inodes: (u64, u64),
}

/// The result of a probe.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Probe {
    /// When it ended.
    pub(crate) at: Instant,
    /// The directory, or why it cannot be served.
    pub(crate) found: Result<Source, Finding>,
    /// True for an empty directory that is no mount point, which is what an unmounted file system leaves.
    pub(crate) bare: bool,
    /// Space of its file system.
    pub(crate) space: Option<Space>,
}

/// What is known of one share's source.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SourceState {
    /// The path as last declared.
    pub(crate) declared: PathBuf,
    /// Since when a probe has been running.
    pub(crate) probing_since: Option<Instant>,
    /// The last probe.
    pub(crate) probe: Option<Probe>,
    /// The canonical path found first. Later probes do not follow links to elsewhere.
    pub(crate) pinned: Option<PathBuf>,
}

impl SourceState {
    /// The directory, if the last probe found it.
    pub(crate) fn source(&self) -> Option<&Source> {
        self.probe.as_ref()?.found.as_ref().ok()
    }
}
