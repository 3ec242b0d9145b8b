//! A tree of very many files for guests to hold, created once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, openat};

/// Number of files in one directory.
const PER_DIRECTORY: usize = 10_000;
/// A file as long as the longest read. Engines that read it touch guest memory.
pub(crate) const BLOCK: &str = "block";
/// Length of that file in bytes.
pub(crate) const BLOCK_LENGTH: u32 = 1 << 20;
/// A file with the number of files, written when all exist.
const COMPLETE: &str = "complete";

/// The files below one directory.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) root: PathBuf,
}

impl Tree {
    /// Creates missing files. They are real files: hard links to few inodes would cost a server almost nothing.
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

/// Directory and name of file number `index`.
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
