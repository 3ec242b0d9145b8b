//! Staleness: why a name, an inode or a handle that a guest holds no longer matches the source.
//!
//! A guest kernel returns most `ESTALE` errors by itself, when a name that it has cached leads to another inode. So the
//! engine compares what the guest has cached with the source, and counts differences by cause. Counts are for metrics
//! and policy; the last few events, with their paths, are for people.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Number of events that a session keeps: the last ones.
pub const EVENTS: usize = 32;

/// Most bytes of a path that an event keeps: its end, which identifies the file best.
pub const EVENT_PATH: usize = 464;

/// Why something that a guest holds is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Cause {
    /// A lookup or an open failed because the engine has no file descriptor left. An event is a request that failed.
    FdExhausted,
    /// A name that the guest holds now leads to another file, and this guest did not change it. An event is a name.
    SourceReplaced,
    /// A name that the guest holds is gone, and this guest did not remove it. An event is a name.
    SourceRemoved,
    /// A file exists, but can no longer be opened by the file handle that the engine has for it. An event is a request
    /// that failed.
    HandleStale,
    /// The path of the share leads to another directory than the one that is served, or to none: it was unmounted,
    /// remounted or replaced. The broker detects it. An event is one session.
    SourceGone,
    /// A request runs longer than the threshold. The engine does not count it: the age of the oldest request is in the
    /// counters, and their reader applies the threshold.
    SourceHung,
    /// The guest used a node id that this session never gave out, or that the guest has forgotten. An event is a
    /// request. The guest looks the path up again by itself.
    Fenced,
}

/// Every cause, in the order of their cells in the counter page.
pub const CAUSES: [Cause; 7] = [
    Cause::FdExhausted,
    Cause::SourceReplaced,
    Cause::SourceRemoved,
    Cause::HandleStale,
    Cause::SourceGone,
    Cause::SourceHung,
    Cause::Fenced,
];

impl Cause {
    /// The name used in metrics, status and logs.
    pub fn name(self) -> &'static str {
        match self {
            Cause::FdExhausted => "FdExhausted",
            Cause::SourceReplaced => "SourceReplaced",
            Cause::SourceRemoved => "SourceRemoved",
            Cause::HandleStale => "HandleStale",
            Cause::SourceGone => "SourceGone",
            Cause::SourceHung => "SourceHung",
            Cause::Fenced => "Fenced",
        }
    }

    /// Its index in [`CAUSES`].
    pub fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Events of one cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaleTotal {
    /// The cause.
    pub cause: Cause,
    /// Number of events.
    pub events: u64,
}

/// One stale event, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StaleEvent {
    /// Sequence number in the session, from 1. A reader finds new events by it.
    pub sequence: u64,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The cause.
    pub cause: Cause,
    /// Path relative to the share's root (`.`); empty if it is unknown. A very long path is cut to its end, behind
    /// `...`. Invalid UTF-8 and control characters are escaped.
    pub path: String,
}

/// The last [`EVENTS`] events, in memory that engines and broker share.
///
/// A writer clears the sequence number of a slot, fills the slot and sets the new number. A reader accepts a slot whose
/// number is the same before and after reading. A writer that dies in between leaves a slot without a number. Whatever a
/// hostile engine writes is read as a bounded piece of text.
#[repr(C)]
pub(crate) struct EventRing {
    pushed: AtomicU64,
    slots: [EventSlot; EVENTS],
}

#[repr(C)]
struct EventSlot {
    /// 0 while the slot is being filled.
    sequence: AtomicU64,
    at_ms: AtomicU64,
    /// Index of the cause in the upper half, length of the path in the lower half.
    cause_and_length: AtomicU64,
    path: [AtomicU64; EVENT_PATH / 8],
}

/// Serializes the threads of an engine. Without it, a writer that is preempted while others fill the whole ring would
/// write into a slot that is theirs. Only one engine of a session writes. Events are rare and the lock is short.
static WRITING: Mutex<()> = Mutex::new(());

impl EventRing {
    /// Records an event.
    pub(crate) fn push(&self, cause: Cause, path: &[u8]) {
        let _guard = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let sequence = self.pushed.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let slot = &self.slots[(sequence % EVENTS as u64) as usize];
        slot.sequence.store(0, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::Release);
        slot.at_ms.store(now_ms(), Ordering::Relaxed);
        slot.cause_and_length
            .store(((cause.index() as u64) << 32) | path.len().min(EVENT_PATH + 1) as u64, Ordering::Relaxed);
        let tail = &path[path.len().saturating_sub(EVENT_PATH)..];
        for (cell, chunk) in slot.path.iter().zip(tail.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            cell.store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
        slot.sequence.store(sequence, Ordering::Release);
    }

    /// The recorded events, the oldest first.
    pub(crate) fn events(&self) -> Vec<StaleEvent> {
        let mut events: Vec<_> = self.slots.iter().filter_map(EventSlot::read).collect();
        events.sort_by_key(|event| event.sequence);
        events
    }
}

impl EventSlot {
    fn read(&self) -> Option<StaleEvent> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let at_ms = self.at_ms.load(Ordering::Relaxed);
        let packed = self.cause_and_length.load(Ordering::Relaxed);
        let path: Vec<u8> = self.path.iter().flat_map(|cell| cell.load(Ordering::Relaxed).to_le_bytes()).collect();
        std::sync::atomic::fence(Ordering::Acquire);
        let whole = sequence != 0 && self.sequence.load(Ordering::Relaxed) == sequence;
        let cause = *CAUSES.get((packed >> 32) as usize).filter(|_| whole)?;
        let length = packed as u32 as usize;
        let shown = readable(&path[..length.min(EVENT_PATH)]);
        let path = if length > EVENT_PATH { format!("...{shown}") } else { shown };
        Some(StaleEvent { sequence, at_ms, cause, path })
    }
}

