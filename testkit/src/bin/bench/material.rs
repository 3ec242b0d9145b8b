//! The files of the benchmark, the same for both systems, which never work at the same time. Separate files to write
//! would favour one of them by the position of pages and extents.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Number of files in the directory that is looked up, opened and listed repeatedly.
pub(crate) const FEW: usize = 2_000;
/// Number of files in the directory whose nodes are new to the server at each lookup. Without file handles each needs a
/// descriptor, of which there may be 20000.
pub(crate) const MANY: usize = 12_000;
/// Length of the files that are read and written, in bytes.
pub(crate) const LONG: u64 = 64 << 20;

/// The files of the benchmark.
#[derive(Debug)]
pub(crate) struct Material {
    /// The shared directory.
    pub(crate) share: PathBuf,
}

impl Material {
    /// Creates the files, or reuses those of an earlier run.
    pub(crate) fn create(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let share = directory.canonicalize()?;
        many_files(&share.join("few"), FEW)?;
        many_files(&share.join("many"), MANY)?;
        long_file(&share.join("read"))?;
        long_file(&share.join("written"))?;
        // Left by an interrupted run.
        let _ = fs::remove_dir_all(share.join("made"));
        fs::create_dir_all(share.join("made"))?;
        Ok(Self { share })
    }
}

/// The name of a file in `few` or `many`.
pub(crate) fn name(index: usize) -> String {
    format!("file-{index:05}")
}

fn many_files(directory: &Path, count: usize) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for index in 0..count {
        let path = directory.join(name(index));
        if !path.exists() {
            fs::write(path, b"contents of a small file\n")?;
        }
    }
    Ok(())
}

fn long_file(path: &Path) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|meta| meta.len() == LONG) {
        // Read once, so that both systems find it in the page cache.
        return fs::read(path).map(drop);
    }
    let block: Vec<u8> = (0..1_u32 << 20).map(|i| (i % 251) as u8).collect();
    fs::write(path, block.repeat((LONG >> 20) as usize))
}
