//! Files of a share that all guests read and none writes.

use std::fs;
use std::io;
use std::path::Path;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::op::Fill;

/// Their directory, relative to the root of the share.
pub(super) const DIRECTORY: &str = "shared";

/// Files with content from a seed.
#[derive(Debug, Clone)]
pub struct SharedPart {
    files: Vec<Vec<u8>>,
}

impl SharedPart {
    /// `count` files of up to `longest` bytes.
    pub fn new(seed: u64, count: usize, longest: usize) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let files = (0..count).map(|_| {
            let len = random.random_range(0..=longest);
            Fill { seed: random.random(), len }.bytes()
        });
        Self { files: files.collect() }
    }

    /// Writes the files to the host's directory.
    pub fn create(&self, share: &Path) -> io::Result<()> {
        let directory = share.join(DIRECTORY);
        fs::create_dir_all(&directory)?;
        for (index, data) in self.files.iter().enumerate() {
            fs::write(directory.join(name(index)), data)?;
        }
        Ok(())
    }

    /// Number of files.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The content of a file.
    pub fn data(&self, index: usize) -> &[u8] {
        self.files.get(index).map_or(&[], Vec::as_slice)
    }
}

/// The name of a file.
pub(super) fn name(index: usize) -> String {
    format!("file-{index}")
}
