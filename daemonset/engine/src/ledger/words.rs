//! The ledger's memory: 64-bit atomics in a shared mapping, addressed by number.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

/// Bytes of one page, the unit in which memory is returned to the system.
pub(super) const PAGE_BYTES: usize = 4096;

/// A range of shared words. Copies are views of the same words.
#[derive(Clone)]
pub(super) struct Words {
    map: Arc<MmapRaw>,
    count: u32,
}

impl Words {
    /// Maps a ledger that the broker created.
    ///
    /// # Errors
    /// If the file could shrink under the mapping, or has no valid size.
    pub(super) fn map(fd: &impl AsFd) -> io::Result<Self> {
        let file = std::fs::File::from(fd.as_fd().try_clone_to_owned()?);
        let seals = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS)?);
        let bytes = file.metadata()?.len();
        let count = u32::try_from(bytes / 8).ok().filter(|_| bytes % PAGE_BYTES as u64 == 0);
        match count {
            Some(count) if seals.contains(SealFlag::F_SEAL_SHRINK) => {
                Ok(Words { map: Arc::new(MmapOptions::new().map_raw(&file)?), count })
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "not a sealed ledger of whole pages below 32 GiB")),
        }
    }

    /// How many words there are.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    fn word(&self, at: u32) -> Option<&AtomicU64> {
        if at >= self.count {
            return None;
        }
        // SAFETY: `at` is inside the mapping, which is page-aligned, cannot shrink (checked in `map`) and lives
        // as long as `self`; any bit pattern is a value of an atomic integer.
        Some(unsafe { &*self.map.as_ptr().cast::<AtomicU64>().add(at as usize) })
    }

    /// The word at `at`; 0 outside the mapping, to which a damaged ledger may point.
    pub(super) fn get(&self, at: u32) -> u64 {
        #[cfg(test)]
        super::harness::before_load();
        self.word(at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Stores a word; does nothing outside the mapping.
    pub(super) fn set(&self, at: u32, value: u64) {
        #[cfg(test)]
        super::harness::before_store(at, self.get(at));
        #[cfg(feature = "die-at-store")]
        super::die_at_store::before_store();
        if let Some(word) = self.word(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Copies bytes to consecutive words and pads the last one with zeros.
    pub(super) fn set_bytes(&self, at: u32, bytes: &[u8]) {
        for (offset, chunk) in (0u32..).zip(bytes.chunks(8)) {
            let mut word = [0u8; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.set(at + offset, u64::from_le_bytes(word));
        }
    }

    /// Appends `length` bytes that begin at word `at` to `out`.
    pub(super) fn get_bytes(&self, at: u32, length: usize, out: &mut Vec<u8>) {
        let end = out.len() + length;
        for offset in 0..length.div_ceil(8) as u32 {
            out.extend_from_slice(&self.get(at + offset).to_le_bytes());
        }
        out.truncate(end);
    }

    /// True if the bytes that begin at word `at` are these.
    pub(super) fn bytes_equal(&self, at: u32, bytes: &[u8]) -> bool {
        (0u32..).zip(bytes.chunks(8)).all(|(offset, chunk)| {
            let word = self.get(at + offset).to_le_bytes();
            word[..chunk.len()] == *chunk
        })
    }

    /// Returns whole pages to the system; they read as zeros afterwards.
    pub(super) fn release(&self, from: u32, count: u32) {
        let start = (from as usize * 8).next_multiple_of(PAGE_BYTES);
        let end = ((from as usize + count as usize).min(self.count as usize) * 8) / PAGE_BYTES * PAGE_BYTES;
        if start < end {
            // SAFETY: the range is inside this mapping and consists of whole pages; the words in it are
            // atomics that may change at any time anyway.
            let result =
                unsafe { libc::madvise(self.map.as_mut_ptr().add(start).cast(), end - start, libc::MADV_REMOVE) };
            if result != 0 {
                tracing::debug!("ledger: returning pages: {}", io::Error::last_os_error());
            }
        }
    }
}
