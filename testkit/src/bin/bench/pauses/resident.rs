//! What an engine's ledger takes in memory.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::Context;

/// The name of its memfd.
const LEDGER: &str = "/memfd:virtiofs-ledger";
/// What `st_blocks` counts.
const BLOCK: u64 = 512;

/// Bytes of the pages that are there: the ledger is a sparse memfd, which has no other blocks.
pub(crate) fn ledger_bytes(engine: i32) -> anyhow::Result<u64> {
    let descriptors = fs::read_dir(format!("/proc/{engine}/fd")).context("listing the engine's descriptors")?;
    let is_ledger =
        |path: &std::path::PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with(LEDGER));
    let ledger = descriptors.flatten().map(|entry| entry.path()).find(is_ledger).context("the engine has no ledger")?;
    Ok(fs::metadata(ledger)?.blocks() * BLOCK)
}
