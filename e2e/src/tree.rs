//! Directory trees for guests, with content that the guest can check by itself.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};

#[path = "../guest/pattern.rs"]
pub mod pattern;

/// Number of files in each directory of a tree.
const PER_DIRECTORY: u64 = 20;

/// Writes `files` files of 0 to 64 KiB below `root`. Their names describe their content to the guest.
///
/// # Errors
/// If a file cannot be written.
pub fn plant(root: &Path, files: u64) -> Result<()> {
    (0..files).try_for_each(|seed| plant_one(root, seed, seed * 7919 % 65_537).map(drop))
}

/// Writes one small file for each seed below `root`, and returns their paths relative to `root`.
///
/// # Errors
/// If a file cannot be written.
pub fn plant_small(root: &Path, seeds: Range<u64>) -> Result<Vec<String>> {
    seeds.map(|seed| plant_one(root, seed, seed % 97)).collect()
}

fn plant_one(root: &Path, seed: u64, length: u64) -> Result<String> {
    let directory = format!("d{}", seed / PER_DIRECTORY);
    let path = format!("{directory}/{}", pattern::name(seed, length));
    fs::create_dir_all(root.join(directory))
        .and_then(|()| fs::write(root.join(&path), pattern::content(seed, length)))
        .with_context(|| format!("writing {path} in {}", root.display()))?;
    Ok(path)
}
