//! Memory of an engine's ledger.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::Context;

/// Name of the ledger's memfd.
const LEDGER: &str = "/memfd:virtiofs-ledger";
/// Unit of `st_blocks` in bytes.
const BLOCK: u64 = 512;

/// Bytes of the allocated pages: the ledger is a sparse memfd.
pub(crate) fn ledger_bytes(engine: i32) -> anyhow::Result<u64> {
    let descriptors = fs::read_dir(format!("/proc/{engine}/fd")).context("listing the engine's descriptors")?;
    let is_ledger =
        |path: &std::path::PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with(LEDGER));
    let ledger = descriptors.flatten().map(|entry| entry.path()).find(is_ledger).context("the engine has no ledger")?;
    Ok(fs::metadata(ledger)?.blocks() * BLOCK)
}
