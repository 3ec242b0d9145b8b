//! A guest that reads: it walks a tree by absolute paths and reads every file, and reads once more
//! relative to a working directory it entered at the start and never left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::pattern;
use crate::tally::Tally;

pub struct Reader {
    root: PathBuf,
    /// A file in the working directory, by its name alone.
    beside: Option<PathBuf>,
}

impl Reader {
    pub fn enter(root: &Path) -> io::Result<Self> {
        let home = first_directory(root)?.unwrap_or_else(|| root.to_owned());
        std::env::set_current_dir(&home)?;
        Ok(Self { root: root.to_owned(), beside: first_file(&home)? })
    }

    pub fn round(&self, tally: &mut Tally) {
        walk(&self.root, tally);
        if let Some(name) = &self.beside {
            tally.of("list the working directory", || entries(Path::new(".")));
            read(name, tally);
        }
    }
}

fn walk(directory: &Path, tally: &mut Tally) {
    let what = format!("list {}", directory.display());
    for path in tally.of(&what, || entries(directory)).unwrap_or_default() {
        let what = format!("stat {}", path.display());
        match tally.of(&what, || fs::symlink_metadata(&path)) {
            Some(found) if found.is_dir() => walk(&path, tally),
            Some(found) if found.is_file() => read(&path, tally),
            Some(found) if found.is_symlink() => drop(tally.of(&what, || fs::read_link(&path))),
            Some(_) | None => (),
        }
    }
}

/// Reads a file whole; where its name tells what is in it, compares.
fn read(path: &Path, tally: &mut Tally) {
    let Some(bytes) = tally.of(&format!("read {}", path.display()), || fs::read(path)) else { return };
    let told = path.file_name().and_then(|name| pattern::parse(name.to_str()?));
    if let Some((seed, length)) = told {
        tally.expect(bytes == pattern::content(seed, length), || format!("{}: wrong content", path.display()));
    }
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
