//! Attributes, extended attributes and sizes: by the library, or by ourselves for an adopted file.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::{Context, FileSystem, GetxattrReply, SetxattrFlags, ZeroCopyReader};

use crate::adopted::Write;
use crate::ledger::{Before, Slot};

use super::replay;
use super::seams::{Measured, Skip};
use super::state::{Live, State, Target};
use super::{Tracked, errno, ourselves};

/// Does the kernel choose the place of this write?
fn appends(write: &Write) -> bool {
    !write.delayed && write.flags & libc::O_APPEND as u32 != 0
}

impl<F: FileSystem> Tracked<F> {
    /// A write to an open file; an append is measured, so that it is not done twice.
    pub(super) fn write_to<R: ZeroCopyReader>(
        &self,
        state: &mut State,
        ctx: Context,
        live: &Live,
        reader: R,
        write: &Write,
    ) -> io::Result<usize> {
        if !appends(write) {
            return self.write_once(ctx, live, reader, write);
        }
        let look = |file: &std::fs::File| {
            let size = file.metadata()?.len();
            let (before, again) = self.before(state, |_| Before { size, ..Before::default() });
            Ok(if again { replay::appended(&before, size, write.size as usize) } else { Skip::Nothing })
        };
        self.write_once(ctx, live, Measured { reader, look, scratch: &self.scratch }, write)
    }

    fn write_once<R: ZeroCopyReader>(&self, ctx: Context, live: &Live, reader: R, write: &Write) -> io::Result<usize> {
        let Write { size, offset, delayed, kill_priv, flags } = *write;
        match live {
            Live::Library { inode, handle } => self.inner.write(
                ctx,
                (*inode).into(),
                (*handle).into(),
                reader,
                size,
                offset,
                None,
                delayed,
                kill_priv,
                flags,
            ),
            Live::Adopted(file) => self.adopted.write(file, reader, *write),
        }
    }

    pub(super) fn allocate(
        &self,
        state: &mut State,
        ctx: Context,
        live: &Live,
        (mode, offset, length): (u32, u64, u64),
    ) -> io::Result<()> {
        let moves = libc::FALLOC_FL_INSERT_RANGE | libc::FALLOC_FL_COLLAPSE_RANGE;
        if mode & moves as u32 != 0 {
            let size = self.with_file(live, |file| Ok(file.metadata()?.len()))?;
            let (before, again) = self.before(state, |_| Before { size, ..Before::default() });
            if again && replay::resized(&before, size, mode, length) {
                return Ok(());
            }
        }
        match live {
            Live::Library { inode, handle } => {
                self.inner.fallocate(ctx, (*inode).into(), (*handle).into(), mode, offset, length)
            }
            Live::Adopted(file) => self.adopted.fallocate(file, mode, offset, length),
        }
    }

    pub(super) fn get_attribute(
        &self,
        state: &mut State,
        slot: Slot,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        match self.target(state, slot)? {
            Target::Library(inode) => self.inner.getxattr(ourselves(), inode.into(), name, size),
            Target::Adopted(file) => self.adopted.getxattr(&file, name, size),
        }
    }

    pub(super) fn set_attribute(
        &self,
        state: &mut State,
        ctx: Context,
        slot: Slot,
        (name, value): (&CStr, &[u8]),
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        let creates = flags & libc::XATTR_CREATE as u32 != 0;
        let found = creates.then(|| self.before_attribute(state, slot, name));
        let result = match self.target(state, slot)? {
            Target::Library(inode) => {
                self.require_linked(state, slot, inode)?;
                self.inner.setxattr(ctx, inode.into(), name, value, flags, extra)
            }
            Target::Adopted(file) => self.adopted.setxattr(&file, name, value, flags, extra),
        };
        match (result, found) {
            (Err(error), Some((before, true))) if replay::attribute_made(&before, errno(&error)) => Ok(()),
            (result, _) => result,
        }
    }

    pub(super) fn remove_attribute(&self, state: &mut State, ctx: Context, slot: Slot, name: &CStr) -> io::Result<()> {
        let (before, again) = self.before_attribute(state, slot, name);
        let result = match self.target(state, slot)? {
            Target::Library(inode) => {
                self.require_linked(state, slot, inode)?;
                self.inner.removexattr(ctx, inode.into(), name)
            }
            Target::Adopted(file) => self.adopted.removexattr(&file, name),
        };
        match result {
            Err(error) if again && replay::attribute_removed(&before, errno(&error)) => Ok(()),
            result => result,
        }
    }

    fn before_attribute(&self, state: &mut State, slot: Slot, name: &CStr) -> (Before, bool) {
        self.before(state, |state| Before {
            existed: self.get_attribute(state, slot, name, 0).is_ok(),
            ..Before::default()
        })
    }
}
