//! Directories that this engine keeps open for a short time, so that a name below them takes one system call.
//!
//! The library opens a directory by its file handle for each request about a name below it, and the name itself to read
//! what it is. Below a directory that is open, one `statx` shows whether a name still leads to the file that the guest
//! holds by it (see [`super::stamp`]).
//!
//! An open directory that another process removes stays alive, and its file handle can still be opened: the library would
//! not report that it is stale. So before an answer says that a name does not exist, and before the library uses the
//! directory, its link count is read. A removed directory is closed, and the library then answers as if it had never
//! been open.
//!
//! Few directories are open, each until it has not been used for [`SWEEP_INTERVAL`]. Files are kept open only where they are
//! replaced or removed at a high rate, and for less than two seconds ([`super::recent_lookups`]), because a removed one takes
//! space until it is closed.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustc_hash::FxHashMap;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, fstatfs, openat, statx, unlinkat};

use crate::ledger::Slot;

use super::SharedState;
use super::stamp::{Found, Mount};

/// Most directories that are open. `limits::TRANSIENT_FILES` reserves descriptors for them.
const MAX_OPEN: usize = 64;

/// Uses of a directory after which it is opened: opening takes as many system calls as a few uses save.
const USES_BEFORE_OPEN: u8 = 3;

/// Most directories whose uses are counted.
const MAX_COUNTED: usize = 1024;

/// A directory that was not used between two sweeps is closed.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// File systems on which the kernel alone sets birth times, and never two of one inode number alike: ext2 to ext4, XFS,
/// btrfs, tmpfs.
const TRUSTED_FILE_SYSTEMS: [u32; 4] = [0xef53, 0x5846_5342, BTRFS, 0x0102_1994];

/// The subvolumes of btrfs share a mount, and each has a file system number of its own.
const BTRFS: u32 = 0x9123_683e;

/// A directory that is open.
pub(super) struct OpenDirectory {
    /// An `O_PATH` descriptor.
    descriptor: File,
    mount: Mount,
    /// The number of its file system, as handles record it. None: its mount has several.
    file_system: Option<u64>,
    used: Cell<bool>,
}

impl OpenDirectory {
    /// Keeps the directory open that `listing` has open for reading; none if its file system is not one on which names can
    /// be confirmed. `file_system`: its number, as handles record it.
    pub(super) fn open(listing: &File, file_system: u64) -> io::Result<Option<Self>> {
        let kind = fstatfs(listing)?.f_type as u32;
        if !TRUSTED_FILE_SYSTEMS.contains(&kind) {
            return Ok(None);
        }
        let file_system = (kind != BTRFS).then_some(file_system);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let descriptor = File::from(openat(listing, c".", flags, Mode::empty())?);
        let Some(mount) = Mount::of(&descriptor)? else { return Ok(None) };
        Ok(Some(OpenDirectory { descriptor, mount, file_system, used: Cell::new(false) }))
    }

    /// What `name` leads to now.
    ///
    /// # Errors
    /// Those of statx(2). `ENOENT` also if the directory was removed: see [`OpenDirectory::is_removed`].
    pub(super) fn find(&self, name: &CStr) -> io::Result<Found> {
        self.used.set(true);
        Found::below(&self.descriptor, name, self.mount)
    }

    /// The directory itself; none if it was removed.
    pub(super) fn itself(&self) -> io::Result<Option<Found>> {
        self.used.set(true);
        let found = Found::itself(&self.descriptor, self.mount)?;
        Ok((found.stat.st_nlink > 0).then_some(found))
    }

    /// True if the directory was removed, or that cannot be found out.
    fn is_removed(&self) -> bool {
        let found = statx(&self.descriptor, c"", AtFlags::EMPTY_PATH, StatxFlags::NLINK);
        !found.is_ok_and(|found| found.stx_nlink > 0)
    }

    /// Removes `name`; with `AtFlags::REMOVEDIR`, a directory.
    pub(super) fn unlink(&self, name: &CStr, flags: AtFlags) -> io::Result<()> {
        self.used.set(true);
        Ok(unlinkat(&self.descriptor, name, flags)?)
    }
}

/// The open directories, by their nodes.
#[derive(Default)]
pub(super) struct OpenDirectories {
    by_slot: FxHashMap<Slot, OpenDirectory>,
    /// Their nodes, those that were opened last at the end. May hold nodes whose directories have been closed.
    order: VecDeque<Slot>,
    uses: FxHashMap<Slot, u8>,
}

impl OpenDirectories {
    /// A directory, if it is open.
    pub(super) fn get(&self, slot: Slot) -> Option<&OpenDirectory> {
        self.by_slot.get(&slot)
    }

    /// True if none is open.
    pub(super) fn is_empty(&self) -> bool {
        self.by_slot.is_empty()
    }

