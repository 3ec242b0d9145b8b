//! Pages that engines write and brokers read.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use testkit::layouts::{parse_words, words};
use virtiofs_contract::counters::{self, Counters, Held, InProgress, OPERATION_NAMES};
use virtiofs_contract::staleness::{CAUSES, Cause};
use virtiofs_contract::trace::{self, Record, TraceRing};

use crate::layouts;

/// Takes the place of the time of events.
const NOW: u64 = 0x6000_0000_0000;

fn bytes_of(fd: &OwnedFd) -> Vec<u8> {
    let file = File::from(fd.as_fd().try_clone_to_owned().unwrap());
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// A page that another process has written. The last line of a fixture has its size.
fn written(fixture: &[u8]) -> OwnedFd {
    let fd = memfd_create(c"page", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = File::from(fd);
    let words = parse_words(fixture);
    let (size, words) = words.split_last().unwrap();
    file.set_len(size.0).unwrap();
    for (offset, value) in words {
        file.write_all_at(&value.to_le_bytes(), *offset).unwrap();
    }
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK)).unwrap();
    file.into()
}

/// A different value in each field.
fn fill(counters: &Counters) {
    for (opcode, name) in (0u32..).zip(OPERATION_NAMES) {
        if !name.is_empty() {
            (0..=opcode).for_each(|times| counters.count_request(opcode, 0, 1 << times.min(35)));
            counters.count_request(opcode, 1 + opcode.cast_signed(), 5);
        }
    }
    counters.count_read(3);
    counters.count_written(4);
    counters.count_malformed();
    counters.set_held(Held { inodes: 5, handles: 6 });
    for ring in 0..2 {
        let request = InProgress { since_ns: 100 + ring as u64, opcode: 7 + ring as u32, node: 200 + ring as u64 };
        counters.set_in_progress(ring, Some(request));
    }
    counters.count_unreachable(0x1000, 0x2000);
    counters.set_waiting_for_memory(1, true);
    for (number, cause) in CAUSES.into_iter().enumerate() {
        (0..=number).for_each(|_| counters.count_stale(cause, b"a/b"));
    }
}

/// The page, with the same time in all events.
fn page_words(fd: &OwnedFd) -> String {
    let is_time = |value: u64| value > 1 << 40 && value < 1 << 42;
    let shown = words(&bytes_of(fd));
    let fixed = parse_words(shown.as_bytes()).into_iter().map(|(offset, value)| {
        let value = if is_time(value) { NOW } else { value };
        format!("{offset:06x} {value:016x}\n")
    });
    fixed.collect()
}

#[test]
fn counter_page_is_that_of_its_version() {
    let (fd, counters) = Counters::create().unwrap();
    fill(&counters);
    let present = page_words(&fd);
    let size = bytes_of(&fd).len();
    let present = format!("{present}{size:06x} 0000000000000000\n");
    // Layout 0 is layout 1 without its number.
    let mut fixtures = layouts("counters").check(0, counters::LAYOUT, present.as_bytes());
    fixtures.insert(counters::LAYOUT, present.into_bytes());
    for fixture in fixtures.values() {
        let read = Counters::map(&written(fixture)).unwrap();
        assert_eq!(read.totals(), counters.totals());
        assert_eq!((read.held(), read.mounts()), (counters.held(), counters.mounts()));
        assert_eq!(read.oldest_in_progress(), counters.oldest_in_progress());
        assert_eq!(read.unreachable_memory(), counters.unreachable_memory());
        assert_eq!(events(&read), events(&counters));
    }
}

/// Stale events without their time.
fn events(counters: &Counters) -> Vec<(u64, Cause, String)> {
    counters.stale_events().into_iter().map(|event| (event.sequence, event.cause, event.path)).collect()
}

#[test]
fn trace_is_that_of_its_version() {
    let (fd, ring) = TraceRing::create().unwrap();
    ring.enable(NOW, 2);
    let record = Record {
        at_ns: 1_000_000_001,
        duration_ns: 2,
        unique: 3,
        node: 4,
        opcode: 5,
        errno: 6,
        queue: 1,
        path: Some(b"/directory"),
        name: Some(b"name"),
    };
    ring.log(&record);
    ring.log(&Record { unique: 4, path: None, name: Some(&[b'n'; 300]), ..record });
    ring.log(&record);
    let present = words(&bytes_of(&fd));
    let size = bytes_of(&fd).len();
    let present = format!("{present}{size:06x} 0000000000000000\n");
    // Layout 0 is layout 1 without its number.
    let mut fixtures = layouts("trace").check(0, trace::LAYOUT.into(), present.as_bytes());
    fixtures.insert(trace::LAYOUT.into(), present.into_bytes());
    for fixture in fixtures.values() {
        let read = TraceRing::map(&written(fixture)).unwrap();
        assert_eq!((read.enabled_until(), read.rate_limited()), (NOW, 1));
        assert_eq!(read.read(0), ring.read(0));
    }
}
