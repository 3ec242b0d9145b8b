//! The report that this project began with: many small files in layers, and an engine that holds a descriptor of each.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::guest::Guest;
use crate::load::Load;
use crate::node::Node;
use crate::tree;

/// Layers for overlayfs, the uppermost first.
pub const LAYERS: [&str; 3] = ["top", "middle", "base"];

/// Files, spread over the layers.
pub const FILES: u64 = 10_000;

/// Number of files that are read again.
pub const AGAIN: u32 = 400;

/// Small files in the layers, and a list of their paths in the guest.
///
/// # Errors
/// When they cannot be written.
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

/// Takes the list into the guest: all files as `/run/list`, the last 3000 as `/run/others`.
///
/// # Errors
/// When the guest cannot read it.
pub fn take_list(guest: &mut Guest, mount: &str) -> Result<()> {
    guest.must(&format!("cp {mount}/list /run/list && tail -n 3000 /run/list >/run/others")).map(drop)
}

/// The library of 1.14 needs no descriptor to find an inode that it holds, so an engine that is full fails to open
/// files (ENFILE) but not to find them. One that holds none yet, as after the death of the one before, and is filled
/// with other files first, fails to find them; of a lookup that fails overlayfs makes ESTALE.
///
/// # Errors
/// When no other engine takes the place of the one that dies, or the guest does not work.
pub fn fall_ill(node: &Node, share: &str, guest: &mut Guest) -> Result<()> {
    node.kill_engine(share)?;
    guest.work(&Load::listed("/run/others"), 1)?;
    // Names are trusted for a second; after that the guest asks.
    sleep(Duration::from_secs(2));
    Ok(())
}
