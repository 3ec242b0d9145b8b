//! Counts of one session, in a page that the engine writes and the broker reads.
//!
//! The broker creates the page (a sealed memfd) and passes it to each engine of the session, so counts continue
//! across engines. A write is one relaxed atomic addition, without a system call or a lock. The page holds only numbers:
//! a hostile engine can falsify the figures of its own guest and nothing else.
//!
//! Engine and broker may be of two releases. The page therefore names its layout, and a page of another one is not mapped.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::staleness::{CAUSES, Cause, EventRing, StaleEvent, StaleTotal};

/// Layout of the page. It increases with each change that another program would misread.
pub const LAYOUT: u64 = 1;

/// Number of operations that are distinguished: FUSE opcodes below this; all others count as 0.
pub const OPERATIONS: usize = 64;

/// Number of error numbers that are distinguished: `errno` below this; all others count as 0.
pub const ERRNOS: usize = 134;

/// Upper bounds of the latency histogram's buckets, in nanoseconds; the last bucket is unbounded.
pub const LATENCY_BOUNDS_NS: [u64; 15] = [
    2_000,
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    10_000_000,
    50_000_000,
    250_000_000,
    1_000_000_000,
    10_000_000_000,
];

/// Opcodes of FUSE_INIT and FUSE_DESTROY.
const INIT: usize = 26;
const DESTROY: usize = 38;

/// Number of buckets.
pub const BUCKETS: usize = LATENCY_BOUNDS_NS.len() + 1;

/// Names of the operations by FUSE opcode; empty where no opcode has that number.
pub const OPERATION_NAMES: [&str; OPERATIONS] = [
    "other",
    "lookup",
    "forget",
    "getattr",
    "setattr",
    "readlink",
    "symlink",
    "",
    "mknod",
    "mkdir",
    "unlink",
    "rmdir",
    "rename",
    "link",
    "open",
    "read",
    "write",
    "statfs",
    "release",
    "",
    "fsync",
    "setxattr",
    "getxattr",
    "listxattr",
    "removexattr",
    "flush",
    "init",
    "opendir",
    "readdir",
    "releasedir",
    "fsyncdir",
    "getlk",
    "setlk",
    "setlkw",
    "access",
    "create",
    "interrupt",
    "bmap",
    "destroy",
    "ioctl",
    "poll",
    "notify_reply",
    "batch_forget",
    "fallocate",
    "readdirplus",
    "rename2",
    "lseek",
    "copy_file_range",
    "setupmapping",
    "removemapping",
    "syncfs",
    "tmpfile",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
    "",
];

#[repr(C)]
struct OperationCounters {
    requests: AtomicU64,
    errors: AtomicU64,
    nanoseconds: AtomicU64,
    latency: [AtomicU64; BUCKETS],
}

/// What says how to read the page. It has the place of an operation that does not exist, so that programs without it, which
/// read and write the same layout, leave it alone. It stays at this offset in every layout.
#[repr(C)]
struct PageHead {
    /// 0: for programs without this head, the operation was never requested.
    requests: AtomicU64,
    /// [`LAYOUT`]; 0: the page is of a program without this head.
    layout: AtomicU64,
    unused: [AtomicU64; BUCKETS + 1],
}

const _: () = assert!(size_of::<PageHead>() == size_of::<OperationCounters>());
const _: () = assert!(OPERATION_NAMES[OPERATIONS - 1].is_empty());

/// Offset of the page's layout.
const LAYOUT_AT: u64 = (std::mem::offset_of!(Page, head) + std::mem::offset_of!(PageHead, layout)) as u64;

