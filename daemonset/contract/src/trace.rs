//! The request trace of one session: a ring that the engine writes while tracing is enabled, and the broker reads.
//!
//! The broker creates the ring (a sealed memfd) and passes it to each engine of the session, so that a trace continues
//! across engines. While tracing is disabled, an engine reads one word per request. While it is enabled, the engine fills
//! the next slot and never waits: a slow reader loses entries. A hostile engine can write wrong entries of its own guest
//! and nothing else.
//!
//! Engines of two releases may follow each other on one ring. The head of the ring and the size of an entry never change;
//! each entry names the layout of the rest, and one of another layout counts as lost.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

/// Most requests that are logged in one second.
pub const MAX_RATE: u32 = 100_000;

/// Layout of the entries. It increases with each change that another program would misread.
pub const LAYOUT: u16 = 1;

/// Number of entries in the ring.
pub const CAPACITY: u64 = 4096;

/// Most bytes of path and name together that an entry holds.
pub const MAX_TEXT: usize = TEXT_WORDS * 8;

const TEXT_WORDS: usize = 25;
const SECOND: u64 = 1_000_000_000;

/// One finished request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceEntry {
    /// Time of the reply, in nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// Duration, in nanoseconds.
    pub duration_ns: u64,
    /// FUSE request id.
    pub unique: u64,
    /// FUSE node id that it is about.
    pub node: u64,
    /// FUSE opcode; [`OPERATION_NAMES`](crate::counters::OPERATION_NAMES) has its name.
    pub opcode: u32,
    /// Error number of the reply, positive; 0: success.
    pub errno: u32,
    /// Index of its queue.
    pub queue: u32,
    /// Path of the node below the share's root (`/` is the root itself), if it is known. The guest chose it: escape it
    /// before printing it on a terminal. Invalid UTF-8 is replaced.
    pub path: Option<String>,
    /// The name in the request, for operations that have one. Escape it likewise.
    pub name: Option<String>,
    /// True if path or name are truncated.
    pub truncated: bool,
}

/// A request to log.
#[derive(Clone, Copy, Debug, Default)]
pub struct Record<'a> {
    /// As in [`TraceEntry`].
    pub at_ns: u64,
    /// As in [`TraceEntry`].
    pub duration_ns: u64,
    /// As in [`TraceEntry`].
    pub unique: u64,
    /// As in [`TraceEntry`].
    pub node: u64,
    /// As in [`TraceEntry`].
    pub opcode: u32,
    /// As in [`TraceEntry`].
    pub errno: u32,
    /// As in [`TraceEntry`].
    pub queue: u32,
    /// As in [`TraceEntry`].
    pub path: Option<&'a [u8]>,
    /// As in [`TraceEntry`].
    pub name: Option<&'a [u8]>,
}

/// Entries that a reader gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceSegment {
    /// In the order in which they were logged.
    pub entries: Vec<TraceEntry>,
    /// Position of the next entry.
    pub next: u64,
    /// Entries that were overwritten before they were read, or never finished.
    pub lost: u64,
}

#[repr(C)]
struct Slot {
    /// Index of the entry plus one; 0 while it is being written.
    complete: AtomicU64,
    at: AtomicU64,
    duration: AtomicU64,
    unique: AtomicU64,
    node: AtomicU64,
    /// Opcode, errno, queue: 32, 16 and 16 bits, the opcode lowest.
    opcode_errno_queue: AtomicU64,
    /// Length of path and of name, plus one each (0: none), whether they are truncated, and [`LAYOUT`] (0: of a program
    /// that does not name it, whose layout is 1): 16, 16, 16 and 16 bits.
    lengths: AtomicU64,
    text: [AtomicU64; TEXT_WORDS],
}

#[repr(C)]
struct Ring {
    /// Tracing is enabled until then (CLOCK_MONOTONIC, nanoseconds); 0: disabled.
    enabled_until: AtomicU64,
    /// Most entries in a second.
    rate: AtomicU64,
    /// Index of the next entry.
    head: AtomicU64,
    rate_limited: AtomicU64,
    /// The current second, and the number of its entries.
    second: AtomicU64,
    in_second: AtomicU64,
    slots: [Slot; CAPACITY as usize],
}

