//! Staleness: why something that a guest holds is not what it was told any more.
//!
//! Guests make most of their `ESTALE` up themselves, when a name that they hold no longer leads where they were told
//! it does. So the engine compares what it told with what is there, and counts by cause. Counts are for metrics and
//! policy; the last few events, with their paths, are for people.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many events a session keeps: the last ones.
pub const EVENTS: usize = 32;

/// Most bytes of a path that an event keeps: its end, which tells most.
pub const EVENT_PATH: usize = 464;

/// Why something that a guest holds has become stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Cause {
    /// A lookup or an open failed for want of file descriptors. An event is a request that was refused.
    FdExhausted,
    /// A name that the guest holds leads to another file now, and that was not this guest's doing. An event is a
    /// name.
    SourceReplaced,
    /// A name that the guest holds is gone, and that was not this guest's doing. An event is a name.
    SourceRemoved,
    /// A file that is still there cannot be opened any more by the file handle it is held by. An event is a request
    /// that was refused.
    HandleStale,
    /// The path of the share leads to another directory than the one that is served, or to none: unmounted, mounted
    /// anew, replaced. Seen by the broker; an event is one session whose directory the path has left.
    SourceGone,
    /// A request takes longer than it may. No engine counts it: the age of the oldest request is in the counters,
    /// and whoever reads them has the threshold.
    SourceHung,
    /// The guest used a number that this session never gave out, or that the guest had let go of. An event is a
    /// request; the guest walks the path again by itself.
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
    /// The word for it in metrics, status and logs.
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

    /// Its place in [`CAUSES`].
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
    /// How many events.
    pub events: u64,
}

/// One event, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StaleEvent {
    /// Its number in the session, from 1: what was seen already can be told from what is new.
    pub number: u64,
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Why.
    pub cause: Cause,
    /// What, relative to the share's root (`.`); empty where nobody knows. Of a very long path only the end, behind
    /// `...`. Bytes that are no text, and control characters, are escaped.
    pub path: String,
}

/// The last [`EVENTS`] events, in memory that engines and broker share.
///
/// A place loses its number, is filled, and is numbered anew; a reader takes what has the same number before and after. A
/// writer that dies in between leaves a place without a number. Whatever a hostile engine writes is a bounded piece of
/// text.
#[repr(C)]
pub(crate) struct EventRing {
    begun: AtomicU64,
    places: [Place; EVENTS],
}

#[repr(C)]
struct Place {
    /// 0 while it is being filled.
    number: AtomicU64,
    at_ms: AtomicU64,
    /// Number of the cause, then of the path's bytes.
    what: AtomicU64,
    path: [AtomicU64; EVENT_PATH / 8],
}

/// Threads of an engine write one after the other: one that was held up for as long as it takes others to come round to
/// its place would write into theirs. Of several engines only one writes. An event is rare, and this is short.
static WRITING: Mutex<()> = Mutex::new(());

impl EventRing {
    /// Keeps an event.
    pub(crate) fn push(&self, cause: Cause, path: &[u8]) {
        let _alone = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let number = self.begun.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        let place = &self.places[(number % EVENTS as u64) as usize];
        place.number.store(0, Ordering::Relaxed);
        std::sync::atomic::fence(Ordering::Release);
        place.at_ms.store(now_ms(), Ordering::Relaxed);
        place.what.store(((cause.index() as u64) << 32) | path.len().min(EVENT_PATH + 1) as u64, Ordering::Relaxed);
        let tail = &path[path.len().saturating_sub(EVENT_PATH)..];
        for (cell, chunk) in place.path.iter().zip(tail.chunks(8)) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            cell.store(u64::from_le_bytes(word), Ordering::Relaxed);
        }
        place.number.store(number, Ordering::Release);
    }

    /// The events that are there, the oldest first.
    pub(crate) fn events(&self) -> Vec<StaleEvent> {
        let mut events: Vec<_> = self.places.iter().filter_map(Place::read).collect();
        events.sort_by_key(|event| event.number);
        events
    }
}

