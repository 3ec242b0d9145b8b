//! The record in a memfd, from which the next broker can restore a session.
//!
//! It has two copies, written in turn, each after its sequence number, length and checksum. A SIGKILL between any two
//! stores leaves at least one valid copy; the newest valid copy counts. Descriptors are stored as the numbers that the
//! session assigned.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::SessionRecord;

/// Version of the layout. It increases with each change that another broker would misread.
const LAYOUT: u32 = 1;

const MAGIC: &[u8; 8] = b"vfsrec\0\0";

/// Bytes of one copy, header included: several times the size of the largest record.
const COPY: usize = 64 << 10;

const HEADER: usize = 16;
const COPY_HEADER: usize = 24;
const SIZE: usize = HEADER + 2 * COPY;

/// Everything about a session that outlives the broker's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stored {
    /// Name of the session.
    pub(crate) session: String,
    /// Name of its endpoint.
    pub(crate) endpoint: String,
    /// The record, with numbers instead of descriptors.
    pub(crate) record: SessionRecord<u32>,
}

/// Why a record cannot be stored or restored.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    #[error("memfd: {0}")]
    Io(io::Error),
    #[error("a record of {0} bytes; at most {max} fit", max = COPY - COPY_HEADER)]
    TooLarge(usize),
    #[error("not a session record of layout {LAYOUT}")]
    Foreign,
    #[error("neither copy of the record is whole")]
    Torn,
    #[error("the record names descriptor {0}, which is not there")]
    MissingDescriptor(u32),
    #[error("record: {0}")]
    Json(serde_json::Error),
}

from_cause!(StoreError::Io(io::Error));
from_cause!(StoreError::Json(serde_json::Error));

/// The memfd of one session.
#[derive(Debug)]
pub(crate) struct RecordStore {
    file: File,
    sequence: u64,
}

impl RecordStore {
    /// Creates a memfd that cannot shrink under its reader.
    pub(crate) fn create() -> Result<Self, StoreError> {
        let fd = memfd_create("virtiofs-session", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(io::Error::from)?;
        let file = File::from(fd);
        file.set_len(SIZE as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(io::Error::from)?;
        file.write_all_at(&header(), 0)?;
        Ok(RecordStore { file, sequence: 0 })
    }

    /// Writes the record to the older copy, and makes it the newest.
    pub(crate) fn write(&mut self, stored: &Stored) -> Result<(), StoreError> {
        let body = serde_json::to_vec(stored)?;
        if body.len() > COPY - COPY_HEADER {
            return Err(StoreError::TooLarge(body.len()));
        }
        self.sequence += 1;
        let at = (HEADER + COPY * (self.sequence % 2) as usize) as u64;
        self.file.write_all_at(&body, at + COPY_HEADER as u64)?;
        self.file.write_all_at(&copy_header(self.sequence, &body), at)?;
        Ok(())
    }
}

impl AsFd for RecordStore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Reads a record memfd.
#[cfg_attr(not(test), expect(dead_code, reason = "the keeper hands records in from the next issue on"))]
pub(crate) fn restore(memfd: OwnedFd) -> Result<Stored, StoreError> {
    let file = File::from(memfd);
    let mut bytes = vec![0u8; SIZE];
    let mut length = 0;
    while length < SIZE {
        match file.read_at(&mut bytes[length..], length as u64)? {
            0 => break,
            more => length += more,
        }
    }
    parse(&bytes[..length])
}

/// The newest valid copy in these bytes.
pub(crate) fn parse(bytes: &[u8]) -> Result<Stored, StoreError> {
    if bytes.get(..HEADER) != Some(&header()[..]) {
        return Err(StoreError::Foreign);
    }
    let copies = [HEADER, HEADER + COPY].map(|at| bytes.get(at..).and_then(whole_copy));
    let newest = copies.into_iter().flatten().max_by_key(|(sequence, _)| *sequence);
    let (_, body) = newest.ok_or(StoreError::Torn)?;
    Ok(serde_json::from_slice(body)?)
}

/// The record with descriptors instead of numbers.
#[cfg_attr(not(test), expect(dead_code, reason = "the keeper hands records in from the next issue on"))]
pub(crate) fn with_descriptors<F>(
    record: &SessionRecord<u32>,
    mut find: impl FnMut(u32) -> Option<F>,
) -> Result<SessionRecord<F>, StoreError> {
    record.try_map(|number| find(*number).ok_or(StoreError::MissingDescriptor(*number)))
}

fn header() -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&LAYOUT.to_le_bytes());
    header
}

fn copy_header(sequence: u64, body: &[u8]) -> [u8; COPY_HEADER] {
    let mut header = [0; COPY_HEADER];
    header[..8].copy_from_slice(&sequence.to_le_bytes());
    header[8..16].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[16..].copy_from_slice(&checksum(sequence, body).to_le_bytes());
    header
}

