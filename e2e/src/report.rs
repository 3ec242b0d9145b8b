//! Reproduces the bug report that started this project: many small files in layers, and an engine that holds a
//! descriptor of each.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::guest::Guest;
use crate::load::Load;
use crate::node::Node;
use crate::tree;

/// Layers for overlayfs, topmost first.
pub const LAYERS: [&str; 3] = ["top", "middle", "base"];

/// Number of files in all layers together.
pub const FILES: u64 = 10_000;

/// Number of files that are read a second time.
pub const REREAD_FILES: u32 = 400;

/// Writes small files into the layers, and a list of their paths in the guest.
///
/// # Errors
/// If they cannot be written.
pub fn plant(source: &Path) -> Result<()> {
    let mut list = String::new();
    for (number, layer) in (0..).zip(LAYERS) {
        let share = FILES / LAYERS.len() as u64;
        let end = if number + 1 == LAYERS.len() as u64 { FILES } else { (number + 1) * share };
        for path in tree::plant_small(&source.join(layer), number * share..end)? {
            list.push_str(&format!("/mnt/merged/{path}\n"));
        }
    }
    fs::write(source.join("list"), list).context("writing the list of files")
}

/// Copies the list into the guest: all files as `/run/list`, the last 3000 as `/run/others`.
///
/// # Errors
/// If the guest cannot read it.
pub fn copy_list(guest: &mut Guest, mount: &str) -> Result<()> {
    guest.must(&format!("cp {mount}/list /run/list && tail -n 3000 /run/list >/run/others")).map(drop)
}

/// Makes lookups in overlayfs fail with ESTALE.
///
/// With the engine library 1.14 an engine needs no descriptor to find an inode that it holds, so a full engine fails to
/// open files (ENFILE) but finds them. This kills the engine and fills the new one, which holds no inode yet, with
/// other files. Its lookups then fail, and overlayfs turns a failed lookup into ESTALE.
///
/// # Errors
/// If no other engine replaces the killed one, or the guest's load fails.
pub fn provoke_estale(node: &Node, share: &str, guest: &mut Guest) -> Result<()> {
    node.kill_engine(share)?;
    guest.work(&Load::listed("/run/others"), 1)?;
    // The guest caches names for one second; then it sends lookups.
    sleep(Duration::from_secs(2));
    Ok(())
}
