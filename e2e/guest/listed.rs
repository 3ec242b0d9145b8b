//! Load: reads the files of a list by absolute paths and lists no directory. So it works on a file system whose
//! directories cannot be listed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::reader;
use crate::tally::Tally;

pub struct Listed {
    paths: Vec<PathBuf>,
}

impl Listed {
    /// `list` has one path per line; the first `most` are used.
    pub fn enter(list: &Path, most: u64) -> io::Result<Self> {
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        Ok(Self { paths: fs::read_to_string(list)?.lines().take(most).map(PathBuf::from).collect() })
    }

    pub fn round(&self, tally: &mut Tally) {
        for path in &self.paths {
            reader::read(path, tally);
        }
    }
}
