//! Files to work on: the same for both contestants, who never work at the same time. A file of one's own
//! for each to write would favour one of them by how its pages and extents happen to lie.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Files in the directory that is looked up, opened and listed again and again.
pub(crate) const FEW: usize = 2_000;
/// Files in the directory whose nodes are new to the server at each lookup. Where file handles do not
/// work each takes a descriptor, of which there may be 20000.
pub(crate) const MANY: usize = 12_000;
/// Length of the files that are read and written.
pub(crate) const LONG: u64 = 64 << 20;

/// A laid-out share.
#[derive(Debug)]
pub(crate) struct Material {
    /// The shared directory.
    pub(crate) share: PathBuf,
}

impl Material {
    /// Lays the files out, or finds them from the last time.
    pub(crate) fn lay_out(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let share = directory.canonicalize()?;
        many_files(&share.join("few"), FEW)?;
        many_files(&share.join("many"), MANY)?;
        long_file(&share.join("read"))?;
        long_file(&share.join("written"))?;
        // What a run that was cut short left behind.
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
        // Read once, so that both contestants find it in the page cache.
        return fs::read(path).map(drop);
    }
    let block: Vec<u8> = (0..1_u32 << 20).map(|i| (i % 251) as u8).collect();
    fs::write(path, block.repeat((LONG >> 20) as usize))
}
