//! Steps that open files, and read and change their content.

use nix::errno::Errno;

use super::lane::{Lane, OpenFile, masked};
use super::op::{Access, Allocate, Fill, Path, Slot};
use super::report::{Fault, Kind};
use super::shared;
use crate::fuse::client::SetAttr;
use crate::fuse::wire::ROOT;
use crate::model::{Body, Id};

type Done = Result<(), Fault>;

impl Lane {
    pub(super) fn create(&mut self, path: &Path, slot: Slot, access: Access, mode: u32, exclusive: bool) -> Done {
        let (parent, node, name) = self.parent_node(path)?;
        let plan = self.tree.plan_make(parent, name, Body::File(Vec::new()), masked(mode));
        let flags = access.flags() | if exclusive { libc::O_EXCL } else { 0 };
        let answer = self.fuse.create(node, name, flags, mode);
        let Some((change, created)) = self.agree(plan, answer)? else {
            return Ok(());
        };
        if let Some(id) = change.node {
            self.commit(change);
            self.opened(slot, OpenFile { id, fh: created.open.fh, access });
            self.learn(id, &created.entry)?;
        }
        Ok(())
    }

    pub(super) fn open(&mut self, path: &Path, slot: Slot, access: Access, truncate: bool) -> Done {
        let (id, node) = self.reach(path)?;
        let flags = access.flags() | if truncate { libc::O_TRUNC } else { 0 };
        let opened = self.fuse.open(node, flags)?;
        self.opened(slot, OpenFile { id, fh: opened.fh, access });
        if truncate {
            self.tree.edit(id, Vec::clear);
        }
        Ok(())
    }

    pub(super) fn close(&mut self, slot: Slot) -> Done {
        let (file, node) = self.file_node(slot)?;
        self.files.remove(&slot);
        let flushed = self.fuse.flush(node, file.fh);
        let released = self.fuse.release(node, file.fh, file.access.flags());
        self.tree.close(file.id);
        self.evict_unless_used(file.id);
        flushed.and(released).map_err(Fault::from)
    }

    pub(super) fn fstat(&mut self, slot: Slot) -> Done {
        let (file, node) = self.file_node(slot)?;
        let attr = self.fuse.getattr(node, Some(file.fh))?;
        self.check_attr(file.id, &attr)
    }

    pub(super) fn fsync(&mut self, slot: Slot) -> Done {
        let (file, node) = self.file_node(slot)?;
        Ok(self.fuse.fsync(node, file.fh, false)?)
    }

    pub(super) fn read(&mut self, slot: Slot, offset: u64, size: u32) -> Done {
        let (file, node) = self.file_node(slot)?;
        let data = self.fuse.read(node, file.fh, offset, size)?;
        self.report.compared_bytes += data.len() as u64;
        compare(self.tree.data(file.id), offset, size, &data)
    }

    pub(super) fn write(&mut self, slot: Slot, offset: u64, data: Fill) -> Done {
        let (file, node) = self.file_node(slot)?;
        let bytes = data.bytes();
        // The kernel sends an append with the size that it knows. The server appends at the end, whatever the offset
        // is.
        let end = self.tree.data(file.id).len() as u64;
        let offset = if file.access == Access::Append { end } else { offset };
        let written = self.fuse.write(node, file.fh, offset, &bytes, file.access.flags())?;
        let kept = &bytes[..(written as usize).min(bytes.len())];
        self.tree.edit(file.id, |content| overwrite(content, offset, kept));
        if kept.len() < bytes.len() {
            let what = format!("{written} of {} bytes written", bytes.len());
            return Err(Fault::new(Kind::UnexpectedError, what));
        }
        Ok(())
    }

    pub(super) fn truncate(&mut self, path: &Path, size: u64) -> Done {
        let (id, _) = self.reach(path)?;
        self.resize(id, None, size)
    }

    pub(super) fn ftruncate(&mut self, slot: Slot, size: u64) -> Done {
        let file = self.file(slot)?;
        self.resize(file.id, Some(file.fh), size)
    }

    fn resize(&mut self, id: Id, fh: Option<u64>, size: u64) -> Done {
        let node = self.node(id)?;
        let set = SetAttr { size: Some(size), fh, ..SetAttr::default() };
        let attr = self.fuse.setattr(node, &set)?;
        self.tree.edit(id, |content| content.resize(size as usize, 0));
        self.check_attr(id, &attr)
    }

