//! Load: copies a file by its data and holes while another descriptor has it open and writes to it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::pattern;
use crate::tally::Tally;

/// Offset of the data; a hole is before it.
const HOLE: u64 = 128 << 10;
/// Length of the data in bytes.
const DATA: u64 = 200_000;

const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;
const ENXIO: i32 = 6;

unsafe extern "C" {
    fn lseek(fd: i32, offset: i64, whence: i32) -> i64;
}

pub struct Sparse {
    home: PathBuf,
}

impl Sparse {
    pub fn enter(directory: &Path) -> io::Result<Self> {
        fs::metadata(directory)?;
        Ok(Self { home: directory.to_owned() })
    }

    pub fn round(&self, round: u64, tally: &mut Tally) {
        let path = self.home.join(format!("sparse-{}-{round}", std::process::id()));
        let content = pattern::content(round, DATA);
        let options = OpenOptions::new().create_new(true).write(true).clone();
        let writer = tally.of("create", || options.open(&path));
        let Some(writer) = writer else { return };
        tally.of("write behind a hole", || writer.write_all_at(&content, HOLE));
        let copy = tally.of("copy by holes", || copy(&path));
        let mut whole = vec![0; HOLE as usize];
        whole.extend(content);
        tally.expect(copy.is_none_or(|copy| copy == whole), || format!("{}: its copy differs", path.display()));
        drop(writer);
        tally.of("unlink", || fs::remove_file(&path));
    }
}

/// The content of a file as a copy tool reads it: data that SEEK_DATA and SEEK_HOLE report, zeros elsewhere.
fn copy(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    let (mut copy, mut at) = (vec![0; size as usize], 0);
    while at < size {
        let Some(data) = seek(&file, at, SEEK_DATA)? else { break };
        let hole = seek(&file, data, SEEK_HOLE)?.map_or(size, |hole| hole.min(size));
        file.read_exact_at(&mut copy[data as usize..hole as usize], data)?;
        at = hole;
    }
    Ok(copy)
}

/// The offset, or `None` if there is no more data.
fn seek(file: &File, offset: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: lseek accesses no memory of this process, and the descriptor is open.
    let found = unsafe { lseek(file.as_raw_fd(), offset as i64, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(ENXIO) { Ok(None) } else { Err(error) }
        }
    }
}
