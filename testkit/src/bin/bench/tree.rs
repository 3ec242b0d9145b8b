//! A tree of very many files for guests to hold, made once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, openat};

/// Files in one directory.
const PER_DIRECTORY: usize = 10_000;
/// A file as long as the longest read, with which engines are made to touch guest memory.
pub(crate) const BLOCK: &str = "block";
/// Its length.
pub(crate) const BLOCK_LENGTH: u32 = 1 << 20;
/// Says how many files there are, once they all are there.
const COMPLETE: &str = "complete";

/// The files below one directory.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
}

impl Tree {
    /// Makes what is missing. Real files: hard links to few inodes would cost a server next to nothing.
    pub(crate) fn grow(root: &Path, files: usize) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let root = root.canonicalize()?;
        let done: usize = fs::read_to_string(root.join(COMPLETE)).ok().and_then(|n| n.parse().ok()).unwrap_or(0);
        for directory in done / PER_DIRECTORY..files.div_ceil(PER_DIRECTORY) {
            fill(&root.join(directory_name(directory)), PER_DIRECTORY.min(files - directory * PER_DIRECTORY))?;
        }
        fs::write(root.join(COMPLETE), done.max(files).to_string())?;
        fs::write(root.join(BLOCK), vec![0x5a; BLOCK_LENGTH as usize])?;
        Ok(Self { root })
    }
}

/// Directory and name of the n-th file.
pub(crate) fn place(index: usize) -> (usize, String) {
    (index / PER_DIRECTORY, file_name(index % PER_DIRECTORY))
}

pub(crate) fn directory_name(directory: usize) -> String {
    format!("d{directory:04}")
}

fn file_name(index: usize) -> String {
    format!("file-{index:05}")
}

fn fill(directory: &Path, count: usize) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let within = openat(CWD, directory, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    for index in 0..count {
        match mknodat(&within, file_name(index), FileType::RegularFile, Mode::from_raw_mode(0o644), 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