    pub(super) fn allocate(&mut self, slot: Slot, how: Allocate, offset: u64, len: u64) -> Done {
        let (file, node) = self.file_node(slot)?;
        match self.fuse.fallocate(node, file.fh, how.mode(), offset, len) {
            Ok(()) => {
                self.tree.edit(file.id, |content| reallocate(content, how, offset as usize, len as usize));
                Ok(())
            }
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => {
                self.unsupported.insert(how.mode());
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The file system decides where holes are, but what it reports as a hole must read as zeros.
    pub(super) fn seek(&mut self, slot: Slot, offset: u64, hole: bool) -> Done {
        let (file, node) = self.file_node(slot)?;
        let whence = if hole { libc::SEEK_HOLE } else { libc::SEEK_DATA };
        let answer = self.fuse.lseek(node, file.fh, offset, whence);
        let data = self.tree.data(file.id);
        let end = data.len() as u64;
        let found = match answer {
            Ok(found) => found,
            // No data after the offset, or an offset after the end.
            Err(error) if error.errno() == Some(Errno::ENXIO) => end.max(offset),
            Err(error) => return Err(error.into()),
        };
        let zero = |from: u64, to: u64| {
            let range = data.get(from.min(end) as usize..to.min(end) as usize);
            range.is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
        };
        let right = found >= offset && if hole { zero(found, found + 1) } else { zero(offset, found) };
        if right {
            return Ok(());
        }
        Err(Fault::new(Kind::WrongBytes, format!("position {found} of {end}")))
    }

    pub(super) fn copy(&mut self, from: (Slot, u64), to: (Slot, u64), len: u64) -> Done {
        let (source, source_node) = self.file_node(from.0)?;
        let (target, target_node) = self.file_node(to.0)?;
        let input = (source_node, source.fh, from.1);
        let output = (target_node, target.fh, to.1);
        let copied = u64::from(self.fuse.copy_file_range(input, output, len)?);
        let data = self.tree.data(source.id);
        let start = from.1.min(data.len() as u64);
        let most = len.min(data.len() as u64 - start);
        // A short copy is allowed. A copy of 0 bytes means end of file.
        if copied > most || (copied == 0 && most > 0) {
            return Err(Fault::new(Kind::WrongBytes, format!("{copied} of {most} bytes copied")));
        }
        let bytes = data[start as usize..(start + copied) as usize].to_vec();
        if !bytes.is_empty() {
            self.tree.edit(target.id, |content| overwrite(content, to.1, &bytes));
        }
        Ok(())
    }

    pub(super) fn read_shared(&mut self, index: usize, offset: u64, size: u32, forget: bool) -> Done {
        let Some(part) = self.shared.clone() else {
            return Ok(());
        };
        let directory = match self.shared_view.directory {
            Some((node, _)) => node,
            None => {
                let entry = self.fuse.lookup(ROOT, shared::DIRECTORY)?;
                self.shared_view.directory = Some((entry.nodeid, 1));
                entry.nodeid
            }
        };
        let entry = self.fuse.lookup(directory, shared::name(index))?;
        let node = entry.nodeid;
        let held = self.shared_view.files.entry(index).or_insert((node, 0));
        held.1 += 1;
        if held.0 != node {
            let what = format!("shared file {index} was node {:#x}, is now {node:#x}", held.0);
            return Err(Fault::new(Kind::WrongNode, what));
        }
        let opened = self.fuse.open(node, libc::O_RDONLY)?;
        let data = self.fuse.read(node, opened.fh, offset, size)?;
        self.fuse.release(node, opened.fh, libc::O_RDONLY)?;
        if forget && let Some((node, count)) = self.shared_view.files.remove(&index) {
            self.fuse.forget(node, count)?;
        }
        self.report.compared_bytes += data.len() as u64;
        compare(part.data(index), offset, size, &data)
    }

    fn opened(&mut self, slot: Slot, file: OpenFile) {
        self.tree.open(file.id);
        self.files.insert(slot, file);
    }
}

/// Compares the bytes read with the expected content.
fn compare(content: &[u8], offset: u64, size: u32, read: &[u8]) -> Done {
    let start = (offset as usize).min(content.len());
    let end = (start + size as usize).min(content.len());
    let due = &content[start..end];
    let differing = due.iter().zip(read).filter(|(a, b)| a != b).count();
    let wrong = differing + due.len().abs_diff(read.len());
    if wrong == 0 {
        return Ok(());
    }
    let first = due.iter().zip(read).position(|(a, b)| a != b);
    let mut fault = Fault::new(
        Kind::WrongBytes,
        format!("{} bytes instead of {}, {differing} differ, the first at {first:?}", read.len(), due.len()),
    );
    fault.wrong_bytes = wrong as u64;
    Err(fault)
}

fn overwrite(content: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let start = offset as usize;
    let end = start + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[start..end].copy_from_slice(bytes);
}

fn reallocate(content: &mut Vec<u8>, how: Allocate, offset: usize, len: usize) {
    let end = offset + len;
    let inside = offset.min(content.len())..end.min(content.len());
    match how {
        Allocate::Keep => {}
        Allocate::Punch => content[inside].fill(0),
        Allocate::Extend if end > content.len() => content.resize(end, 0),
        Allocate::Extend => {}
        Allocate::Zero => {
            content[inside].fill(0);
            let longer = content.len().max(end);
            content.resize(longer, 0);
        }
        Allocate::Collapse => drop(content.drain(inside)),
        Allocate::Insert => drop(content.splice(offset..offset, std::iter::repeat_n(0, len))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_bytes_are_counted() {
        let content = b"0123456789";
        assert!(compare(content, 4, 100, b"456789").is_ok());
        assert!(compare(content, 40, 100, b"").is_ok());
        assert_eq!(compare(content, 0, 4, b"0199").unwrap_err().wrong_bytes, 2);
        assert_eq!(compare(content, 0, 4, b"01").unwrap_err().wrong_bytes, 2);
        assert_eq!(compare(content, 8, 4, b"89xx").unwrap_err().wrong_bytes, 2);
    }

    #[test]
    fn ranges_are_punched_inserted_and_taken_out() {
        let mut content = (1..=12).collect::<Vec<u8>>();
        reallocate(&mut content, Allocate::Collapse, 4, 4);
        assert_eq!(content, [1, 2, 3, 4, 9, 10, 11, 12]);
        reallocate(&mut content, Allocate::Insert, 2, 2);
        assert_eq!(content, [1, 2, 0, 0, 3, 4, 9, 10, 11, 12]);
        reallocate(&mut content, Allocate::Punch, 8, 100);
        assert_eq!(content[6..], [9, 10, 0, 0]);
        reallocate(&mut content, Allocate::Zero, 9, 3);
        assert_eq!(content.len(), 12);
        overwrite(&mut content, 14, b"x");
        assert_eq!(content[12..], [0, 0, b'x']);
    }
}
