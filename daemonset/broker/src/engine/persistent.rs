//! The state of a session that outlives its engines: counters, ledger, stashed files, trace.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use virtiofs_contract::counters::{Counters, Held, InProgress, Totals, UnreachableMemory};
use virtiofs_contract::staleness::{Cause, StaleEvent};
use virtiofs_contract::trace::TraceRing;

use super::fd_stash::FdStash;
use super::kill_switch::KillSwitch;
use super::limits::session_group::SessionGroup;
use super::mount_point::MountPoint;
use crate::holder::names::Part;
use crate::holder::{Hold, Parts};

/// Size of the ledger in bytes: for each inode that the guest may hold, names and handles included, and for everything
/// that does not depend on their number. The file is sparse: pages that are never written use no memory.
const LEDGER_PER_INODE: u64 = 320;
const LEDGER_FIXED: u64 = 8 << 20;
const PAGE: u64 = 4096;

/// The persistent state of one session. The broker creates it; it reads only the counters and the trace.
#[derive(Debug)]
pub(crate) struct PersistentState {
    /// The counter page that engines write.
    pub(crate) counter_page: Arc<OwnedFd>,
    counters: Counters,
    /// The ledger: nodes, names and handles that the guest holds.
    pub(crate) ledger: Arc<OwnedFd>,
    /// Number of inodes that the ledger has room for at least.
    pub(crate) max_inodes: u64,
    /// Open files without a name.
    pub(crate) stash: Arc<FdStash>,
    /// The trace ring that engines write while tracing is enabled.
    pub(crate) trace_file: Arc<OwnedFd>,
    pub(crate) trace: TraceRing,
    /// Mount point of the source when the last engine was started.
    mounted_at: Mutex<Option<MountPoint>>,
    /// The control group to which the memory of its engines is charged; none: there is none, or no engine yet.
    group: Mutex<Option<Arc<SessionGroup>>>,
    /// Its engine processes.
    pub(crate) kill_switch: KillSwitch,
    /// True if the engine that serves a restored session writes pages of another layout. Counts and trace begin again with the
    /// next engine.
    pub(crate) has_new_pages: bool,
}

impl PersistentState {
    /// Creates the state for a guest that may hold `max_inodes` inodes, and deposits it.
    pub(crate) fn new(max_inodes: u64, hold: Hold) -> io::Result<Self> {
        let (counter_page, counters) = Counters::create()?;
        let (trace_file, trace) = TraceRing::create()?;
        let ledger = Arc::new(new_ledger(max_inodes)?);
        let (counter_page, trace_file) = (Arc::new(counter_page), Arc::new(trace_file));
        hold.deposit(Part::Counters, counter_page.clone());
        hold.account().deposit(Part::Counters, counter_page.clone());
        hold.deposit(Part::Ledger, ledger.clone());
        hold.deposit(Part::Trace, trace_file.clone());
        let stash = Arc::new(FdStash::create(hold));
        Ok(PersistentState {
            counter_page,
            counters,
            ledger,
            max_inodes,
            stash,
            trace_file,
            trace,
            mounted_at: Mutex::default(),
            group: Mutex::default(),
            kill_switch: KillSwitch::default(),
            has_new_pages: false,
        })
    }

    /// The state of a restored session. Pages of a layout that this broker does not read are replaced by empty ones.
    ///
    /// # Errors
    /// A part is not held.
    pub(crate) fn restored(
        parts: &mut Parts,
        max_inodes: u64,
        mounted_at: Option<MountPoint>,
        group: Option<SessionGroup>,
        hold: Hold,
    ) -> io::Result<Self> {
        let mut take = |part: Part| parts.remove(&part).ok_or_else(|| missing(part));
        let (counter_page, ledger, trace_file) = (take(Part::Counters)?, take(Part::Ledger)?, take(Part::Trace)?);
        let counted = readable(Part::Counters, counter_page, Counters::map, Counters::create)?;
        let traced = readable(Part::Trace, trace_file, TraceRing::map, TraceRing::create)?;
        let has_new_pages = counted.is_new || traced.is_new;
        let (counter_page, counters) = counted.deposited(Part::Counters, &[hold.clone(), hold.account()]);
        let (trace_file, trace) = traced.deposited(Part::Trace, std::slice::from_ref(&hold));
        let mut files = BTreeMap::new();
        for (part, file) in parts.iter() {
            if let Part::File(handle) = part {
                files.insert(*handle, file.clone());
            }
        }
        let stash = Arc::new(FdStash::restored(files, hold));
        Ok(PersistentState {
            counter_page,
            counters,
            ledger,
            max_inodes,
            stash,
            trace_file,
            trace,
            mounted_at: Mutex::new(mounted_at),
            group: Mutex::new(group.map(Arc::new)),
            kill_switch: KillSwitch::default(),
            has_new_pages,
        })
    }

    /// Number of mounts and unmounts of the guest.
    pub(crate) fn mounts(&self) -> (u64, u64) {
        self.counters.mounts()
    }