/// A mapped ring.
#[derive(Debug)]
pub struct TraceRing {
    map: MmapRaw,
}

impl TraceRing {
    /// Creates a ring: the memfd to pass to engines, sealed against change of size, and its mapping. Pages are allocated
    /// when they are first written.
    pub fn create() -> io::Result<(OwnedFd, Self)> {
        let fd = memfd_create(c"virtiofs-trace", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(size_of::<Ring>() as u64)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL))?;
        let ring = Self::map(&file)?;
        Ok((file.into(), ring))
    }

    /// Maps a ring that the broker created.
    ///
    /// # Errors
    /// A file of another size, or one that could still shrink under the mapping.
    pub fn map(fd: &impl AsFd) -> io::Result<Self> {
        let file = File::from(fd.as_fd().try_clone_to_owned()?);
        let seals = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS)?);
        if file.metadata()?.len() != size_of::<Ring>() as u64 || !seals.contains(SealFlag::F_SEAL_SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not a sealed trace of this version"));
        }
        Ok(TraceRing { map: MmapOptions::new().map_raw(&file)? })
    }

    fn ring(&self) -> &Ring {
        // SAFETY: the mapping is as long as `Ring` and page-aligned, its file cannot shrink (checked in `map`),
        // and every field is an atomic, for which any bit pattern is a value.
        unsafe { &*self.map.as_ptr().cast::<Ring>() }
    }

    /// Enables tracing until then (CLOCK_MONOTONIC, nanoseconds; 0: disables it), with at most `rate` requests a second.
    pub fn enable(&self, until_ns: u64, rate: u32) {
        let ring = self.ring();
        ring.rate.store(rate.into(), Ordering::Relaxed);
        if ring.enabled_until.swap(until_ns, Ordering::Relaxed) == 0 {
            ring.rate_limited.store(0, Ordering::Relaxed);
        }
    }

    /// Time until which tracing is enabled; 0: it is disabled.
    pub fn enabled_until(&self) -> u64 {
        self.ring().enabled_until.load(Ordering::Relaxed)
    }

    /// True if tracing is enabled at this time.
    pub fn is_enabled(&self, now_ns: u64) -> bool {
        now_ns < self.enabled_until()
    }

    /// Number of requests since the trace began that exceeded the rate and were not logged.
    pub fn rate_limited(&self) -> u64 {
        self.ring().rate_limited.load(Ordering::Relaxed)
    }

    /// Logs a request, unless the rate is exceeded.
    pub fn log(&self, record: &Record<'_>) {
        let ring = self.ring();
        if !ring.has_room_at(record.at_ns / SECOND) {
            ring.rate_limited.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let index = ring.head.fetch_add(1, Ordering::Relaxed);
        let slot = &ring.slots[(index % CAPACITY) as usize];
        slot.complete.store(0, Ordering::Relaxed);
        // A reader must see the slot as incomplete before it can see any word of the new entry.
        std::sync::atomic::fence(Ordering::Release);
        slot.fill(record);
        slot.complete.store(index.wrapping_add(1), Ordering::Release);
    }

    /// The entries from index `after` on.
    pub fn read(&self, after: u64) -> TraceSegment {
        let ring = self.ring();
        let head = ring.head.load(Ordering::Acquire);
        let oldest = head.saturating_sub(CAPACITY);
        let first = after.clamp(oldest, head);
        let read: Vec<Option<TraceEntry>> = (first..head).map(|index| ring.entry(index)).collect();
        // An incomplete entry is still being written, unless later entries are complete: then its engine died.
        let until = read.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        let entries: Vec<TraceEntry> = read.into_iter().take(until).flatten().collect();
        let next = first + until as u64;
        let lost = next.saturating_sub(after).saturating_sub(entries.len() as u64);
        TraceSegment { entries, next, lost }
    }
}

impl Ring {
    /// If two rings of a guest begin a second at once, the count restarts once more; the rate is approximate.
    fn has_room_at(&self, second: u64) -> bool {
        if self.second.swap(second, Ordering::Relaxed) != second {
            self.in_second.store(0, Ordering::Relaxed);
        }
        self.in_second.fetch_add(1, Ordering::Relaxed) < self.rate.load(Ordering::Relaxed)
    }

