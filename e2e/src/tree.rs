//! Directories for guests to work on, with content that the guest can check by itself.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

#[path = "../guest/pattern.rs"]
pub mod pattern;

/// Files in each directory of a tree.
const PER_DIRECTORY: u64 = 20;

/// Fills `root` with `files` files whose names tell the guest what is in them, from empty to 64 KiB.
///
/// # Errors
/// When it cannot be written.
pub fn plant(root: &Path, files: u64) -> Result<()> {
    for seed in 0..files {
        let directory = root.join(format!("d{}", seed / PER_DIRECTORY));
        let length = seed * 7919 % 65_537;
        fs::create_dir_all(&directory)
            .and_then(|()| fs::write(directory.join(pattern::name(seed, length)), pattern::content(seed, length)))
            .with_context(|| format!("planting files in {}", directory.display()))?;
    }
    Ok(())
}