/// Escapes a path so that it is one line of text that is safe for terminals and logs.
fn readable(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for letter in chunk.valid().chars() {
            if letter.is_control() || letter == '\\' { text.extend(letter.escape_default()) } else { text.push(letter) }
        }
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring() -> Box<EventRing> {
        let cells = || std::array::from_fn(|_| AtomicU64::new(0));
        let slot = |_| EventSlot { sequence: 0.into(), at_ms: 0.into(), cause_and_length: 0.into(), path: cells() };
        Box::new(EventRing { pushed: 0.into(), slots: std::array::from_fn(slot) })
    }

    #[test]
    fn causes_match_their_index_and_name() {
        for (index, cause) in CAUSES.iter().enumerate() {
            assert_eq!(cause.index(), index);
            assert_eq!(serde_json::to_value(cause).unwrap(), cause.name());
        }
    }

    #[test]
    fn last_events_are_kept_in_order() {
        let ring = ring();
        assert_eq!(ring.events(), []);
        for n in 0..EVENTS + 5 {
            ring.push(CAUSES[n % CAUSES.len()], format!("dir/{n}").as_bytes());
        }
        let events = ring.events();
        assert_eq!(events.len(), EVENTS);
        assert_eq!((events[0].sequence, events[0].path.as_str()), (6, "dir/5"));
        assert_eq!(events[EVENTS - 1].sequence as usize, EVENTS + 5);
        assert_eq!(events[0].cause, CAUSES[5]);
        assert!(events[0].at_ms > 1_500_000_000_000);
    }

    #[test]
    fn long_path_keeps_its_end() {
        let ring = ring();
        ring.push(Cause::SourceRemoved, &[b"x".repeat(3000), b"/name".to_vec()].concat());
        ring.push(Cause::SourceRemoved, &b"y".repeat(EVENT_PATH));
        let paths: Vec<_> = ring.events().into_iter().map(|event| event.path).collect();
        assert!(paths[0].starts_with("...xxx") && paths[0].ends_with("/name"), "{}", paths[0]);
        assert_eq!(paths[0].len(), EVENT_PATH + 3);
        assert_eq!(paths[1], "y".repeat(EVENT_PATH));
    }

    #[test]
    fn path_is_escaped_to_one_line() {
        for (bytes, text) in [
            (&b"a b"[..], "a b"),
            ("tür".as_bytes(), "tür"),
            (b"a\nb\x1b[2J", "a\\nb\\u{1b}[2J"),
            (b"\xff\xfe", "\\xff\\xfe"),
            (b"back\\slash", "back\\\\slash"),
        ] {
            assert_eq!(readable(bytes), text);
        }
    }

    #[test]
    fn torn_or_hostile_slots_are_bounded() {
        let ring = ring();
        ring.push(Cause::Fenced, b"");
        // Cleared by a writer that died.
        ring.slots[2].at_ms.store(1, Ordering::Relaxed);
        // A cause that does not exist, a length beyond the end.
        ring.slots[3].sequence.store(3, Ordering::Relaxed);
        ring.slots[3].cause_and_length.store(99 << 32, Ordering::Relaxed);
        ring.slots[4].sequence.store(4, Ordering::Relaxed);
        ring.slots[4].cause_and_length.store(u64::from(u32::MAX), Ordering::Relaxed);
        let events = ring.events();
        assert_eq!(events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [1, 4]);
        assert_eq!((events[0].cause, events[0].path.as_str()), (Cause::Fenced, ""));
        assert!(events[1].path.len() <= "...".len() + "\\u{0}".len() * EVENT_PATH);
    }

    #[test]
    fn concurrent_writers_and_readers_yield_whole_events() {
        let ring = ring();
        std::thread::scope(|scope| {
            for letter in [b"a", b"b"] {
                let ring = &ring;
                scope.spawn(move || (0..5_000).for_each(|_| ring.push(Cause::SourceRemoved, &letter.repeat(400))));
            }
            for _ in 0..300 {
                for event in ring.events() {
                    let first = event.path.as_bytes()[0];
                    assert!(event.path.len() == 400 && event.path.bytes().all(|byte| byte == first), "{event:?}");
                }
            }
        });
        assert_eq!(ring.events().last().map(|event| event.sequence), Some(10_000));
    }
}
