//! The FUSE operations: each in the guest's numbers, passed on in the library's.

use std::ffi::CStr;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, Opcode, SetattrIn};

use crate::ledger::OpenKind;
use crate::orphaned::{CopyEnd, SetattrBy, Write};

use super::SessionFs;
use super::errors::{errno, error};
use super::handles::OpenFile;
use super::held_names::Confirmed;
use super::identity::Listing;
use super::names::NameRef;
use super::nodes::{LIBRARY_ROOT, Target};
use super::opening::Create;
use super::request::RequestContext;
use super::state::State;

/// An entry without a node: in reply to LOOKUP, "no such file" for this long; in READDIRPLUS, a name that was not looked
/// up.
fn no_node(timeout: Duration) -> Entry {
    Entry { inode: 0, generation: 0, attr: Attr::default(), attr_timeout: Duration::ZERO, entry_timeout: timeout }
}

impl<F: FileSystem> SessionFs<F> {
    /// LOOKUP, and what READDIRPLUS looks up for each name.
    fn look_up(
        &self,
        state: &mut State,
        request: RequestContext,
        ctx: Context,
        (parent, name): (u64, &CStr),
    ) -> io::Result<Entry> {
        let at = self.name_ref(state, request, parent, name)?;
        let held = state.ledger.find(at.parent, name.to_bytes());
        let found = match self.confirm_name(state, at, held) {
            Confirmed::Node(node, attr) if !self.must_keep(state, request, attr.mode) => {
                return self.reply_held(state, request, ctx, at, (node, attr));
            }
            Confirmed::Missing => Err(error(libc::ENOENT)),
            Confirmed::Node(..) | Confirmed::Nothing => {
                self.look_up_and_keep(state, request, |state| self.look_up_in_library(state, ctx, at))
            }
        };
        self.stash_displaced(state, held, &found);
        match found {
            Ok(entry) => {
                let attr = entry.attr;
                let entry = self.reply_entry(state, request, (at, held), entry, Cause::SourceReplaced)?;
                let node = self.slot(state, entry.inode)?;
                if request.is_lookup() {
                    state.nodes.set_looked_up(node, ctx.pid);
                }
                if held == Some(node) {
                    self.prepare_confirmation(state, (at.parent, name), node, &attr);
                }
                Ok(entry)
            }
            Err(gone) if errno(&gone) == libc::ENOENT => {
                self.drop_missing_name(state, at.key(), held);
                self.release_ended(state);
                if self.negative_timeout.is_zero() { Err(gone) } else { Ok(no_node(self.negative_timeout)) }
            }
            Err(other) => {
                self.lookup_failed(state, request, at, &other);
                Err(other)
            }
        }
    }

    fn look_up_in_library(&self, state: &mut State, ctx: Context, at: NameRef<'_>) -> io::Result<Entry> {
        let look_up = || self.library.lookup(ctx, at.parent_inode.into(), at.name);
        match look_up() {
            // While it is open, the file handle of a removed directory can be opened.
            Err(gone) if errno(&gone) == libc::ENOENT && state.directories.close_if_removed(at.parent) => look_up(),
            found => found,
        }
    }

    /// What serves the guest's handle, for operations that need nothing else of the state.
    fn open_file_of_request(&self, id: u64, fh: u64) -> io::Result<OpenFile> {
        let (request, mut state) = self.operation();
        self.open_file(&mut state, request, id, fh)
    }
}

/// True for SEEK_DATA and SEEK_HOLE.
///
/// The host cannot answer them under FUSE_WRITEBACK_CACHE: data that the guest has written and not sent yet is a hole
/// there, or is beyond the end of the file. Linux does not send it first (`fuse_lseek` in fs/fuse/file.c). After `ENOSYS` it
/// sets `no_lseek` and takes the whole file for data, up to the size that it knows itself.
///
/// Other operations that read or change the host's data need no such exception. Linux sends dirty pages first
/// (`fuse_writeback_range` in `__fuse_copy_file_range`, and in `fuse_file_fallocate` for punching and zeroing), and it
/// keeps its own size and times in its attributes (`fuse_get_cache_mask`).
fn seeks_data(whence: u32) -> bool {
    matches!(whence as i32, libc::SEEK_DATA | libc::SEEK_HOLE)
}