#[repr(C)]
struct Page {
    /// By opcode, except the last.
    operations: [OperationCounters; OPERATIONS - 1],
    head: PageHead,
    errnos: [AtomicU64; ERRNOS],
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    malformed: AtomicU64,
    held_inodes: AtomicU64,
    open_handles: AtomicU64,
    /// Start of the request in progress per ring, nanoseconds of CLOCK_MONOTONIC; 0: none.
    in_progress_since: [AtomicU64; crate::engine::QUEUES],
    /// Its opcode, and the node that it is about.
    in_progress_opcode: [AtomicU64; crate::engine::QUEUES],
    in_progress_node: [AtomicU64; crate::engine::QUEUES],
    /// Requests that need guest memory which the engine does not have.
    unreachable: AtomicU64,
    /// Bounds of that memory, guest-physical; the end is 0 while there was none.
    unreachable_start: AtomicU64,
    unreachable_end: AtomicU64,
    /// By ring: 1 while it waits for such memory.
    waiting_for_memory: [AtomicU64; crate::engine::QUEUES],
    /// Stale events by cause, in the order of `CAUSES`.
    stale: [AtomicU64; CAUSES.len()],
    stale_events: EventRing,
}

/// A request in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InProgress {
    /// Start time (CLOCK_MONOTONIC, nanoseconds).
    pub since_ns: u64,
    /// Its FUSE opcode.
    pub opcode: u32,
    /// FUSE node id that it is about.
    pub node: u64,
}

/// A mapped counter page.
#[derive(Debug)]
pub struct Counters {
    map: MmapRaw,
}