fn whole_copy(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let field = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let (sequence, length, sum) = (field(0)?, field(8)?, field(16)?);
    let length = usize::try_from(length).ok().filter(|length| *length <= COPY - COPY_HEADER)?;
    let body = bytes.get(COPY_HEADER..COPY_HEADER + length)?;
    (sequence != 0 && checksum(sequence, body) == sum).then_some((sequence, body))
}

/// FNV-1a: detects torn writes, not forgeries.
fn checksum(sequence: u64, body: &[u8]) -> u64 {
    let bytes = sequence.to_le_bytes().into_iter().chain(body.iter().copied());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::super::Ring;
    use super::*;
    use crate::vhost_user::codec::{Layout, Region, RingAddress};

    fn stored(base: u16) -> Stored {
        let layout = Layout { guest_addr: 0, size: 1 << 30, user_addr: 0x7f00_0000_0000, offset: 4096 };
        let ring = Ring {
            size: 1024,
            base,
            address: Some(RingAddress { descriptors: 16, used: 32, available: 64 }),
            kick: Some(2),
            call: Some(3),
            ..Ring::default()
        };
        Stored {
            session: "share-1".into(),
            endpoint: "share".into(),
            record: SessionRecord {
                features: Some(u64::MAX),
                regions: vec![Region { layout, file: 1 }],
                rings: [ring, Ring::default()],
                ..SessionRecord::default()
            },
        }
    }

    fn bytes_of(store: &RecordStore) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        store.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn newest_record_is_restored() {
        let mut store = RecordStore::create().unwrap();
        assert!(matches!(restore(store.file.try_clone().unwrap().into()), Err(StoreError::Torn)));
        for base in 0..5 {
            store.write(&stored(base)).unwrap();
            assert_eq!(restore(store.file.try_clone().unwrap().into()).unwrap(), stored(base));
        }
        assert!(store.file.set_len(0).is_err());
    }

    #[test]
    fn torn_write_leaves_the_old_or_the_new_record() {
        let mut store = RecordStore::create().unwrap();
        store.write(&stored(1)).unwrap();
        let before = bytes_of(&store);
        store.write(&stored(2)).unwrap();
        let after = bytes_of(&store);
        let at = HEADER;
        let body = serde_json::to_vec(&stored(2)).unwrap().len();
        // The body is stored before its header.
        let order = (at + COPY_HEADER..at + COPY_HEADER + body).chain(at..at + COPY_HEADER);
        let mut torn = before.clone();
        for byte in order {
            assert_eq!(parse(&torn).unwrap(), stored(1));
            torn[byte] = after[byte];
        }
        assert_eq!(torn, after);
        assert_eq!(parse(&torn).unwrap(), stored(2));
    }

    #[test]
    fn truncated_file_is_an_error_or_the_older_record() {
        let mut store = RecordStore::create().unwrap();
        store.write(&stored(1)).unwrap();
        store.write(&stored(2)).unwrap();
        let bytes = bytes_of(&store);
        let body = serde_json::to_vec(&stored(2)).unwrap().len();
        let interesting = (0..HEADER + COPY_HEADER + body + 1).chain(HEADER + COPY..HEADER + COPY + COPY_HEADER + body);
        for length in interesting {
            match parse(&bytes[..length]) {
                Ok(found) => assert_eq!(found, stored(2)),
                Err(StoreError::Foreign) => assert!(length < HEADER),
                Err(StoreError::Torn) => assert!(length < HEADER + COPY_HEADER + body),
                Err(other) => panic!("{length}: {other}"),
            }
        }
    }

    #[test]
    fn flipped_byte_is_detected() {
        let mut store = RecordStore::create().unwrap();
        store.write(&stored(1)).unwrap();
        store.write(&stored(2)).unwrap();
        let good = bytes_of(&store);
        let body = serde_json::to_vec(&stored(2)).unwrap().len();
        for byte in HEADER..HEADER + COPY_HEADER + body {
            let mut bad = good.clone();
            bad[byte] ^= 0x10;
            assert_eq!(parse(&bad).unwrap(), stored(1), "byte {byte}");
        }
    }

    #[test]
    fn descriptors_are_restored_by_number() {
        let record = stored(1).record;
        let named = with_descriptors(&record, |number| Some(format!("fd {number}"))).unwrap();
        assert_eq!(named.regions[0].file, "fd 1");
        assert_eq!(named.rings[0].call.as_deref(), Some("fd 3"));
        let missing = with_descriptors(&record, |number| (number != 3).then_some(number));
        assert!(matches!(missing, Err(StoreError::MissingDescriptor(3))));
    }

    #[test]
    fn oversized_record_is_refused() {
        let mut store = RecordStore::create().unwrap();
        let too_long = Stored { session: "x".repeat(COPY), ..stored(1) };
        assert!(matches!(store.write(&too_long), Err(StoreError::TooLarge(_))));
    }
}
