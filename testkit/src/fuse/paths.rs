//! Access to whole files by path, for tests of something else. Each call walks from the root and keeps the references
//! that it looked up.

use super::call::CallError;
use super::client::Fuse;
use super::wire::{EntryOut, ROOT};

/// Bytes of each READ and WRITE.
const CHUNK: u32 = 128 << 10;

impl Fuse {
    /// Looks up each component of a path below the root.
    pub fn walk(&self, path: &str) -> Result<EntryOut, CallError> {
        let mut at = EntryOut { nodeid: ROOT, ..EntryOut::default() };
        for name in path.split('/').filter(|name| !name.is_empty()) {
            at = self.lookup(at.nodeid, name)?;
        }
        Ok(at)
    }

    /// The content of a file.
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>, CallError> {
        let node = self.walk(path)?.nodeid;
        let fh = self.open(node, libc::O_RDONLY)?.fh;
        let mut data = Vec::new();
        loop {
            let more = self.read(node, fh, data.len() as u64, CHUNK)?;
            if more.is_empty() {
                break;
            }
            data.extend(more);
        }
        self.release(node, fh, libc::O_RDONLY)?;
        Ok(data)
    }

    /// Creates a file with this content in an existing directory, and returns its node id.
    pub fn write_file(&self, path: &str, data: &[u8]) -> Result<u64, CallError> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let parent = self.walk(parent)?.nodeid;
        let made = self.create(parent, name, libc::O_RDWR, 0o644)?;
        let (node, fh) = (made.entry.nodeid, made.open.fh);
        let mut at = 0;
        for chunk in data.chunks(CHUNK as usize) {
            at += u64::from(self.write(node, fh, at, chunk, libc::O_RDWR)?);
        }
        self.release(node, fh, libc::O_RDWR)?;
        Ok(node)
    }

    /// The names in a directory, without `.` and `..`, sorted.
    pub fn list_directory(&self, path: &str) -> Result<Vec<Vec<u8>>, CallError> {
        let node = self.walk(path)?.nodeid;
        let fh = self.opendir(node)?.fh;
        let mut names = Vec::new();
        let mut position = 0;
        loop {
            let entries = self.readdir(node, fh, position, CHUNK)?;
            let Some(last) = entries.last() else { break };
            position = last.next;
            names.extend(entries.into_iter().map(|entry| entry.name));
        }
        self.releasedir(node, fh)?;
        names.retain(|name| name != b"." && name != b"..");
        names.sort();
        Ok(names)
    }
}
