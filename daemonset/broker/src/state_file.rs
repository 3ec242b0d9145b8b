//! A value in a memfd, from which the next broker reads it.
//!
//! There are two copies, written in turn, each after its sequence number, length and checksum. A SIGKILL between any two
//! stores leaves at least one valid copy; the newest valid copy counts.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use virtiofs_contract::lenient;

/// Layout of the file: header, copies and checksums. A broker writes it and reads [`READABLE`]. It does not change with the
/// value, which is JSON: a broker that follows may be newer or older, so fields are only added, with a default, and unknown
/// ones are ignored. [`StateFile::open_newer`] names them.
const LAYOUT: u32 = 2;

/// Layouts that this broker reads: its own, and the one before it once there is one.
const READABLE: RangeInclusive<u32> = LAYOUT..=LAYOUT;

const MAGIC: &[u8; 8] = b"vfsstate";

const HEADER: usize = 16;
const COPY_HEADER: usize = 24;

/// Why a value cannot be stored or read.
#[derive(Debug, Error)]
pub(crate) enum StateFileError {
    #[error("memfd: {0}")]
    Io(io::Error),
    #[error("a value of {size} bytes; at most {most} fit")]
    TooLarge { size: usize, most: usize },
    #[error("not a state file")]
    Foreign,
    #[error("state file of layout {0}; this broker reads layout {LAYOUT}")]
    Layout(u32),
    #[error("neither copy is whole")]
    Torn,
    #[error("content: {0}")]
    Json(serde_json::Error),
}

from_cause!(StateFileError::Io(io::Error));
from_cause!(StateFileError::Json(serde_json::Error));

/// The memfd of one value.
#[derive(Debug)]
pub(crate) struct StateFile<T> {
    file: File,
    sequence: u64,
    /// Bytes of one copy, header included.
    copy: usize,
    content: PhantomData<fn(&T)>,
}

impl<T: Serialize + DeserializeOwned> StateFile<T> {
    /// Creates a memfd for values of up to `most` bytes. It is sparse, and cannot shrink under its reader.
    pub(crate) fn create(name: &str, most: usize) -> Result<Self, StateFileError> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(io::Error::from)?;
        let (file, copy) = (File::from(fd), COPY_HEADER + most);
        file.set_len((HEADER + 2 * copy) as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(io::Error::from)?;
        file.write_all_at(&header(), 0)?;
        Ok(StateFile { file, sequence: 0, copy, content: PhantomData })
    }

    /// Writes the value to the older copy, and makes it the newest.
    pub(crate) fn write(&mut self, value: &T) -> Result<(), StateFileError> {
        let body = serde_json::to_vec(value)?;
        if body.len() > self.copy - COPY_HEADER {
            return Err(StateFileError::TooLarge { size: body.len(), most: self.copy - COPY_HEADER });
        }
        self.sequence += 1;
        let at = (HEADER + self.copy * (self.sequence % 2) as usize) as u64;
        self.file.write_all_at(&body, at + COPY_HEADER as u64)?;
        self.file.write_all_at(&copy_header(self.sequence, &body), at)?;
        Ok(())
    }

    /// Opens the memfd of an earlier broker and reads its value. Unknown fields are ignored.
    pub(crate) fn open(memfd: OwnedFd) -> Result<(Self, T), StateFileError> {
        Self::open_newer(memfd).map(|(file, value, _)| (file, value))
    }

    /// Like [`open`](Self::open). Also returns the paths of unknown fields, which the next write drops.
    pub(crate) fn open_newer(memfd: OwnedFd) -> Result<(Self, T, Vec<String>), StateFileError> {
        let file = File::from(memfd);
        let size = usize::try_from(file.metadata()?.len()).map_err(|_| StateFileError::Foreign)?;
        let mut found = [0; HEADER];
        if size < HEADER + 2 * COPY_HEADER || file.read_at(&mut found, 0)? < HEADER || !found.starts_with(MAGIC) {
            return Err(StateFileError::Foreign);
        }
        let layout = layout_of(&found);
        if !READABLE.contains(&layout) {
            return Err(StateFileError::Layout(layout));
        }
        let copy = (size - HEADER) / 2;
        let copies = [HEADER, HEADER + copy].map(|at| whole_copy(&file, at as u64, copy - COPY_HEADER));
        let mut newest = None;
        for found in copies {
            newest = newest.max(found?);
        }
        let (sequence, body) = newest.ok_or(StateFileError::Torn)?;
        let (value, unknown) = lenient::from_slice(&body)?;
        Ok((StateFile { file, sequence, copy, content: PhantomData }, value, unknown))
    }
}

impl<T> AsFd for StateFile<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn header() -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&LAYOUT.to_le_bytes());
    header
}

fn layout_of(header: &[u8; HEADER]) -> u32 {
    let mut layout = [0; 4];
    layout.copy_from_slice(&header[8..12]);
    u32::from_le_bytes(layout)
}

