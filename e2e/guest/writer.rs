//! Load: appends to an open file, writes to an open file without a name, and creates, renames and removes directories
//! and files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::pattern;
use crate::tally::Tally;

/// Bytes of a record in the files that stay open.
const RECORD: u64 = 16;

pub struct Writer {
    home: PathBuf,
    log: File,
    unlinked: File,
}

impl Writer {
    /// Creates a directory below `parent`, which must not exist, and opens the files in it.
    pub fn enter(parent: &Path) -> io::Result<Self> {
        let home = parent.join(format!("load-{}", std::process::id()));
        fs::create_dir(&home)?;
        let log = OpenOptions::new().create_new(true).append(true).open(home.join("log"))?;
        let gone = home.join("gone");
        let unlinked = OpenOptions::new().create_new(true).read(true).write(true).open(&gone)?;
        fs::remove_file(&gone)?;
        Ok(Self { home, log, unlinked })
    }

    pub fn round(&mut self, round: u64, tally: &mut Tally) {
        let record = record(round);
        tally.of("append to an open file", || self.log.write_all(&record));
        tally.of("write to an unlinked open file", || self.unlinked.write_all_at(&record, round * RECORD));
        self.directories(round, tally);
        self.files(round, tally);
    }

    fn directories(&self, round: u64, tally: &mut Tally) {
        let (before, after) = (self.home.join(format!("a-{round}")), self.home.join(format!("b-{round}")));
        tally.of("mkdir", || fs::create_dir(&before));
        tally.of("create in a new directory", || fs::write(before.join("inside"), b"inside"));
        tally.of("rename a directory", || fs::rename(&before, &after));
        let inside = tally.of("read below a renamed directory", || fs::read(after.join("inside")));
        tally
            .expect(inside.is_none_or(|bytes| bytes == b"inside"), || "wrong content below a renamed directory".into());
        tally.of("unlink below a renamed directory", || fs::remove_file(after.join("inside")));
        tally.of("rmdir", || fs::remove_dir(&after));
        self.expect_gone(&before, tally);
        self.expect_gone(&after, tally);
    }

    fn files(&self, round: u64, tally: &mut Tally) {
        let length = 1 + round * 977 % 20_000;
        let (path, content) = (self.home.join(pattern::name(round, length)), pattern::content(round, length));
        tally.of("create and write", || fs::write(&path, &content));
        if round.is_multiple_of(16) {
            tally.of("fsync", || File::open(&path)?.sync_all());
        }
        let link = self.home.join("second-name");
        tally.of("link", || fs::hard_link(&path, &link));
        let back = tally.of("read by a second name", || fs::read(&link));
        tally.expect(back.is_none_or(|bytes| bytes == content), || format!("{}: wrong content", path.display()));
        tally.of("unlink a second name", || fs::remove_file(&link));
        tally.of("unlink", || fs::remove_file(&path));
        self.expect_gone(&path, tally);
    }

    fn expect_gone(&self, path: &Path, tally: &mut Tally) {
        let kind = fs::symlink_metadata(path).map_err(|error| error.kind()).err();
        tally
            .expect(kind == Some(io::ErrorKind::NotFound), || format!("{}: still exists, or {kind:?}", path.display()));
    }

    /// Checks that every record of every round is in the log exactly once and in order, and removes the directory.
    pub fn finish(self, rounds: u64, tally: &mut Tally) {
        let all: Vec<u8> = (0..rounds).flat_map(record).collect();
        let log = tally.of("read what was appended", || fs::read(self.home.join("log")));
        tally
            .expect(log.is_none_or(|bytes| bytes == all), || "records lost, doubled or out of order in the log".into());
        let mut back = vec![0; all.len()];
        let read = tally.of("read an unlinked open file", || self.unlinked.read_exact_at(&mut back, 0));
        tally.expect(read.is_none() || back == all, || "wrong content in an unlinked open file".into());
        tally.of("unlink the log", || fs::remove_file(self.home.join("log")));
        tally.of("remove the directory of the load", || fs::remove_dir(&self.home));
    }
}

fn record(round: u64) -> [u8; RECORD as usize] {
    let mut record = *b"round .........\n";
    record[6..15].copy_from_slice(format!("{round:09}").as_bytes());
    record
}
