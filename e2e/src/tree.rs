//! Directories for guests to work on, with content that the guest can check by itself.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};

#[path = "../guest/pattern.rs"]
pub mod pattern;

/// Files in each directory of a tree.
const PER_DIRECTORY: u64 = 20;

/// Fills `root` with `files` files whose names describe their content to the guest, from empty to 64 KiB.
///
/// # Errors
/// When it cannot be written.
pub fn plant(root: &Path, files: u64) -> Result<()> {
    (0..files).try_for_each(|seed| plant_one(root, seed, seed * 7919 % 65_537).map(drop))
}

/// Fills `root` with one small file for each seed, and returns their paths below it.
///
/// # Errors
/// When it cannot be written.
pub fn plant_small(root: &Path, seeds: Range<u64>) -> Result<Vec<String>> {
    seeds.map(|seed| plant_one(root, seed, seed % 97)).collect()
}

fn plant_one(root: &Path, seed: u64, length: u64) -> Result<String> {
    let directory = format!("d{}", seed / PER_DIRECTORY);
    let path = format!("{directory}/{}", pattern::name(seed, length));
    fs::create_dir_all(root.join(directory))
        .and_then(|()| fs::write(root.join(&path), pattern::content(seed, length)))
        .with_context(|| format!("planting {path} in {}", root.display()))?;
    Ok(path)
}
