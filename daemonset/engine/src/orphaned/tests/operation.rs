//! An operation on the library's file and on the orphaned file.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};

use rustix::io::{ReadWriteFlags, preadv2, pwritev2};
use virtiofsd::filesystem::{Context, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::fuse::SetattrIn;
use virtiofsd::oslib::{ReadvFlags, WritevFlags};

use super::pair::{End, Pair, Share};
use super::reply::{Reply, attr_reply, names_reply, reply, reply_with, statfs_reply, value_reply};
use crate::orphaned::{self, CopyEnd, SetattrBy};

#[derive(Clone, Debug)]
pub(super) enum Operation {
    Read {
        size: u32,
        offset: u64,
    },
    Write {
        data: Vec<u8>,
        offset: u64,
        delayed: bool,
        kill_priv: bool,
        flags: i32,
    },
    Fsync {
        datasync: bool,
    },
    Flush,
    Lseek {
        offset: u64,
        whence: i32,
    },
    Fallocate {
        mode: i32,
        offset: u64,
        length: u64,
    },
    Copy {
        from: End,
        offset_in: u64,
        to: End,
        offset_out: u64,
        len: u64,
        flags: u64,
    },
    Getattr,
    Setattr {
        attr: SetattrIn,
        valid: SetattrValid,
        through: SetattrBy,
    },
    Getxattr {
        name: CString,
        size: u32,
    },
    Setxattr {
        name: CString,
        value: Vec<u8>,
        flags: i32,
        extra: SetxattrFlags,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: CString,
    },
    Statfs,
    /// Opens the file again and continues with that one.
    Open {
        kill_priv: bool,
        flags: i32,
    },
}

/// Guest memory for the zero-copy traits: page-aligned, or direct I/O would depend on its address.
struct Memory {
    pages: Vec<u8>,
    start: usize,
    length: usize,
}

impl Memory {
    fn holding(data: &[u8]) -> Self {
        let mut pages = vec![0; data.len() + PAGE];
        let start = pages.as_ptr().align_offset(PAGE);
        pages[start..start + data.len()].copy_from_slice(data);
        Memory { pages, start, length: data.len() }
    }

    fn zeroed(size: u32) -> Self {
        Memory::holding(&vec![0; size as usize])
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.pages[self.start..self.start + self.length]
    }
}

const PAGE: usize = 4096;

impl ZeroCopyWriter for &mut Memory {
    fn read_from_file_at(&mut self, f: &File, count: usize, off: u64, flags: Option<ReadvFlags>) -> io::Result<usize> {
        assert!(flags.is_none() && count == self.length);
        self.length = preadv2(f, &mut [IoSliceMut::new(self.bytes())], off, ReadWriteFlags::empty())?;
        Ok(self.length)
    }
}

impl ZeroCopyReader for &mut Memory {
    fn write_to_file_at(&mut self, f: &File, count: usize, off: u64, flags: Option<WritevFlags>) -> io::Result<usize> {
        assert_eq!(count, self.length);
        let flags = ReadWriteFlags::from_bits_retain(flags.map_or(0, |flags| flags.bits()) as u32);
        Ok(pwritev2(f, &[IoSlice::new(self.bytes())], off, flags)?)
    }
}

pub(super) const CONTEXT: fn() -> Context = || Context { uid: 1000.into(), gid: 1000.into(), pid: 4711 };

impl<F: Share> Pair<F> {
    pub(super) fn through_library(&mut self, operation: &Operation) -> Reply {
        use Operation::*;
        let (fs, node, handle, since) = (&self.theirs, self.node, self.handle, self.since);
        match operation.clone() {
            Read { size, offset } => {
                let mut memory = Memory::zeroed(size);
                let result = fs.read(CONTEXT(), node, handle, &mut memory, size, offset, None, 0);
                reply_with(result.map(|length| (length, memory.bytes().to_vec())))
            }
            Write { data, offset, delayed, kill_priv, flags } => {
                let (size, mut memory) = (data.len() as u32, Memory::holding(&data));
                let flags = flags as u32;
                reply(fs.write(CONTEXT(), node, handle, &mut memory, size, offset, None, delayed, kill_priv, flags))
            }
            Fsync { datasync } => reply(fs.fsync(CONTEXT(), node, datasync, handle)),
            Flush => reply(fs.flush(CONTEXT(), node, handle, 0)),
            Lseek { offset, whence } => reply(fs.lseek(CONTEXT(), node, handle, offset, whence as u32)),
            Fallocate { mode, offset, length } => {
                reply(fs.fallocate(CONTEXT(), node, handle, mode as u32, offset, length))
            }
            Copy { from, offset_in, to, offset_out, len, flags } => {
                let end = |end| if end == End::This { (node, handle) } else { self.their_other };
                let ((node_in, handle_in), (node_out, handle_out)) = (end(from), end(to));
                reply(fs.copyfilerange(
                    CONTEXT(),
                    node_in,
                    handle_in,
                    offset_in,
                    node_out,
                    handle_out,
                    offset_out,
                    len,
                    flags,
                ))
            }
            Getattr => attr_reply(fs.getattr(CONTEXT(), node, Some(handle)), since),
            Setattr { attr, valid, through } => {
                let handle = (through == SetattrBy::Handle).then_some(handle);
                attr_reply(fs.setattr(CONTEXT(), node, attr, handle, valid), since)
            }
            Getxattr { name, size } => value_reply(fs.getxattr(CONTEXT(), node, &name, size)),
            Setxattr { name, value, flags, extra } => {
                reply(fs.setxattr(CONTEXT(), node, &name, &value, flags as u32, extra))
            }
            Listxattr { size } => names_reply(fs.listxattr(CONTEXT(), node, size)),
            Removexattr { name } => reply(fs.removexattr(CONTEXT(), node, &name)),
            Statfs => statfs_reply(fs.statfs(CONTEXT(), node)),
            Open { kill_priv, flags } => match fs.open(CONTEXT(), node, kill_priv, flags as u32) {
                Ok((opened, options)) => {
                    self.handle = opened.unwrap();
                    reply(Ok(options))
                }
                Err(error) => reply::<()>(Err(error)),
            },
        }
    }

    pub(super) fn through_ours(&mut self, operation: &Operation) -> Reply {
        use Operation::*;
        let (fs, file, since) = (&self.ours, &self.file, self.since);
        match operation.clone() {
            Read { size, offset } => {
                let mut memory = Memory::zeroed(size);
                let result = fs.read(file, &mut memory, size, offset);
                reply_with(result.map(|length| (length, memory.bytes().to_vec())))
            }
            Write { data, offset, delayed, kill_priv, flags } => {
                let (size, mut memory) = (data.len() as u32, Memory::holding(&data));
                let flags = flags as u32;
                reply(fs.write(file, &mut memory, orphaned::Write { size, offset, delayed, kill_priv, flags }))
            }
            Fsync { datasync } => reply(fs.fsync(file, datasync)),
            Flush => reply(fs.flush(file)),
            Lseek { offset, whence } => reply(fs.lseek(file, offset, whence as u32)),
            Fallocate { mode, offset, length } => reply(fs.fallocate(file, mode as u32, offset, length)),
            Copy { from, offset_in, to, offset_out, len, flags } => {
                let end = |end| if end == End::This { file.file() } else { &self.our_other };
                let from = CopyEnd { file: end(from), offset: offset_in };
                let to = CopyEnd { file: end(to), offset: offset_out };
                reply(fs.copyfilerange(from, to, len, flags))
            }
            Getattr => attr_reply(fs.getattr(file), since),
            Setattr { attr, valid, through } => attr_reply(fs.setattr(file, attr, through, valid), since),
            Getxattr { name, size } => value_reply(fs.getxattr(file, &name, size)),
            Setxattr { name, value, flags, extra } => reply(fs.setxattr(file, &name, &value, flags as u32, extra)),
            Listxattr { size } => names_reply(fs.listxattr(file, size)),
            Removexattr { name } => reply(fs.removexattr(file, &name)),
            Statfs => statfs_reply(fs.statfs(file)),
            Open { kill_priv, flags } => match fs.open(file, kill_priv, flags as u32) {
                Ok((opened, options)) => {
                    self.file = opened;
                    reply(Ok(options))
                }
                Err(error) => reply::<()>(Err(error)),
            },
        }
    }
}
