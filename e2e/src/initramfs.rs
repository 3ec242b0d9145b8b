//! The guest's root file system: busybox, the overlay module, the init script and the load program.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc;

use crate::parts::Parts;

const INIT: &[u8] = include_bytes!("../guest/init");
const LOAD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-load"));

/// Writes the initramfs of the guest as a cpio archive.
///
/// # Errors
/// If a part cannot be read or the archive cannot be written.
pub(crate) fn write(parts: &Parts, to: &Path) -> Result<()> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let (busybox, overlay) = (read(&parts.busybox)?, read(&parts.overlay_module)?);
    let files = [
        Entry::directory("bin"),
        Entry::program("bin/busybox", &busybox),
        Entry::program("bin/guest-load", LOAD),
        Entry::program("init", INIT),
        Entry::program("overlay.ko", &overlay),
    ];
    archive(&files, to).with_context(|| format!("writing {}", to.display()))
}

struct Entry<'a> {
    name: &'static str,
    mode: u32,
    content: &'a [u8],
}

impl<'a> Entry<'a> {
    fn directory(name: &'static str) -> Self {
        Self { name, mode: 0o040_755, content: &[] }
    }

    fn program(name: &'static str, content: &'a [u8]) -> Self {
        Self { name, mode: 0o100_755, content }
    }
}

fn archive(entries: &[Entry<'_>], to: &Path) -> io::Result<()> {
    let mut out = BufWriter::new(File::create(to)?);
    for (inode, entry) in (1..).zip(entries) {
        let length = u32::try_from(entry.content.len()).map_err(io::Error::other)?;
        let mut writer = newc::Builder::new(entry.name).ino(inode).mode(entry.mode).nlink(1).write(&mut out, length);
        writer.write_all(entry.content)?;
        writer.finish()?;
    }
    newc::trailer(&mut out)?;
    out.flush()
}