impl Counters {
    /// Creates a page: the memfd to pass to engines, sealed against change of size, and its mapping.
    pub fn create() -> io::Result<(OwnedFd, Self)> {
        let fd = memfd_create(c"virtiofs-counters", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(size_of::<Page>() as u64)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL))?;
        file.write_all_at(&LAYOUT.to_le_bytes(), LAYOUT_AT)?;
        let counters = Self::map(&file)?;
        Ok((file.into(), counters))
    }

    /// Maps a page that the broker created.
    ///
    /// # Errors
    /// `InvalidData`: a file of another layout or size, or one that could still shrink under the mapping.
    pub fn map(fd: &impl AsFd) -> io::Result<Self> {
        let file = File::from(fd.as_fd().try_clone_to_owned()?);
        let seals = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS)?);
        let mut layout = [0; 8];
        let read = file.read_at(&mut layout, LAYOUT_AT)?;
        let invalid = |message| Err(io::Error::new(io::ErrorKind::InvalidData, message));
        match u64::from_le_bytes(layout) {
            0 | LAYOUT => {}
            other => return invalid(format!("counter page of layout {other}; this program reads layout {LAYOUT}")),
        }
        let length = file.metadata()?.len();
        if read < layout.len() || length != size_of::<Page>() as u64 || !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return invalid(format!("not a sealed counter page of layout {LAYOUT}: {length} bytes"));
        }
        Ok(Counters { map: MmapOptions::new().map_raw(&file)? })
    }

    fn page(&self) -> &Page {
        // SAFETY: the mapping is as long as `Page` and page-aligned, its file cannot shrink (checked in
        // `map`), and every field is an atomic, for which any bit pattern is a value.
        unsafe { &*self.map.as_ptr().cast::<Page>() }
    }

    /// Counts one finished request: its FUSE opcode, its errno (0: success), how long it took.
    pub fn count_request(&self, opcode: u32, errno: i32, nanoseconds: u64) {
        let operation = &self.page().operations[operation_index(opcode)];
        operation.requests.fetch_add(1, Relaxed);
        operation.nanoseconds.fetch_add(nanoseconds, Relaxed);
        operation.latency[bucket(nanoseconds)].fetch_add(1, Relaxed);
        if errno != 0 {
            operation.errors.fetch_add(1, Relaxed);
            self.page().errnos[errno_index(errno)].fetch_add(1, Relaxed);
        }
    }

    /// Counts bytes sent to the guest by a read.
    pub fn count_read(&self, bytes: u64) {
        self.page().bytes_read.fetch_add(bytes, Relaxed);
    }

    /// Counts bytes taken from the guest by a write.
    pub fn count_written(&self, bytes: u64) {
        self.page().bytes_written.fetch_add(bytes, Relaxed);
    }

    /// Counts a request that was not well formed.
    pub fn count_malformed(&self) {
        self.page().malformed.fetch_add(1, Relaxed);
    }

    /// Counts a request that needs guest memory from `start` to `end` (guest-physical, the end excluded), which the
    /// engine does not have.
    pub fn count_unreachable(&self, start: u64, end: u64) {
        let page = self.page();
        let first = page.unreachable_end.load(Relaxed) == 0;
        let lowest = if first { start } else { start.min(page.unreachable_start.load(Relaxed)) };
        page.unreachable_start.store(lowest, Relaxed);
        page.unreachable_end.fetch_max(end, Relaxed);
        page.unreachable.fetch_add(1, Relaxed);
    }

    /// Notes whether `ring` waits at a request whose reply has its header in such memory.
    pub fn set_waiting_for_memory(&self, ring: usize, waits: bool) {
        if let Some(cell) = self.page().waiting_for_memory.get(ring) {
            cell.store(waits.into(), Relaxed);
        }
    }

    /// The guest memory that requests needed and no engine of the session had.
    pub fn unreachable_memory(&self) -> Option<UnreachableMemory> {
        let page = self.page();
        let requests = page.unreachable.load(Relaxed);
        (requests > 0).then(|| UnreachableMemory {
            start: page.unreachable_start.load(Relaxed),
            end: page.unreachable_end.load(Relaxed),
            requests,
            waiting: page.waiting_for_memory.iter().any(|cell| cell.load(Relaxed) != 0),
        })
    }

    /// Counts a stale event and records it among the last ones. `path` is relative to the share's root; empty: unknown.
    pub fn count_stale(&self, cause: Cause, path: &[u8]) {
        self.page().stale[cause.index()].fetch_add(1, Relaxed);
        self.page().stale_events.push(cause, path);
    }

    /// The last stale events, the oldest first.
    pub fn stale_events(&self) -> Vec<StaleEvent> {
        self.page().stale_events.events()
    }

    /// Sets how many inodes the guest holds, and how many files and directories it has open.
    pub fn set_held(&self, held: Held) {
        self.page().held_inodes.store(held.inodes, Relaxed);
        self.page().open_handles.store(held.handles, Relaxed);
    }

    /// What the guest holds.
    pub fn held(&self) -> Held {
        Held { inodes: self.page().held_inodes.load(Relaxed), handles: self.page().open_handles.load(Relaxed) }
    }

    /// Sets the request in progress on `ring`; none: the ring is idle.
    pub fn set_in_progress(&self, ring: usize, request: Option<InProgress>) {
        let page = self.page();
        if ring >= crate::engine::QUEUES {
            return;
        }
        let InProgress { since_ns, opcode, node } = request.unwrap_or(InProgress { since_ns: 0, opcode: 0, node: 0 });
        page.in_progress_opcode[ring].store(opcode.into(), Relaxed);
        page.in_progress_node[ring].store(node, Relaxed);
        page.in_progress_since[ring].store(since_ns, Relaxed);
    }

    /// Number of FUSE_INITs (mounts) and FUSE_DESTROYs (unmounts) of the guest.
    pub fn mounts(&self) -> (u64, u64) {
        let requests = |opcode: usize| self.page().operations[opcode].requests.load(Relaxed);
        (requests(INIT), requests(DESTROY))
    }

    /// The counts as they are now.
    pub fn totals(&self) -> Totals {
        let page = self.page();
        let read = |cell: &AtomicU64| cell.load(Relaxed);
        Totals {
            operations: page
                .operations
                .iter()
                .enumerate()
                .filter(|(_, operation)| read(&operation.requests) != 0)
                .map(|(opcode, operation)| OperationTotals {
                    opcode: opcode as u32,
                    requests: read(&operation.requests),
                    errors: read(&operation.errors),
                    nanoseconds: read(&operation.nanoseconds),
                    latency: operation.latency.iter().map(read).collect(),
                })
                .collect(),
            errnos: page
                .errnos
                .iter()
                .enumerate()
                .filter(|(_, count)| read(count) != 0)
                .map(|(errno, count)| ErrnoTotal { errno: errno as i32, replies: read(count) })
                .collect(),
            bytes_read: read(&page.bytes_read),
            bytes_written: read(&page.bytes_written),
            malformed: read(&page.malformed),
            unreachable: read(&page.unreachable),
            stale: CAUSES
                .iter()
                .map(|cause| StaleTotal { cause: *cause, events: read(&page.stale[cause.index()]) })
                .filter(|total| total.events != 0)
                .collect(),
            replacements: Replacements::default(),
        }
    }

    /// The oldest request in progress. If it ends during the call, opcode and node may be those of the next one.
    pub fn oldest_in_progress(&self) -> Option<InProgress> {
        let page = self.page();
        let at = |ring: usize| InProgress {
            since_ns: page.in_progress_since[ring].load(Relaxed),
            opcode: page.in_progress_opcode[ring].load(Relaxed) as u32,
            node: page.in_progress_node[ring].load(Relaxed),
        };
        (0..crate::engine::QUEUES).map(at).filter(|request| request.since_ns != 0).min_by_key(|it| it.since_ns)
    }
}