impl<F: FileSystem> FileSystem for SessionFs<F> {
    type Inode = u64;
    type Handle = u64;
    type DirIter = Listing<F::DirIter>;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        if !self.shared.lock().replaying_init {
            self.shared.lock().clear();
        }
        let agreed = self.announce_submounts && capable.contains(FsOptions::SUBMOUNTS);
        self.submounts_agreed.store(agreed, Ordering::Relaxed);
        let wanted = self.library.init(capable | FsOptions::SUBMOUNTS)?;
        self.orphaned.negotiated(capable & wanted);
        Ok(wanted)
    }

    fn destroy(&self) {
        self.shared.lock().clear();
        self.orphaned.negotiated(FsOptions::empty());
        self.library.destroy();
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (request, mut state) = self.operation();
        let found = self.look_up(&mut state, request, ctx, (parent, name));
        // The library ends a READDIRPLUS reply at the first name whose lookup fails, and fails it if that name comes
        // first. The kernel's `fuse_direntplus_link` takes node id 0 for "not looked up": the guest looks the name up
        // itself if it needs it, and gets the error for that name alone.
        if request.opcode == Opcode::Readdirplus as u32 {
            return found.or_else(|_| Ok(no_node(Duration::ZERO)));
        }
        found
    }

    fn forget(&self, _ctx: Context, id: u64, count: u64) {
        let (request, mut state) = self.operation();
        if request.repeated && state.ledger.progress(request.ring) > 0 {
            return;
        }
        let Some(slot) = state.ledger.slot(id) else { return };
        // The library returns the lookup of an entry that no longer fits into a READDIRPLUS reply.
        if request.opcode == Opcode::Readdirplus as u32 {
            state.ledger.undo_lookup(request.ring, slot);
        } else {
            state.ledger.forget(request.ring, slot, count, 1);
        }
        self.release_ended(&mut state);
    }

    fn batch_forget(&self, _ctx: Context, requests: Vec<(u64, u64)>) {
        let (request, mut state) = self.operation();
        let done = if request.repeated { state.ledger.progress(request.ring) } else { 0 };
        for (part, (id, count)) in (1..).zip(requests) {
            if part > done
                && let Some(slot) = state.ledger.slot(id)
            {
                state.ledger.forget(request.ring, slot, count, part);
                self.release_ended(&mut state);
            }
        }
    }

    fn getattr(&self, ctx: Context, id: u64, _handle: Option<u64>) -> io::Result<(Attr, Duration)> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        // By node, as the library does even if there is a handle.
        if let Some(attr) = self.confirm_node(&mut state, slot) {
            return Ok((self.guest_attr(&state, slot, attr), self.orphaned.attr_timeout()));
        }
        let (attr, timeout) = match self.target(&mut state, request, slot)? {
            Target::Library(inode) => self
                .library
                .getattr(ctx, inode.into(), None)
                .inspect_err(|error| self.node_failed(&mut state, request, slot, error))?,
            Target::Orphaned(file) => self.orphaned.getattr(&file)?,
            Target::RemovedDirectory(directory) => {
                let attr = self.guest_attr(&state, slot, directory.attributes());
                return Ok((attr, self.orphaned.attr_timeout()));
            }
        };
        if attr.nlink == 0 {
            self.stash_if_removed(&mut state, slot);
        } else {
            self.prepare_node_confirmation(&mut state, slot, &attr);
        }
        Ok((self.guest_attr(&state, slot, attr), timeout))
    }

    fn setattr(
        &self,
        ctx: Context,
        id: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let (request, mut state) = self.operation();
        let file = handle.map(|fh| self.open_file(&mut state, request, id, fh)).transpose()?;
        let slot = self.slot(&state, id)?;
        let changed = match (file, self.target(&mut state, request, slot)?) {
            (Some(OpenFile::Orphaned(file)), _) => self.orphaned.setattr(&file, attr, SetattrBy::Handle, valid),
            (_, Target::RemovedDirectory(directory)) => {
                self.set_removed_directory(&mut state, slot, &directory, (&attr, valid))
            }
            (None, Target::Orphaned(file)) => self.orphaned.setattr(&file, attr, SetattrBy::Node, valid),
            (Some(OpenFile::Library { inode, handle }), _) => {
                self.library.setattr(ctx, inode.into(), attr, Some(handle.into()), valid)
            }
            (None, Target::Library(inode)) => {
                self.require_linked(&mut state, request, (slot, inode), ctx.pid)?;
                self.library.setattr(ctx, inode.into(), attr, None, valid)
            }
        };
        let (attr, timeout) = changed.map_err(|failed| self.setattr_failed(&attr, valid, failed))?;
        Ok((self.guest_attr(&state, slot, attr), timeout))
    }

    fn readlink(&self, ctx: Context, id: u64) -> io::Result<Vec<u8>> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        let inode = self.inode(&mut state, request, slot)?;
        self.library.readlink(ctx, inode.into())
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let (request, mut state) = self.operation();
        let at = self.name_ref(&mut state, request, parent, name)?;
        let parent = at.parent_inode.into();
        self.make_name(&mut state, request, at, extensions, |with| {
            let made = self.library.symlink(ctx, linkname, parent, name, with);
            made.map_err(|failed| self.creation_failed(ctx, failed))
        })
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let (request, mut state) = self.operation();
        let at = self.name_ref(&mut state, request, parent, name)?;
        let parent = at.parent_inode.into();
        self.make_name(&mut state, request, at, extensions, |with| {
            let made = self.library.mknod(ctx, parent, name, mode, rdev, umask, with);
            made.map_err(|failed| self.creation_failed(ctx, failed))
        })
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let (request, mut state) = self.operation();
        let at = self.name_ref(&mut state, request, parent, name)?;
        let parent = at.parent_inode.into();
        self.make_name(&mut state, request, at, extensions, |with| {
            let made = self.library.mkdir(ctx, parent, name, mode, umask, with);
            made.map_err(|failed| self.creation_failed(ctx, failed))
        })
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let at = self.name_ref(&mut state, request, parent, name)?;
        self.remove_name(&mut state, (request, ctx), at, OpenKind::File)
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let at = self.name_ref(&mut state, request, parent, name)?;
        self.remove_name(&mut state, (request, ctx), at, OpenKind::Directory)
    }

    fn rename(
        &self,
        _ctx: Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let from = self.name_ref(&mut state, request, olddir, oldname)?;
        let to = self.name_ref(&mut state, request, newdir, newname)?;
        self.rename_name(&mut state, request, from, to, flags)
    }

    fn link(&self, ctx: Context, id: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        let inode = self.inode(&mut state, request, slot)?;
        self.require_linked(&mut state, request, (slot, inode), ctx.pid)?;
        let at = self.name_ref(&mut state, request, newparent, newname)?;
        self.link_name(&mut state, request, inode, at)
    }

    fn open(&self, ctx: Context, id: u64, kill_priv: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.open_node(ctx, id, OpenKind::File, kill_priv, flags)
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        self.create_file(ctx, (parent, name), Create { mode, kill_priv, flags, umask, extensions })
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        id: u64,
        handle: u64,
        w: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        match self.open_file_of_request(id, handle)? {
            OpenFile::Library { inode, handle } => {
                self.library.read(ctx, inode.into(), handle.into(), w, size, offset, lock_owner, flags)
            }
            OpenFile::Orphaned(file) => self.orphaned.read(&file, w, size, offset),
        }
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        id: u64,
        handle: u64,
        r: R,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        delayed_write: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let (request, mut state) = self.operation();
        let file = self.open_file(&mut state, request, id, handle)?;
        let write = Write { size, offset, delayed: delayed_write, kill_priv, flags };
        self.write_to(&mut state, request, ctx, &file, r, &write)
    }

    fn flush(&self, ctx: Context, id: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        match self.open_file_of_request(id, handle)? {
            OpenFile::Library { inode, handle } => self.library.flush(ctx, inode.into(), handle.into(), lock_owner),
            OpenFile::Orphaned(file) => self.orphaned.flush(&file),
        }
    }

    fn fsync(&self, ctx: Context, id: u64, datasync: bool, handle: u64) -> io::Result<()> {
        match self.open_file_of_request(id, handle)? {
            OpenFile::Library { inode, handle } => self.library.fsync(ctx, inode.into(), datasync, handle.into()),
            OpenFile::Orphaned(file) => self.orphaned.fsync(&file, datasync),
        }
    }

    fn fallocate(&self, ctx: Context, id: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let file = self.open_file(&mut state, request, id, handle)?;
        self.allocate(&mut state, request, ctx, &file, (mode, offset, length))
    }

    fn release(
        &self,
        _ctx: Context,
        id: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let (request, mut state) = self.operation();
        self.close(&mut state, request, id, handle)
    }

    fn statfs(&self, ctx: Context, id: u64) -> io::Result<libc::statvfs64> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        match self.target(&mut state, request, slot)? {
            Target::Library(inode) => self.library.statfs(ctx, inode.into()),
            Target::Orphaned(file) => self.orphaned.statfs(&file),
            Target::RemovedDirectory(_) => self.library.statfs(ctx, LIBRARY_ROOT.into()),
        }
    }

    fn setxattr(
        &self,
        ctx: Context,
        id: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        self.set_attribute(&mut state, (request, ctx), slot, (name, value), flags, extra_flags)
    }

    fn getxattr(&self, _ctx: Context, id: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        self.get_attribute(&mut state, request, slot, name, size)
    }

    fn listxattr(&self, ctx: Context, id: u64, size: u32) -> io::Result<ListxattrReply> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        match self.target(&mut state, request, slot)? {
            Target::Library(inode) => self.library.listxattr(ctx, inode.into(), size),
            Target::Orphaned(file) => self.orphaned.listxattr(&file, size),
            Target::RemovedDirectory(_) if size == 0 => Ok(ListxattrReply::Count(0)),
            Target::RemovedDirectory(_) => Ok(ListxattrReply::Names(Vec::new())),
        }
    }

    fn removexattr(&self, ctx: Context, id: u64, name: &CStr) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        self.remove_attribute(&mut state, (request, ctx), slot, name)
    }

    fn opendir(&self, ctx: Context, id: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.open_node(ctx, id, OpenKind::Directory, false, flags)
    }

    fn readdir(&self, ctx: Context, id: u64, handle: u64, size: u32, offset: u64) -> io::Result<Self::DirIter> {
        let (request, mut state) = self.operation();
        let opened = self.opened(&state, id, handle)?;
        if let Ok(Target::RemovedDirectory(_)) = self.target(&mut state, request, opened.node) {
            return Ok(Listing::empty());
        }
        let numbering = self.numbering(state.ledger.identity(opened.node).domain);
        let opened = self.open_file(&mut state, request, id, handle)?;
        drop(state);
        match opened {
            OpenFile::Library { inode, handle } => {
                let entries = self.library.readdir(ctx, inode.into(), handle.into(), size, offset)?;
                Ok(Listing::of(entries, numbering))
            }
            OpenFile::Orphaned(_) => Err(error(libc::ENOTDIR)),
        }
    }

    fn fsyncdir(&self, ctx: Context, id: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let opened = self.opened(&state, id, handle)?;
        if let Ok(Target::RemovedDirectory(_)) = self.target(&mut state, request, opened.node) {
            return Ok(());
        }
        let opened = self.open_file(&mut state, request, id, handle)?;
        drop(state);
        match opened {
            OpenFile::Library { inode, handle } => self.library.fsyncdir(ctx, inode.into(), datasync, handle.into()),
            OpenFile::Orphaned(_) => Err(error(libc::ENOTDIR)),
        }
    }

    fn releasedir(&self, _ctx: Context, id: u64, _flags: u32, handle: u64) -> io::Result<()> {
        let (request, mut state) = self.operation();
        self.close(&mut state, request, id, handle)
    }

    fn access(&self, ctx: Context, id: u64, mask: u32) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        match self.target(&mut state, request, slot)? {
            // Linux checks permission itself.
            Target::RemovedDirectory(_) => Ok(()),
            _ => {
                let inode = self.inode(&mut state, request, slot)?;
                self.library.access(ctx, inode.into(), mask)
            }
        }
    }

    fn lseek(&self, ctx: Context, id: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let file = self.open_file_of_request(id, handle)?;
        if self.orphaned.writeback_agreed() && seeks_data(whence) {
            return Err(error(libc::ENOSYS));
        }
        match file {
            OpenFile::Library { inode, handle } => self.library.lseek(ctx, inode.into(), handle.into(), offset, whence),
            OpenFile::Orphaned(file) => self.orphaned.lseek(&file, offset, whence),
        }
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode_in: u64,
        handle_in: u64,
        offset_in: u64,
        inode_out: u64,
        handle_out: u64,
        offset_out: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let (request, mut state) = self.operation();
        let from = self.open_file(&mut state, request, inode_in, handle_in)?;
        let to = self.open_file(&mut state, request, inode_out, handle_out)?;
        // The first run may have made the file longer, so that there is more to copy, or the ranges overlap.
        let within = inode_in == inode_out;
        let len = if within { self.copied(&mut state, request, &from, offset_in, len)? } else { len };
        drop(state);
        if let (OpenFile::Library { inode: i, handle: h }, OpenFile::Library { inode, handle }) = (&from, &to) {
            let (from, to) = ((*i).into(), (*inode).into());
            return self.library.copyfilerange(
                ctx,
                from,
                (*h).into(),
                offset_in,
                to,
                (*handle).into(),
                offset_out,
                len,
                flags,
            );
        }
        self.with_file(&from, |source| {
            self.with_file(&to, |target| {
                let from = CopyEnd { file: source, offset: offset_in };
                let to = CopyEnd { file: target, offset: offset_out };
                self.orphaned.copyfilerange(from, to, len, flags)
            })
        })
    }

    fn syncfs(&self, ctx: Context, id: u64) -> io::Result<()> {
        let (request, mut state) = self.operation();
        let slot = self.slot(&state, id)?;
        let inode = self.inode(&mut state, request, slot)?;
        self.library.syncfs(ctx, inode.into())
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        Err(error(libc::ENOSYS))
    }
}
