//! Contents, sizes and extended attributes: by the library, or by the engine itself for an orphaned file.

use std::ffi::CStr;
use std::fs::File;
use std::io;

use virtiofsd::filesystem::{Context, FileSystem, GetxattrReply, SetxattrFlags, ZeroCopyReader};

use crate::ledger::{PriorState, Slot};
use crate::orphaned::Write;

use super::SessionFs;
use super::errors::{engine_context, errno, error};
use super::handles::OpenFile;
use super::library_io::{ResumedWrite, Written};
use super::nodes::Target;
use super::replay;
use super::request::RequestContext;
use super::state::State;

/// True if the kernel chooses the offset of this write.
fn appends(write: &Write) -> bool {
    !write.delayed && write.flags & libc::O_APPEND as u32 != 0
}

impl<F: FileSystem> SessionFs<F> {
    /// WRITE. An append first observes the size of the file, so that a repetition does not append twice.
    pub(super) fn write_to<R: ZeroCopyReader>(
        &self,
        state: &mut State,
        request: RequestContext,
        ctx: Context,
        file: &OpenFile,
        reader: R,
        write: &Write,
    ) -> io::Result<usize> {
        if !appends(write) {
            return self.write_once(ctx, file, reader, write);
        }
        let probe = |file: &File| {
            let size = file.metadata()?.len();
            let (prior, repeated) = self.prior_state(state, request, |_| PriorState { size, ..PriorState::default() });
            Ok(if repeated { replay::appended(&prior, size, write.size as usize) } else { Written::Nothing })
        };
        self.write_once(ctx, file, ResumedWrite { reader, probe, scratch: &self.scratch }, write)
    }

    fn write_once<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        file: &OpenFile,
        reader: R,
        write: &Write,
    ) -> io::Result<usize> {
        let Write { size, offset, delayed, kill_priv, flags } = *write;
        match file {
            OpenFile::Library { inode, handle } => {
                let (inode, handle) = ((*inode).into(), (*handle).into());
                self.library.write(ctx, inode, handle, reader, size, offset, None, delayed, kill_priv, flags)
            }
            OpenFile::Orphaned(file) => self.orphaned.write(file, reader, *write),
        }
    }

    /// FALLOCATE.
    pub(super) fn allocate(
        &self,
        state: &mut State,
        request: RequestContext,
        ctx: Context,
        file: &OpenFile,
        (mode, offset, length): (u32, u64, u64),
    ) -> io::Result<()> {
        let moves = libc::FALLOC_FL_INSERT_RANGE | libc::FALLOC_FL_COLLAPSE_RANGE;
        if mode & moves as u32 != 0 {
            let size = self.with_file(file, |file| Ok(file.metadata()?.len()))?;
            let (prior, repeated) = self.prior_state(state, request, |_| PriorState { size, ..PriorState::default() });
            if repeated && replay::resized(&prior, size, mode, length) {
                return Ok(());
            }
        }
        match file {
            OpenFile::Library { inode, handle } => {
                self.library.fallocate(ctx, (*inode).into(), (*handle).into(), mode, offset, length)
            }
            OpenFile::Orphaned(file) => self.orphaned.fallocate(file, mode, offset, length),
        }
    }

    /// COPY_FILE_RANGE within one file: how much of it the first run could copy.
    pub(super) fn copied(
        &self,
        state: &mut State,
        request: RequestContext,
        file: &OpenFile,
        offset: u64,
        length: u64,
    ) -> io::Result<u64> {
        let size = self.with_file(file, |file| Ok(file.metadata()?.len()))?;
        let (prior, repeated) = self.prior_state(state, request, |_| PriorState { size, ..PriorState::default() });
        Ok(if repeated { replay::copied(&prior, offset, length) } else { length })
    }

    /// GETXATTR.
    pub(super) fn get_attribute(
        &self,
        state: &mut State,
        request: RequestContext,
        slot: Slot,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        match self.target(state, request, slot)? {
            Target::Library(inode) => self.library.getxattr(engine_context(), inode.into(), name, size),
            Target::Orphaned(file) => self.orphaned.getxattr(&file, name, size),
            Target::RemovedDirectory(_) => Err(error(libc::ENODATA)),
        }
    }

    /// SETXATTR.
    pub(super) fn set_attribute(
        &self,
        state: &mut State,
        (request, ctx): (RequestContext, Context),
        slot: Slot,
        (name, value): (&CStr, &[u8]),
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        let creates = flags & libc::XATTR_CREATE as u32 != 0;
        let observed = creates.then(|| self.prior_attribute(state, request, slot, name));
        let result = match self.target(state, request, slot)? {
            Target::Library(inode) => {
                self.require_linked(state, request, (slot, inode), ctx.pid)?;
                self.library.setxattr(ctx, inode.into(), name, value, flags, extra)
            }
            Target::Orphaned(file) => self.orphaned.setxattr(&file, name, value, flags, extra),
            Target::RemovedDirectory(_) => Err(error(libc::EOPNOTSUPP)),
        };
        match (result, observed) {
            (Err(error), Some((prior, true))) if replay::attribute_made(&prior, errno(&error)) => Ok(()),
            (result, _) => result,
        }
    }

    /// REMOVEXATTR.
    pub(super) fn remove_attribute(
        &self,
        state: &mut State,
        (request, ctx): (RequestContext, Context),
        slot: Slot,
        name: &CStr,
    ) -> io::Result<()> {
        let (prior, repeated) = self.prior_attribute(state, request, slot, name);
        let result = match self.target(state, request, slot)? {
            Target::Library(inode) => {
                self.require_linked(state, request, (slot, inode), ctx.pid)?;
                self.library.removexattr(ctx, inode.into(), name)
            }
            Target::Orphaned(file) => self.orphaned.removexattr(&file, name),
            Target::RemovedDirectory(_) => Err(error(libc::ENODATA)),
        };
        let result = result.or_else(|denied| self.remove_file_capabilities(state, (request, ctx), slot, name, denied));
        match result {
            Err(error) if repeated && replay::attribute_removed(&prior, errno(&error)) => Ok(()),
            result => result,
        }
    }

    fn prior_attribute(
        &self,
        state: &mut State,
        request: RequestContext,
        slot: Slot,
        name: &CStr,
    ) -> (PriorState, bool) {
        self.prior_state(state, request, |state| PriorState {
            existed: self.get_attribute(state, request, slot, name, 0).is_ok(),
            ..PriorState::default()
        })
    }
}