impl Place {
    fn read(&self) -> Option<StaleEvent> {
        let number = self.number.load(Ordering::Acquire);
        let at_ms = self.at_ms.load(Ordering::Relaxed);
        let what = self.what.load(Ordering::Relaxed);
        let path: Vec<u8> = self.path.iter().flat_map(|cell| cell.load(Ordering::Relaxed).to_le_bytes()).collect();
        std::sync::atomic::fence(Ordering::Acquire);
        let whole = number != 0 && self.number.load(Ordering::Relaxed) == number;
        let cause = *CAUSES.get((what >> 32) as usize).filter(|_| whole)?;
        let length = what as u32 as usize;
        let shown = readable(&path[..length.min(EVENT_PATH)]);
        let path = if length > EVENT_PATH { format!("...{shown}") } else { shown };
        Some(StaleEvent { number, at_ms, cause, path })
    }
}

/// A path as a line of text that does nothing to a terminal or a log.
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
        let place = |_| Place { number: 0.into(), at_ms: 0.into(), what: 0.into(), path: cells() };
        Box::new(EventRing { begun: 0.into(), places: std::array::from_fn(place) })
    }

    #[test]
    fn causes_have_their_cells_and_their_words() {
        for (index, cause) in CAUSES.iter().enumerate() {
            assert_eq!(cause.index(), index);
            assert_eq!(serde_json::to_value(cause).unwrap(), cause.name());
        }
    }

    #[test]
    fn the_last_events_are_kept_in_their_order() {
        let ring = ring();
        assert_eq!(ring.events(), []);
        for n in 0..EVENTS + 5 {
            ring.push(CAUSES[n % CAUSES.len()], format!("dir/{n}").as_bytes());
        }
        let events = ring.events();
        assert_eq!(events.len(), EVENTS);
        assert_eq!((events[0].number, events[0].path.as_str()), (6, "dir/5"));
        assert_eq!(events[EVENTS - 1].number as usize, EVENTS + 5);
        assert_eq!(events[0].cause, CAUSES[5]);
        assert!(events[0].at_ms > 1_500_000_000_000);
    }

    #[test]
    fn of_a_long_path_the_end_is_kept() {
        let ring = ring();
        ring.push(Cause::SourceRemoved, &[b"x".repeat(3000), b"/name".to_vec()].concat());
        ring.push(Cause::SourceRemoved, &b"y".repeat(EVENT_PATH));
        let paths: Vec<_> = ring.events().into_iter().map(|event| event.path).collect();
        assert!(paths[0].starts_with("...xxx") && paths[0].ends_with("/name"), "{}", paths[0]);
        assert_eq!(paths[0].len(), EVENT_PATH + 3);
        assert_eq!(paths[1], "y".repeat(EVENT_PATH));
    }

    #[test]
    fn a_path_is_one_line_of_text_whatever_its_bytes() {
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
    fn what_is_torn_or_hostile_is_no_event() {
        let ring = ring();
        ring.push(Cause::Fenced, b"");
        // Claimed, and its writer died.
        ring.places[2].at_ms.store(1, Ordering::Relaxed);
        // A cause that does not exist, a length beyond the end.
        ring.places[3].number.store(3, Ordering::Relaxed);
        ring.places[3].what.store(99 << 32, Ordering::Relaxed);
        ring.places[4].number.store(4, Ordering::Relaxed);
        ring.places[4].what.store(u64::from(u32::MAX), Ordering::Relaxed);
        let events = ring.events();
        assert_eq!(events.iter().map(|event| event.number).collect::<Vec<_>>(), [1, 4]);
        assert_eq!((events[0].cause, events[0].path.as_str()), (Cause::Fenced, ""));
        assert!(events[1].path.len() <= "...".len() + "\\u{0}".len() * EVENT_PATH);
    }

    #[test]
    fn writers_and_readers_at_once_give_whole_events() {
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
        assert_eq!(ring.events().last().map(|event| event.number), Some(10_000));
    }
}