fn operation_index(opcode: u32) -> usize {
    let index = opcode as usize;
    if OPERATION_NAMES.get(index).is_some_and(|name| !name.is_empty()) { index } else { 0 }
}

fn errno_index(errno: i32) -> usize {
    usize::try_from(errno).ok().filter(|index| *index < ERRNOS).unwrap_or(0)
}

fn bucket(nanoseconds: u64) -> usize {
    LATENCY_BOUNDS_NS.iter().position(|bound| nanoseconds <= *bound).unwrap_or(BUCKETS - 1)
}

/// Guest memory that the VMM does not share, though the guest puts requests there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnreachableMemory {
    /// Lowest guest-physical address that a request named.
    pub start: u64,
    /// Guest-physical address behind the highest one.
    pub end: u64,
    /// How many requests needed it.
    pub requests: u64,
    /// True while a request waits because not even an error can be sent: its reply's header is there.
    pub waiting: bool,
}

/// Number of objects that a guest holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Held {
    /// Inodes that it has looked up and not forgotten.
    pub inodes: u64,
    /// Files and directories that it has open.
    pub handles: u64,
}

/// Counts at one moment, or the sum of several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Per operation, in order of opcode; operations that were never requested are omitted.
    pub operations: Vec<OperationTotals>,
    /// Per error number, in order; numbers that were never sent are omitted.
    pub errnos: Vec<ErrnoTotal>,
    /// Bytes sent to guests by reads.
    pub bytes_read: u64,
    /// Bytes received from guests by writes.
    pub bytes_written: u64,
    /// Requests that were not well formed.
    pub malformed: u64,
    /// Requests that need guest memory which the VMM does not share.
    #[serde(default)]
    pub unreachable: u64,
    /// Stale events by cause, in the order of [`CAUSES`]; causes without events are omitted.
    #[serde(default)]
    pub stale: Vec<StaleTotal>,
    /// Replacements of engines. The broker counts them; they are not in the page.
    #[serde(default)]
    pub replacements: Replacements,
}

/// Replacements of engines by outcome, and the pauses of guests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replacements {
    /// Planned, between two requests. The pause lasts from Quiesce until the new engine serves.
    pub hand_overs: Pauses,
    /// After an engine's death. The pause lasts from its detection until the new engine serves.
    pub recoveries: Pauses,
    /// Hand-overs that were aborted because the engine did not quiesce or the new one failed.
    pub aborted: u64,
    /// Recoveries that were abandoned: the session ended before another engine served.
    #[serde(default)]
    pub abandoned: u64,
}