    /// Mount point of the source when the last engine was started.
    pub(crate) fn mounted_at(&self) -> Option<MountPoint> {
        self.mounted_at.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_mounted_at(&self, mount_point: Option<MountPoint>) {
        *self.mounted_at.lock().unwrap_or_else(PoisonError::into_inner) = mount_point;
    }

    /// Its control group.
    pub(crate) fn group(&self) -> Option<Arc<SessionGroup>> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its control group; created if it has none.
    pub(crate) fn group_or(&self, create: impl FnOnce() -> Option<SessionGroup>) -> Option<Arc<SessionGroup>> {
        let mut group = self.group.lock().unwrap_or_else(PoisonError::into_inner);
        if group.is_none() {
            *group = create().map(Arc::new);
        }
        group.clone()
    }

    /// The oldest request in progress.
    pub(crate) fn oldest_request(&self) -> Option<InProgress> {
        self.counters.oldest_in_progress()
    }

    pub(crate) fn held(&self) -> Held {
        self.counters.held()
    }

    pub(crate) fn totals(&self) -> Totals {
        self.counters.totals()
    }

    pub(crate) fn unreachable_memory(&self) -> Option<UnreachableMemory> {
        self.counters.unreachable_memory()
    }

    /// Counts that the path of the source leads elsewhere, which engines cannot detect.
    pub(crate) fn count_source_gone(&self) {
        self.counters.count_stale(Cause::SourceGone, b".");
    }

    pub(crate) fn stale_events(&self) -> Vec<StaleEvent> {
        self.counters.stale_events()
    }
}

/// A page that this broker reads.
struct Page<P> {
    fd: Arc<OwnedFd>,
    page: P,
    /// True if it takes the place of a page of another layout.
    is_new: bool,
}

/// Maps a page of a restored session, or creates one if the layout of that one is unknown.
fn readable<P>(
    part: Part,
    held: Arc<OwnedFd>,
    map: impl Fn(&Arc<OwnedFd>) -> io::Result<P>,
    create: impl Fn() -> io::Result<(OwnedFd, P)>,
) -> io::Result<Page<P>> {
    match map(&held) {
        Ok(page) => Ok(Page { fd: held, page, is_new: false }),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            tracing::warn!(%part, %error, "not read; another one takes its place with the next engine");
            let (fd, page) = create()?;
            Ok(Page { fd: Arc::new(fd), page, is_new: true })
        }
        Err(error) => Err(error),
    }
}

impl<P> Page<P> {
    /// Deposits the page in these groups, in place of an unreadable one.
    fn deposited(self, part: Part, holds: &[Hold]) -> (Arc<OwnedFd>, P) {
        for hold in holds {
            if self.is_new {
                hold.remove(part);
            }
            hold.deposit(part, self.fd.clone());
        }
        (self.fd, self.page)
    }
}

/// The error for a descriptor that should be held.
pub(crate) fn missing(part: Part) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("descriptor {part} is not held"))
}

/// A memfd of zeros, sealed so that it cannot shrink or grow under a mapping.
fn new_ledger(max_inodes: u64) -> io::Result<OwnedFd> {
    let size = max_inodes.saturating_mul(LEDGER_PER_INODE).saturating_add(LEDGER_FIXED).next_multiple_of(PAGE);
    let ledger = memfd_create("virtiofs-ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&ledger, size)?;
    fcntl_add_seals(&ledger, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(ledger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_of_another_layout_is_replaced_and_not_read() {
        let (fd, counters) = Counters::create().unwrap();
        counters.count_request(1, 0, 1);
        let restored = |fd: &OwnedFd| {
            let mut parts = Parts::new();
            for (part, fd) in [
                (Part::Counters, fd.try_clone().unwrap()),
                (Part::Ledger, new_ledger(1).unwrap()),
                (Part::Trace, TraceRing::create().unwrap().0),
            ] {
                parts.insert(part, Arc::new(fd));
            }
            let hold = crate::holder::Holder::default().group(crate::holder::names::Group::Session(1));
            PersistentState::restored(&mut parts, 1, None, None, hold).unwrap()
        };
        let same = restored(&fd);
        assert!(!same.has_new_pages);
        assert_eq!(same.totals().requests(), 1);

        // As an engine of another release fills a page of its own size.
        let other = memfd_create("other", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&other, 1 << 20).unwrap();
        let renewed = restored(&other);
        assert!(renewed.has_new_pages);
        assert_eq!(renewed.totals(), Totals::default());
        assert!(Counters::map(&renewed.counter_page).is_ok(), "the next engine can write it");
    }

    #[test]
    fn ledger_size_is_sealed() {
        let ledger = new_ledger(1000).unwrap();
        let size = rustix::fs::fstat(&ledger).unwrap().st_size as u64;
        assert!(size > 1000 * LEDGER_PER_INODE && size.is_multiple_of(PAGE));
        assert!(ftruncate(&ledger, size - PAGE).is_err());
        assert!(ftruncate(&ledger, size + PAGE).is_err());
    }
}
