//! A regular file on each file system of the share, for preflight. Each engine searches before it serves, so the search is
//! bounded for all file systems together.

use std::collections::VecDeque;
use std::fs::{self, DirEntry};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Most directory entries that are read on one file system.
const MAX_ENTRIES: usize = 2000;

/// Most on all of them together. The first ones may use it up; every other one has [`MIN_ENTRIES`].
const MAX_IN_ALL: usize = 8000;

/// Entries that are read on each file system in any case.
const MIN_ENTRIES: usize = 50;

/// Time for all of them together, where the result is only reported: cold directories of a slow disk take milliseconds each.
const MAX_TIME: Duration = Duration::from_secs(1);

/// What is left of the bounds.
pub(crate) struct Search {
    entries: usize,
    until: Option<Instant>,
}

impl Search {
    /// In the initial user namespace, directories that open by file handle prove that files do, and the search is only for
    /// the report. In another one the result decides how inodes are held, so that it must not depend on time.
    pub(crate) fn new(initial_user_namespace: bool) -> Self {
        Search { entries: MAX_IN_ALL, until: initial_user_namespace.then(|| Instant::now() + MAX_TIME) }
    }

    /// A regular file on the file system of `mount`: breadth first. `None` if there is none within the bounds.
    pub(crate) fn regular_file(&mut self, mount: &Path) -> Option<PathBuf> {
        let root = fs::symlink_metadata(mount).ok()?;
        if root.is_file() {
            return Some(mount.to_owned());
        }
        let on_it = |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| found.dev() == root.dev());
        let mut left = MAX_ENTRIES.min(self.entries).max(MIN_ENTRIES);
        let mut directories = VecDeque::from([mount.to_owned()]);
        while let Some(directory) = directories.pop_front().filter(|_| self.has_time()) {
            // Not when it was found: most directories that are found are never read.
            if !on_it(&directory) {
                continue;
            }
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                left = left.checked_sub(1)?;
                self.entries = self.entries.saturating_sub(1);
                match kind(&entry) {
                    Kind::File if on_it(&entry.path()) => return Some(entry.path()),
                    Kind::Directory => directories.push_back(entry.path()),
                    _ => {}
                }
            }
        }
        None
    }

    fn has_time(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }
}

enum Kind {
    File,
    Directory,
    Other,
}

fn kind(entry: &DirEntry) -> Kind {
    match entry.file_type() {
        Ok(found) if found.is_file() => Kind::File,
        Ok(found) if found.is_dir() => Kind::Directory,
        _ => Kind::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(directories: usize) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        (0..directories).for_each(|number| fs::create_dir(tree.path().join(number.to_string())).unwrap());
        tree
    }

    #[test]
    fn file_is_found_below_directories() {
        let tree = tree(20);
        assert_eq!(Search::new(true).regular_file(tree.path()), None);
        let file = tree.path().join("7/file");
        fs::write(&file, "").unwrap();
        assert_eq!(Search::new(true).regular_file(tree.path()), Some(file.clone()));
        assert_eq!(Search::new(false).regular_file(&file), Some(file), "a file that is mounted");
    }

    #[test]
    fn entries_are_bounded_for_all_file_systems_together() {
        let large = tree(MAX_ENTRIES + 100);
        let mut search = Search::new(false);
        for read in 1..=MAX_IN_ALL / MAX_ENTRIES {
            assert_eq!(search.regular_file(large.path()), None);
            assert_eq!(search.entries, MAX_IN_ALL - read * MAX_ENTRIES);
        }
        let small = tree(MIN_ENTRIES - 1);
        let file = small.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(search.regular_file(small.path()), Some(file), "each file system is searched a little");
        fs::create_dir(small.path().join("one more")).unwrap();
        fs::rename(small.path().join("file"), small.path().join("0/file")).unwrap();
        assert_eq!(search.regular_file(small.path()), None, "and no more than that");
    }

    #[test]
    fn search_that_is_out_of_time_reads_nothing() {
        let tree = tree(0);
        fs::write(tree.path().join("file"), "").unwrap();
        let mut search = Search { until: Some(Instant::now()), ..Search::new(true) };
        assert_eq!(search.regular_file(tree.path()), None);
        assert_eq!(search.entries, MAX_IN_ALL);
    }
}
