//! Load: walks a tree by absolute paths and reads every file, then reads again relative to a working directory that it
//! entered at the start.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::pattern;
use crate::tally::Tally;

/// Number of bytes that are read of a file: a user's directory may contain files larger than the guest's memory.
const MOST_BYTES: u64 = 4 << 20;

pub struct Reader {
    root: PathBuf,
    /// Number of files that are read in one round.
    most: u64,
    /// Name of a file in the working directory.
    beside: Option<PathBuf>,
}

impl Reader {
    pub fn enter(root: &Path, most: u64) -> io::Result<Self> {
        let home = first_directory(root)?.unwrap_or_else(|| root.to_owned());
        std::env::set_current_dir(&home)?;
        Ok(Self { root: root.to_owned(), most, beside: first_file(&home)? })
    }

    pub fn round(&self, tally: &mut Tally) {
        walk(&self.root, &mut self.most.clone(), tally);
        if let Some(name) = &self.beside {
            tally.of("list the working directory", || entries(Path::new(".")));
            read(name, tally);
        }
    }
}

/// Reads files below `directory` until `left` files have been read.
fn walk(directory: &Path, left: &mut u64, tally: &mut Tally) {
    let what = format!("list {}", directory.display());
    for path in tally.of(&what, || entries(directory)).unwrap_or_default() {
        if *left == 0 {
            return;
        }
        let what = format!("stat {}", path.display());
        match tally.of(&what, || fs::symlink_metadata(&path)) {
            Some(found) if found.is_dir() => walk(&path, left, tally),
            Some(found) if found.is_file() => {
                *left -= 1;
                read(&path, tally);
            }
            Some(found) if found.is_symlink() => drop(tally.of(&what, || fs::read_link(&path))),
            Some(_) | None => (),
        }
    }
}

/// Reads a file, and checks its content if its name describes it.
pub fn read(path: &Path, tally: &mut Tally) {
    let Some(bytes) = tally.of(&format!("read {}", path.display()), || head(path)) else { return };
    let described = path.file_name().and_then(|name| pattern::parse(name.to_str()?));
    if let Some((seed, length)) = described {
        tally.expect(bytes == pattern::content(seed, length), || format!("{}: wrong content", path.display()));
    }
}

fn head(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn first_directory(root: &Path) -> io::Result<Option<PathBuf>> {
    Ok(entries(root)?.into_iter().find(|path| path.is_dir() && !path.is_symlink()))
}

fn first_file(directory: &Path) -> io::Result<Option<PathBuf>> {
    let found = entries(directory)?.into_iter().find(|path| path.is_file() && !path.is_symlink());
    Ok(found.and_then(|path| path.file_name().map(PathBuf::from)))
}