    fn entry(&self, index: u64) -> Option<TraceEntry> {
        let slot = &self.slots[(index % CAPACITY) as usize];
        let complete = || slot.complete.load(Ordering::Acquire) == index.wrapping_add(1);
        let entry = complete().then(|| slot.read())??;
        std::sync::atomic::fence(Ordering::Acquire);
        complete().then_some(entry)
    }
}

impl Slot {
    fn fill(&self, record: &Record<'_>) {
        let path = record.path.unwrap_or_default();
        let name = record.name.unwrap_or_default();
        // The name identifies the file best, then the end of the path.
        let name_bytes = name.len().min(MAX_TEXT);
        let path_bytes = path.len().min(MAX_TEXT - name_bytes);
        let truncated = name_bytes < name.len() || path_bytes < path.len();
        let text = path[path.len() - path_bytes..].iter().chain(&name[..name_bytes]).copied().collect::<Vec<u8>>();
        for (word, bytes) in self.text.iter().zip(text.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
        }
        let length = |given: bool, bytes: usize| if given { bytes as u64 + 1 } else { 0 };
        let lengths = length(record.path.is_some(), path_bytes)
            | length(record.name.is_some(), name_bytes) << 16
            | u64::from(truncated) << 32
            | u64::from(LAYOUT) << 48;
        let packed =
            u64::from(record.opcode) | u64::from(record.errno as u16) << 32 | u64::from(record.queue as u16) << 48;
        for (cell, value) in [
            (&self.at, record.at_ns),
            (&self.duration, record.duration_ns),
            (&self.unique, record.unique),
            (&self.node, record.node),
            (&self.opcode_errno_queue, packed),
            (&self.lengths, lengths),
        ] {
            cell.store(value, Ordering::Relaxed);
        }
    }

