//! Checks of arguments that the library does not check.
//!
//! Names: without a sandbox, only LOOKUP and CREATE of the library resolve safely; a name with a slash would leave the
//! share. Offsets: the library panics at one of 2^63 or more.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtiofs_contract::counters::Counters;
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

use crate::ledger::MAX_NAME;

/// A file system whose arguments have been checked.
pub(crate) struct Guard<F> {
    inner: F,
    counters: Arc<Counters>,
}

impl<F: FileSystem> Guard<F> {
    pub(crate) fn new(inner: F, counters: Arc<Counters>) -> Self {
        Guard { inner, counters }
    }
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

/// A single component, and neither `.` nor `..`. A longer one than NAME_MAX would be refused for lack of room in the ledger,
/// or by the host.
fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(invalid()),
        bytes if bytes.len() > MAX_NAME => Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG)),
        bytes if bytes.contains(&b'/') => Err(invalid()),
        _ => Ok(name),
    }
}

/// A range whose end fits in a signed 64-bit offset.
fn range(offset: u64, length: u64) -> io::Result<()> {
    match offset.checked_add(length) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(invalid()),
    }
}

impl<F: FileSystem> FileSystem for Guard<F> {
    type Inode = F::Inode;
    type Handle = F::Handle;
    type DirIter = F::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.inner.init(capable)
    }

    fn destroy(&self) {
        self.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: F::Inode, name: &CStr) -> io::Result<Entry> {
        self.inner.lookup(ctx, parent, component(name)?)
    }

    fn forget(&self, ctx: Context, inode: F::Inode, count: u64) {
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(F::Inode, u64)>) {
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, inode: F::Inode, handle: Option<F::Handle>) -> io::Result<(Attr, Duration)> {
        self.inner.getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: F::Inode,
        attr: SetattrIn,
        handle: Option<F::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        if valid.contains(SetattrValid::SIZE) {
            range(attr.size, 0)?;
        }
        self.inner.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: Context, inode: F::Inode) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: F::Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.inner.symlink(ctx, linkname, parent, component(name)?, extensions)
    }

    fn mknod(
        &self,
        ctx: Context,
        inode: F::Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.inner.mknod(ctx, inode, component(name)?, mode, rdev, umask, extensions)
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: F::Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.inner.mkdir(ctx, parent, component(name)?, mode, umask, extensions)
    }

    fn unlink(&self, ctx: Context, parent: F::Inode, name: &CStr) -> io::Result<()> {
        self.inner.unlink(ctx, parent, component(name)?)
    }

    fn rmdir(&self, ctx: Context, parent: F::Inode, name: &CStr) -> io::Result<()> {
        self.inner.rmdir(ctx, parent, component(name)?)
    }

    fn rename(
        &self,
        ctx: Context,
        olddir: F::Inode,
        oldname: &CStr,
        newdir: F::Inode,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.inner.rename(ctx, olddir, component(oldname)?, newdir, component(newname)?, flags)
    }

    fn link(&self, ctx: Context, inode: F::Inode, newparent: F::Inode, newname: &CStr) -> io::Result<Entry> {
        self.inner.link(ctx, inode, newparent, component(newname)?)
    }

    fn open(
        &self,
        ctx: Context,
        inode: F::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<F::Handle>, OpenOptions)> {
        self.inner.open(ctx, inode, kill_priv, flags)
    }

    fn create(
        &self,
        ctx: Context,
        parent: F::Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)> {
        self.inner.create(ctx, parent, component(name)?, mode, kill_priv, flags, umask, extensions)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        range(offset, u64::from(size))?;
        let bytes = self.inner.read(ctx, inode, handle, w, size, offset, lock_owner, flags)?;
        self.counters.count_read(bytes as u64);
        Ok(bytes)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        r: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        range(offset, u64::from(size))?;
        let bytes =
            self.inner.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)?;
        self.counters.count_written(bytes as u64);
        Ok(bytes)
    }

    fn flush(&self, ctx: Context, inode: F::Inode, handle: F::Handle, lock_owner: u64) -> io::Result<()> {
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, inode: F::Inode, datasync: bool, handle: F::Handle) -> io::Result<()> {
        self.inner.fsync(ctx, inode, datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        range(offset, length)?;
        self.inner.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: Context,
        inode: F::Inode,
        flags: u32,
        handle: F::Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, inode: F::Inode) -> io::Result<libc::statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: F::Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        self.inner.setxattr(ctx, inode, name, value, flags, extra_flags)
    }

    fn getxattr(&self, ctx: Context, inode: F::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.inner.getxattr(ctx, inode, name, size)
    }

    fn listxattr(&self, ctx: Context, inode: F::Inode, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, inode, size)
    }

    fn removexattr(&self, ctx: Context, inode: F::Inode, name: &CStr) -> io::Result<()> {
        self.inner.removexattr(ctx, inode, name)
    }

    fn opendir(&self, ctx: Context, inode: F::Inode, flags: u32) -> io::Result<(Option<F::Handle>, OpenOptions)> {
        self.inner.opendir(ctx, inode, flags)
    }

    fn readdir(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<F::DirIter> {
        self.inner.readdir(ctx, inode, handle, size, offset)
    }

    fn fsyncdir(&self, ctx: Context, inode: F::Inode, datasync: bool, handle: F::Handle) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, datasync, handle)
    }

    fn releasedir(&self, ctx: Context, inode: F::Inode, flags: u32, handle: F::Handle) -> io::Result<()> {
        self.inner.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: Context, inode: F::Inode, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(&self, ctx: Context, inode: F::Inode, handle: F::Handle, offset: u64, whence: u32) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: F::Inode,
        handle_in: F::Handle,
        offset_in: u64,
        inode_out: F::Inode,
        handle_out: F::Handle,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        range(offset_in, len)?;
        range(offset_out, len)?;
        self.inner.copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: F::Inode) -> io::Result<()> {
        self.inner.syncfs(ctx, inode)
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)> {
        self.inner.tmpfile()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_single_component_is_a_name() {
        for bad in [c"", c".", c"..", c"a/b", c"/", c"../x"] {
            assert_eq!(component(bad).unwrap_err().raw_os_error(), Some(libc::EINVAL), "{bad:?}");
        }
        for good in [c"a", c"...", c"x (deleted)", c"\xff\n", c"-"] {
            assert!(component(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn the_end_of_a_range_is_an_offset() {
        assert!(range(0, 0).is_ok());
        assert!(range(i64::MAX as u64, 0).is_ok());
        assert!(range(i64::MAX as u64, 1).is_err());
        assert!(range(1 << 63, 0).is_err());
        assert!(range(u64::MAX, 1).is_err());
    }
}
