//! Answers `ESTALE` for file handles that do not open.
//!
//! The library opens an inode by its file handle for each request about it. Where the inode number has been given to a
//! file that is just being created, ext4 and others answer `ENOMEM`: `find_inode_fast` refuses an inode in state
//! `I_CREATING`, `iget_locked` returns null for it, and `__ext4_iget` takes that for missing memory. The handle is of
//! the file before, so it is stale, and only `ESTALE` makes the guest's kernel look the name up again.
//!
//! Should memory really be short, that lookup fails as well, and the guest gets its error.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

/// The library's file system, with the error of a stale file handle made unambiguous.
pub(crate) struct StaleHandles<F> {
    inner: F,
    /// True if inodes are opened by file handle.
    by_handle: bool,
}

impl<F: FileSystem> StaleHandles<F> {
    /// `by_handle`: inodes are opened by file handle.
    pub(crate) fn new(inner: F, by_handle: bool) -> Self {
        StaleHandles { inner, by_handle }
    }

    /// The result of a request about a node.
    fn stale<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| if self.by_handle { stale_handle(error) } else { error })
    }
}

fn stale_handle(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => io::Error::from_raw_os_error(libc::ESTALE),
        _ => error,
    }
}

impl<F: FileSystem> FileSystem for StaleHandles<F> {
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
        self.stale(self.inner.lookup(ctx, parent, name))
    }

    fn forget(&self, ctx: Context, inode: F::Inode, count: u64) {
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(F::Inode, u64)>) {
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(&self, ctx: Context, inode: F::Inode, handle: Option<F::Handle>) -> io::Result<(Attr, Duration)> {
        self.stale(self.inner.getattr(ctx, inode, handle))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: F::Inode,
        attr: SetattrIn,
        handle: Option<F::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        self.stale(self.inner.setattr(ctx, inode, attr, handle, valid))
    }

    fn readlink(&self, ctx: Context, inode: F::Inode) -> io::Result<Vec<u8>> {
        self.stale(self.inner.readlink(ctx, inode))
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: F::Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        self.stale(self.inner.symlink(ctx, linkname, parent, name, extensions))
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
        self.stale(self.inner.mknod(ctx, inode, name, mode, rdev, umask, extensions))
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
        self.stale(self.inner.mkdir(ctx, parent, name, mode, umask, extensions))
    }

    fn unlink(&self, ctx: Context, parent: F::Inode, name: &CStr) -> io::Result<()> {
        self.stale(self.inner.unlink(ctx, parent, name))
    }

    fn rmdir(&self, ctx: Context, parent: F::Inode, name: &CStr) -> io::Result<()> {
        self.stale(self.inner.rmdir(ctx, parent, name))
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
        self.stale(self.inner.rename(ctx, olddir, oldname, newdir, newname, flags))
    }

    fn link(&self, ctx: Context, inode: F::Inode, newparent: F::Inode, newname: &CStr) -> io::Result<Entry> {
        self.stale(self.inner.link(ctx, inode, newparent, newname))
    }

    fn open(
        &self,
        ctx: Context,
        inode: F::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<F::Handle>, OpenOptions)> {
        self.stale(self.inner.open(ctx, inode, kill_priv, flags))
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
        self.stale(self.inner.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions))
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
        self.inner.read(ctx, inode, handle, w, size, offset, lock_owner, flags)
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
        self.inner.write(ctx, inode, handle, r, size, offset, lock_owner, delayed_write, kill_priv, flags)
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
        self.stale(self.inner.statfs(ctx, inode))
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
        self.stale(self.inner.setxattr(ctx, inode, name, value, flags, extra_flags))
    }

    fn getxattr(&self, ctx: Context, inode: F::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.stale(self.inner.getxattr(ctx, inode, name, size))
    }

    fn listxattr(&self, ctx: Context, inode: F::Inode, size: u32) -> io::Result<ListxattrReply> {
        self.stale(self.inner.listxattr(ctx, inode, size))
    }

    fn removexattr(&self, ctx: Context, inode: F::Inode, name: &CStr) -> io::Result<()> {
        self.stale(self.inner.removexattr(ctx, inode, name))
    }

    fn opendir(&self, ctx: Context, inode: F::Inode, flags: u32) -> io::Result<(Option<F::Handle>, OpenOptions)> {
        self.stale(self.inner.opendir(ctx, inode, flags))
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
        self.stale(self.inner.access(ctx, inode, mask))
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
        self.inner.copyfilerange(ctx, inode_in, handle_in, offset_in, inode_out, handle_out, offset_out, len, flags)
    }

    fn syncfs(&self, ctx: Context, inode: F::Inode) -> io::Result<()> {
        self.stale(self.inner.syncfs(ctx, inode))
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)> {
        self.inner.tmpfile()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_memory_is_a_stale_handle_and_nothing_else_is() {
        for (errno, expected) in [(libc::ENOMEM, libc::ESTALE), (libc::ENOENT, libc::ENOENT), (libc::EIO, libc::EIO)] {
            let error = stale_handle(io::Error::from_raw_os_error(errno));
            assert_eq!(error.raw_os_error(), Some(expected), "{errno}");
        }
    }
}
