//! The control group of a session: the memory that its engines use is charged to it, not to the broker's group.
//!
//! The kernel charges a page to the group of the process that touches it first: guest memory that the VMM has not touched,
//! pages of the source's files that are not in the page cache. The charge stays with that group until the page is freed. So
//! the group outlives the engines of the session.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::cgroup::remove;
use super::settings::Version;

/// The control group of a session. Dropping it removes it; its engines must be reaped before.
#[derive(Debug)]
pub(crate) struct SessionGroup {
    version: Version,
    path: PathBuf,
}

impl SessionGroup {
    /// Creates it.
    pub(super) fn create(version: Version, path: PathBuf) -> io::Result<Self> {
        fs::create_dir(&path)?;
        Ok(SessionGroup { version, path })
    }

    /// One that exists.
    pub(super) fn restored(version: Version, path: PathBuf) -> Self {
        SessionGroup { version, path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Where groups of engines are below it; none: engines are in it. Version 2 has no processes in a group that gives
    /// controllers to groups below it.
    pub(super) fn parent_of_engines(&self) -> Option<&Path> {
        (self.version == Version::Two).then_some(&self.path)
    }

    /// Bytes that are charged to it.
    pub(crate) fn charged(&self) -> Option<u64> {
        let file = match self.version {
            Version::One => "memory.usage_in_bytes",
            Version::Two => "memory.current",
        };
        fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()
    }
}

impl Drop for SessionGroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}