/// Pauses of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pauses {
    /// Number of pauses.
    pub count: u64,
    /// Their sum, in nanoseconds.
    pub nanoseconds: u64,
    /// Number of pauses by bucket of [`LATENCY_BOUNDS_NS`]; not cumulative. Empty if there was none.
    pub latency: Vec<u64>,
}

impl Pauses {
    /// Records one pause.
    pub fn record(&mut self, nanoseconds: u64) {
        self.latency.resize(BUCKETS, 0);
        self.latency[bucket(nanoseconds)] += 1;
        self.count += 1;
        self.nanoseconds += nanoseconds;
    }

    /// Upper bound of the longest pause, in nanoseconds; none: there was no pause, or it is in the unbounded bucket.
    pub fn longest_below(&self) -> Option<u64> {
        let longest = self.latency.iter().rposition(|count| *count > 0)?;
        LATENCY_BOUNDS_NS.get(longest).copied()
    }

    fn add(&mut self, other: &Pauses) {
        self.latency.resize(self.latency.len().max(other.latency.len()), 0);
        for (ours, theirs) in self.latency.iter_mut().zip(&other.latency) {
            *ours += theirs;
        }
        self.count += other.count;
        self.nanoseconds += other.nanoseconds;
    }
}

/// Counts of one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OperationTotals {
    /// FUSE opcode; [`OPERATION_NAMES`] has its name.
    pub opcode: u32,
    /// Requests finished.
    pub requests: u64,
    /// Those answered with an error.
    pub errors: u64,
    /// Time spent on them, in nanoseconds.
    pub nanoseconds: u64,
    /// Number of requests by bucket of [`LATENCY_BOUNDS_NS`]; not cumulative.
    pub latency: Vec<u64>,
}

/// Count of one error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrnoTotal {
    /// The error number, positive.
    pub errno: i32,
    /// Replies that carried it.
    pub replies: u64,
}

impl Totals {
    /// Adds the counts of another session.
    pub fn add(&mut self, other: &Totals) {
        for theirs in &other.operations {
            match self.operations.binary_search_by_key(&theirs.opcode, |ours| ours.opcode) {
                Ok(at) => self.operations[at].add(theirs),
                Err(at) => self.operations.insert(at, theirs.clone()),
            }
        }
        for theirs in &other.errnos {
            match self.errnos.binary_search_by_key(&theirs.errno, |ours| ours.errno) {
                Ok(at) => self.errnos[at].replies += theirs.replies,
                Err(at) => self.errnos.insert(at, *theirs),
            }
        }
        self.bytes_read += other.bytes_read;
        self.bytes_written += other.bytes_written;
        self.malformed += other.malformed;
        self.unreachable += other.unreachable;
        for theirs in &other.stale {
            match self.stale.binary_search_by_key(&theirs.cause, |ours| ours.cause) {
                Ok(at) => self.stale[at].events += theirs.events,
                Err(at) => self.stale.insert(at, *theirs),
            }
        }
        self.replacements.hand_overs.add(&other.replacements.hand_overs);
        self.replacements.recoveries.add(&other.replacements.recoveries);
        self.replacements.aborted += other.replacements.aborted;
        self.replacements.abandoned += other.replacements.abandoned;
    }

    /// Stale events of one cause.
    pub fn stale(&self, cause: Cause) -> u64 {
        self.stale.iter().find(|total| total.cause == cause).map_or(0, |total| total.events)
    }

    /// All requests finished.
    pub fn requests(&self) -> u64 {
        self.operations.iter().map(|operation| operation.requests).sum()
    }

    /// All replies that carried an error.
    pub fn errors(&self) -> u64 {
        self.operations.iter().map(|operation| operation.errors).sum()
    }
}

impl OperationTotals {
    fn add(&mut self, other: &OperationTotals) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.nanoseconds += other.nanoseconds;
        for (ours, theirs) in self.latency.iter_mut().zip(&other.latency) {
            *ours += theirs;
        }
    }
}

#[cfg(test)]
mod tests;