    /// Counts a use of a directory that is not open. True once, when it has been used often enough to be opened.
    pub(super) fn count_use(&mut self, slot: Slot) -> bool {
        if self.by_slot.contains_key(&slot) {
            return false;
        }
        if self.uses.len() >= MAX_COUNTED {
            self.uses.clear();
        }
        let uses = self.uses.entry(slot).or_default();
        *uses = uses.saturating_add(1);
        *uses == USES_BEFORE_OPEN
    }

    /// Keeps a directory open. One that has not been used lately is closed for it if there are too many.
    pub(super) fn insert(&mut self, slot: Slot, directory: OpenDirectory) {
        while self.by_slot.len() >= MAX_OPEN
            && let Some(oldest) = self.order.pop_front()
        {
            match self.by_slot.get(&oldest) {
                Some(open) if open.used.take() => self.order.push_back(oldest),
                Some(_) => self.close(oldest),
                None => {}
            }
        }
        self.order.push_back(slot);
        self.by_slot.insert(slot, directory);
    }

    /// Closes a directory, if it is open.
    pub(super) fn close(&mut self, slot: Slot) {
        if !self.uses.is_empty() {
            self.uses.remove(&slot);
        }
        if !self.by_slot.is_empty() && self.by_slot.remove(&slot).is_some() {
            self.order.retain(|open| *open != slot);
        }
    }

    /// Closes a directory if it was removed. True if it was.
    pub(super) fn close_if_removed(&mut self, slot: Slot) -> bool {
        let removed = self.by_slot.get(&slot).is_some_and(OpenDirectory::is_removed);
        if removed {
            self.close(slot);
        }
        removed
    }

    /// The number of the file system that is mounted there, if one of its directories is open: while it is, no other
    /// mount has this number.
    pub(super) fn file_system(&self, mount_id: u64) -> Option<u64> {
        let mut open = self.by_slot.values();
        open.find(|directory| directory.mount.is(mount_id)).and_then(|directory| directory.file_system)
    }

    /// Closes those that were not used since the last call.
    fn sweep(&mut self) {
        self.uses.clear();
        self.by_slot.retain(|_, directory| directory.used.take());
        self.order.retain(|slot| self.by_slot.contains_key(slot));
    }
}

/// Closes directories that are not used any more, and files that were looked up, on a thread of its own.
pub(crate) struct DirectorySweep {
    shared: Arc<SharedState>,
}

impl DirectorySweep {
    pub(super) fn new(shared: Arc<SharedState>) -> Self {
        DirectorySweep { shared }
    }

    /// Starts the thread, which ends with the process.
    pub(crate) fn start(self) -> io::Result<()> {
        thread::Builder::new().name("directories".into()).spawn(move || self.run()).map(drop)
    }

    fn run(&self) {
        loop {
            let mut state = self.shared.state_after(SWEEP_INTERVAL);
            state.directories.sweep();
            let old = state.recent.take_old();
            drop(state);
            drop(old);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> OpenDirectory {
        OpenDirectory::open(&File::open(path).unwrap(), 7).unwrap().expect("tests run on ext4, XFS, btrfs or tmpfs")
    }

    #[test]
    fn a_directory_is_opened_at_its_third_use_and_once() {
        let mut directories = OpenDirectories::default();
        assert_eq!([5, 5, 6, 5, 5].map(|slot| directories.count_use(slot)), [false, false, false, true, false]);
    }

    #[test]
    fn the_number_of_open_directories_is_bounded() {
        let place = tempfile::tempdir().unwrap();
        let mut directories = OpenDirectories::default();
        for slot in 1..=2 * MAX_OPEN as u32 {
            directories.insert(slot, open(place.path()));
            // Used all the time, so it stays.
            directories.get(1).unwrap().itself().unwrap();
        }
        assert_eq!((directories.by_slot.len(), directories.order.len()), (MAX_OPEN, MAX_OPEN));
        assert!(directories.get(1).is_some() && directories.get(2).is_none());
    }

    #[test]
    fn an_unused_directory_is_closed_by_the_second_sweep() {
        let place = tempfile::tempdir().unwrap();
        let mut directories = OpenDirectories::default();
        directories.insert(1, open(place.path()));
        directories.get(1).unwrap().itself().unwrap();
        directories.sweep();
        assert!(directories.get(1).is_some(), "it was used since the last sweep");
        directories.sweep();
        assert!(directories.is_empty() && directories.order.is_empty());
    }

    #[test]
    fn a_removed_directory_is_closed() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("d");
        std::fs::create_dir(&path).unwrap();
        let mut directories = OpenDirectories::default();
        directories.insert(1, open(&path));
        assert!(!directories.close_if_removed(1));
        std::fs::remove_dir(&path).unwrap();
        assert!(directories.get(1).unwrap().itself().unwrap().is_none());
        assert!(directories.close_if_removed(1) && directories.is_empty());
    }
}