    /// None: the entry is of another layout.
    fn read(&self) -> Option<TraceEntry> {
        let word = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        let text: Vec<u8> = self.text.iter().flat_map(|cell| word(cell).to_le_bytes()).collect();
        let (packed, lengths) = (word(&self.opcode_errno_queue), word(&self.lengths));
        if !matches!((lengths >> 48) as u16, 0 | LAYOUT) {
            return None;
        }
        let path = usize::from(lengths as u16);
        let name = usize::from((lengths >> 16) as u16);
        let start = path.saturating_sub(1).min(MAX_TEXT);
        let end = start.saturating_add(name.saturating_sub(1)).min(MAX_TEXT);
        let string = |given: usize, bytes: &[u8]| (given > 0).then(|| String::from_utf8_lossy(bytes).into_owned());
        Some(TraceEntry {
            at_ns: word(&self.at),
            duration_ns: word(&self.duration),
            unique: word(&self.unique),
            node: word(&self.node),
            opcode: packed as u32,
            errno: u32::from((packed >> 32) as u16),
            queue: u32::from((packed >> 48) as u16),
            path: string(path, &text[..start]),
            name: string(name, &text[start..end]),
            truncated: lengths >> 32 & 1 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(unique: u64) -> Record<'static> {
        Record { at_ns: SECOND, unique, path: Some(b"/a"), name: Some(b"b"), opcode: 1, errno: 2, ..Record::default() }
    }

    fn enabled() -> (OwnedFd, TraceRing) {
        let (fd, ring) = TraceRing::create().unwrap();
        ring.enable(u64::MAX, MAX_RATE);
        (fd, ring)
    }

    #[test]
    fn second_mapping_reads_and_continues() {
        let (fd, ring) = enabled();
        ring.log(&record(7));
        let reader = TraceRing::map(&fd).unwrap();
        let segment = reader.read(0);
        let entry = &segment.entries[0];
        assert_eq!((entry.unique, entry.opcode, entry.errno), (7, 1, 2));
        assert_eq!((entry.path.as_deref(), entry.name.as_deref(), entry.truncated), (Some("/a"), Some("b"), false));
        assert_eq!((segment.entries.len(), segment.next, segment.lost), (1, 1, 0));
        assert_eq!(reader.read(segment.next), TraceSegment { next: 1, ..TraceSegment::default() });
    }

    #[test]
    fn slow_reader_learns_how_many_entries_are_lost() {
        let (_fd, ring) = enabled();
        (0..CAPACITY + 10).for_each(|unique| ring.log(&record(unique)));
        let segment = ring.read(0);
        assert_eq!((segment.entries.len() as u64, segment.lost, segment.next), (CAPACITY, 10, CAPACITY + 10));
        assert_eq!(segment.entries[0].unique, 10);
    }

    #[test]
    fn requests_over_the_rate_are_counted() {
        let (_fd, ring) = TraceRing::create().unwrap();
        ring.enable(u64::MAX, 3);
        (0..5).for_each(|unique| ring.log(&record(unique)));
        ring.log(&Record { at_ns: 2 * SECOND, ..record(9) });
        assert_eq!(ring.read(0).entries.iter().map(|entry| entry.unique).collect::<Vec<_>>(), [0, 1, 2, 9]);
        assert_eq!(ring.rate_limited(), 2);
    }

    #[test]
    fn entry_of_another_layout_is_lost() {
        let (_fd, ring) = enabled();
        (1..=3).for_each(|unique| ring.log(&record(unique)));
        let lengths = |index: usize| &ring.ring().slots[index].lengths;
        lengths(0).fetch_and(!0 >> 16, Ordering::Relaxed);
        lengths(1).fetch_or(u64::from(LAYOUT + 2) << 48, Ordering::Relaxed);
        let segment = ring.read(0);
        assert_eq!(segment.entries.iter().map(|entry| entry.unique).collect::<Vec<_>>(), [1, 3]);
        assert_eq!((segment.lost, segment.next), (1, 3));
    }

    #[test]
    fn entry_of_a_dead_engine_is_skipped() {
        let (_fd, ring) = enabled();
        ring.log(&record(1));
        ring.log(&record(2));
        ring.ring().slots[1].complete.store(0, Ordering::Relaxed);
        let before = ring.read(0);
        assert_eq!((before.entries.len(), before.next), (1, 1));
        ring.log(&record(3));
        let after = ring.read(before.next);
        assert_eq!((after.entries.len(), after.lost, after.next), (1, 1, 3));
    }

    #[test]
    fn long_path_loses_its_beginning() {
        let (_fd, ring) = enabled();
        let path = [b"/long".repeat(100), b"/end".to_vec()].concat();
        ring.log(&Record { path: Some(&path), name: Some(&[b'n'; 255]), ..record(1) });
        ring.log(&Record { path: Some(&path), name: None, ..record(2) });
        let entries = ring.read(0).entries;
        assert_eq!(entries[0].name.as_ref().map(String::len), Some(MAX_TEXT));
        assert!(entries[0].truncated && entries[1].truncated);
        assert!(entries[1].path.as_ref().is_some_and(|path| path.len() == MAX_TEXT && path.ends_with("/end")));
        assert_eq!(entries[1].name, None);
    }

    #[test]
    fn hostile_ring_content_is_bounded() {
        let (fd, ring) = enabled();
        let random = |seed: u64| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        let words = size_of::<Ring>() / 8;
        for seed in 0..4u64 {
            for word in 0..words {
                let cell = ring.map.as_ptr().cast::<AtomicU64>();
                // SAFETY: within the mapping, which holds nothing but such cells.
                unsafe { (*cell.add(word)).store(random(seed + word as u64), Ordering::Relaxed) };
            }
            for head in [0, 1, CAPACITY, u64::MAX] {
                ring.ring().head.store(head, Ordering::Relaxed);
                for number in 0..CAPACITY {
                    ring.ring().slots[number as usize].complete.store(head.wrapping_sub(number), Ordering::Relaxed);
                }
                for after in [0, 1, u64::MAX] {
                    assert!(TraceRing::map(&fd).unwrap().read(after).entries.len() <= CAPACITY as usize);
                }
                ring.log(&record(1));
            }
        }
    }

    #[test]
    fn ring_cannot_shrink() {
        let (fd, _ring) = enabled();
        assert!(File::from(fd.try_clone().unwrap()).set_len(0).is_err());
        let short = memfd_create(c"short", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        assert!(TraceRing::map(&short).is_err());
    }
}