fn copy_header(sequence: u64, body: &[u8]) -> [u8; COPY_HEADER] {
    let mut header = [0; COPY_HEADER];
    header[..8].copy_from_slice(&sequence.to_le_bytes());
    header[8..16].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[16..].copy_from_slice(&checksum(sequence, body).to_le_bytes());
    header
}

/// Sequence number and body of the copy at this position, if it is whole.
fn whole_copy(file: &File, at: u64, most: usize) -> io::Result<Option<(u64, Vec<u8>)>> {
    let mut header = [0; COPY_HEADER];
    file.read_exact_at(&mut header, at)?;
    let field = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let (sequence, sum) = (field(0), field(16));
    let Some(length) = usize::try_from(field(8)).ok().filter(|length| *length <= most) else { return Ok(None) };
    let mut body = vec![0; length];
    file.read_exact_at(&mut body, at + COPY_HEADER as u64)?;
    Ok((sequence != 0 && checksum(sequence, &body) == sum).then_some((sequence, body)))
}

/// FNV-1a: detects torn writes, not forgeries.
fn checksum(sequence: u64, body: &[u8]) -> u64 {
    let bytes = sequence.to_le_bytes().into_iter().chain(body.iter().copied());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// A state file that has this JSON.
#[cfg(test)]
pub(crate) fn file_of(value: &serde_json::Value) -> OwnedFd {
    let mut state = StateFile::create("other", 1 << 16).unwrap();
    state.write(value).unwrap();
    state.file.into()
}

/// Compares the file of a value with the fixture of its layout, and reads the value back from it.
#[cfg(test)]
pub(crate) fn check_layout<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(name: &str, value: &T) {
    let most = serde_json::to_vec(value).unwrap().len();
    let mut state = StateFile::create("fixture", most).unwrap();
    state.write(value).unwrap();
    let mut bytes = vec![0; HEADER + 2 * (COPY_HEADER + most)];
    state.file.read_exact_at(&mut bytes, 0).unwrap();
    let layouts = testkit::layouts::Layouts::of(env!("CARGO_MANIFEST_DIR"), name);
    layouts.check((*READABLE.start()).into(), LAYOUT.into(), &bytes);

    let file = File::from(memfd_create("fixture", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(&bytes, 0).unwrap();
    assert_eq!(StateFile::<T>::open(file.into()).unwrap().1, *value);
}

#[cfg(test)]
mod tests {
    use super::*;

    type Values = StateFile<String>;

    const MOST: usize = 1000;

    fn value(number: u32) -> String {
        format!("value {number}")
    }

    fn bytes_of(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; HEADER + 2 * (COPY_HEADER + MOST)];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<String, StateFileError> {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        Values::open(file.into()).map(|(_, value)| value)
    }

    #[test]
    fn newest_value_is_read_and_written_on() {
        let mut state = Values::create("test", MOST).unwrap();
        let open = |state: &Values| Values::open(state.file.try_clone().unwrap().into());
        assert!(matches!(open(&state), Err(StateFileError::Torn)));
        for number in 0..5 {
            state.write(&value(number)).unwrap();
            assert_eq!(open(&state).unwrap().1, value(number));
        }
        let (mut next, _) = open(&state).unwrap();
        for number in 5..8 {
            next.write(&value(number)).unwrap();
            assert_eq!(open(&next).unwrap().1, value(number));
        }
        assert!(state.file.set_len(0).is_err());
        let refused = state.write(&"x".repeat(MOST));
        assert!(matches!(refused, Err(StateFileError::TooLarge { most: MOST, .. })), "{refused:?}");
    }

    #[test]
    fn torn_write_leaves_the_old_or_the_new_value() {
        let mut state = Values::create("test", MOST).unwrap();
        state.write(&value(1)).unwrap();
        let before = bytes_of(&state.file);
        state.write(&value(2)).unwrap();
        let after = bytes_of(&state.file);
        let at = HEADER;
        let body = serde_json::to_vec(&value(2)).unwrap().len();
        // The body is stored before its header.
        let order = (at + COPY_HEADER..at + COPY_HEADER + body).chain(at..at + COPY_HEADER);
        let mut torn = before.clone();
        for byte in order {
            assert_eq!(parse(&torn).unwrap(), value(1));
            torn[byte] = after[byte];
        }
        assert_eq!(torn, after);
        assert_eq!(parse(&torn).unwrap(), value(2));
    }

    #[test]
    fn foreign_or_truncated_file_is_an_error() {
        let mut state = Values::create("test", MOST).unwrap();
        state.write(&value(1)).unwrap();
        let bytes = bytes_of(&state.file);
        for length in 0..bytes.len() {
            assert!(!matches!(parse(&bytes[..length]), Ok(found) if found != value(1)), "{length}");
        }
        let mut other = bytes.clone();
        other[8] += 1;
        assert!(matches!(parse(&other), Err(StateFileError::Layout(layout)) if layout == LAYOUT + 1));
        assert!(matches!(parse(b"something"), Err(StateFileError::Foreign)));
    }
}
