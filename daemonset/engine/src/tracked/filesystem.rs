//! The operations, each in the guest's numbers, handed on in the library's.

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

use crate::adopted::{Place, Through, Write};
use crate::ledger::{OpenKind, ROOT};

use super::state::{Bindings, Live, State, Target};
use super::{Tracked, errno, error, no_room, ourselves};

/// An entry that leads to no node: as the answer to LOOKUP, "no such file" for this long; in READDIRPLUS, a name that
/// was not looked up.
fn no_node(timeout: Duration) -> Entry {
    Entry { inode: 0, generation: 0, attr: Attr::default(), attr_timeout: Duration::ZERO, entry_timeout: timeout }
}

impl<F: FileSystem> Tracked<F> {
    /// LOOKUP, and what READDIRPLUS looks up for each name.
    fn look_up(&self, state: &mut State, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let place = self.place(state, parent, name)?;
        let found = self.inner.lookup(ctx, place.inode.into(), name);
        self.park_displaced(state, place, &found);
        match found {
            Ok(entry) => self.tell(state, place.slot, name.to_bytes(), entry, Cause::SourceReplaced),
            Err(gone) if errno(&gone) == libc::ENOENT => {
                self.name_is_gone(state, (place.slot, name.to_bytes()));
                self.settle(state);
                if self.negative_timeout.is_zero() { Err(gone) } else { Ok(no_node(self.negative_timeout)) }
            }
            Err(other) => {
                self.lookup_refused(state, place, &other);
                Err(other)
            }
        }
    }

    /// The guest holds nothing any more.
    fn forget_everything(&self) {
        let mut state = self.core.lock();
        state.changes += 1;
        state.ledger.clear();
        state.bindings = Bindings::default();
        state.parking.release_all();
    }

    fn open_kind(
        &self,
        ctx: Context,
        id: u64,
        kind: OpenKind,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let mut state = self.state();
        let node = self.slot(&state, id)?;
        let inode = match self.target(&mut state, node)? {
            Target::Library(inode) => inode,
            Target::Adopted(file) => {
                let (fh, options) = self.open_adopted(&mut state, node, &file, flags, kill_priv)?;
                return Ok((Some(fh), options));
            }
        };
        if flags & libc::O_TRUNC as u32 != 0 {
            self.require_linked_to_open(&mut state, node, inode, ctx.pid)?;
        }
        let opened = match kind {
            OpenKind::File => self.inner.open(ctx, inode.into(), kill_priv, flags),
            OpenKind::Directory => self.inner.opendir(ctx, inode.into(), flags),
        };
        let (handle, mut options) = opened.inspect_err(|error| self.node_refused(&mut state, node, error))?;
        let handle = handle.ok_or_else(|| error(libc::EBADF))?.into();
        if kind == OpenKind::File {
            let linked = self.require_opened_linked(&mut state, node, &Live::Library { inode, handle }, ctx.pid);
            linked.inspect_err(|_| self.let_go(kind, inode, handle))?;
        }
        let fh = self.enter(&mut state, node, kind, flags, (inode, handle))?;
        self.opened_by_cached_name(&mut state, node);
        if node == ROOT && state.root_changed {
            // The root's id outlives a change of the source. Its listing, if the guest has kept one, must not.
            options.remove(OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR);
        }
        Ok((Some(fh), options))
    }
}

impl<F: FileSystem> FileSystem for Tracked<F> {
    type Inode = u64;
    type Handle = u64;
    type DirIter = F::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        if !self.core.lock().replaying_init {
            self.forget_everything();
        }
        let agreed = self.announce_submounts && capable.contains(FsOptions::SUBMOUNTS);
        self.submounts_agreed.store(agreed, Ordering::Relaxed);
        let wanted = self.inner.init(capable | FsOptions::SUBMOUNTS)?;
        self.adopted.negotiated(capable & wanted);
        Ok(wanted)
    }

    fn destroy(&self) {
        self.forget_everything();
        self.adopted.negotiated(FsOptions::empty());
        self.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let mut state = self.state();
        let found = self.look_up(&mut state, ctx, parent, name);
        // The library ends a READDIRPLUS reply at the first name whose lookup fails, and fails it if that name comes
        // first. `fuse_direntplus_link` of the kernel takes node id 0 for "not looked up": the guest looks the name up
        // itself if it needs it, and gets the error for that name alone.
        if state.current.opcode == Opcode::Readdirplus as u32 {
            return found.or_else(|_| Ok(no_node(Duration::ZERO)));
        }
        found
    }

    fn forget(&self, _ctx: Context, id: u64, count: u64) {
        let mut state = self.state();
        if state.current.again && state.ledger.progress() > 0 {
            return;
        }
        let Some(slot) = state.ledger.slot(id) else { return };
        // The library's READDIRPLUS takes an entry back that no longer fits into the reply.
        if state.current.opcode == Opcode::Readdirplus as u32 {
            state.ledger.untell(slot);
        } else {
            state.ledger.forget(slot, count, 1);
        }
        self.settle(&mut state);
    }

    fn batch_forget(&self, _ctx: Context, requests: Vec<(u64, u64)>) {
        let mut state = self.state();
        let done = if state.current.again { state.ledger.progress() } else { 0 };
        for (part, (id, count)) in (1..).zip(requests) {
            if part > done
                && let Some(slot) = state.ledger.slot(id)
            {
                state.ledger.forget(slot, count, part);
                self.settle(&mut state);
            }
        }
    }

    fn getattr(&self, ctx: Context, id: u64, _handle: Option<u64>) -> io::Result<(Attr, Duration)> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        // By the node, as the library does whatever the handle.
        let (attr, timeout) = match self.target(&mut state, slot)? {
            Target::Library(inode) => self
                .inner
                .getattr(ctx, inode.into(), None)
                .inspect_err(|error| self.node_refused(&mut state, slot, error))?,
            Target::Adopted(file) => self.adopted.getattr(&file)?,
        };
        if attr.nlink == 0 {
            self.park_removed(&mut state, slot);
        }
        Ok((self.outward(attr), timeout))
    }

    fn setattr(
        &self,
        ctx: Context,
        id: u64,
        attr: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let mut state = self.state();
        let live = handle.map(|fh| self.live(&mut state, id, fh)).transpose()?;
        let slot = self.slot(&state, id)?;
        let (attr, timeout) = match (live, self.target(&mut state, slot)?) {
            (Some(Live::Adopted(file)), _) => self.adopted.setattr(&file, attr, Through::Handle, valid)?,
            (None, Target::Adopted(file)) => self.adopted.setattr(&file, attr, Through::Node, valid)?,
            (Some(Live::Library { inode, handle }), _) => {
                self.inner.setattr(ctx, inode.into(), attr, Some(handle.into()), valid)?
            }
            (None, Target::Library(inode)) => {
                self.require_linked(&mut state, slot, inode)?;
                self.inner.setattr(ctx, inode.into(), attr, None, valid)?
            }
        };
        Ok((self.outward(attr), timeout))
    }

    fn readlink(&self, ctx: Context, id: u64) -> io::Result<Vec<u8>> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        let inode = self.inode(&mut state, slot)?;
        self.inner.readlink(ctx, inode.into())
    }

    fn symlink(
        &self,
        ctx: Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let mut state = self.state();
        let place = self.place(&mut state, parent, name)?;
        let parent = place.inode.into();
        self.make(&mut state, place, extensions, |with| self.inner.symlink(ctx, linkname, parent, name, with))
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
        let mut state = self.state();
        let place = self.place(&mut state, parent, name)?;
        let parent = place.inode.into();
        self.make(&mut state, place, extensions, |with| self.inner.mknod(ctx, parent, name, mode, rdev, umask, with))
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
        let mut state = self.state();
        let place = self.place(&mut state, parent, name)?;
        let parent = place.inode.into();
        self.make(&mut state, place, extensions, |with| self.inner.mkdir(ctx, parent, name, mode, umask, with))
    }

    fn unlink(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let mut state = self.state();
        let place = self.place(&mut state, parent, name)?;
        let parent = place.inode.into();
        self.take_away(&mut state, place, || self.inner.unlink(ctx, parent, name))
    }

    fn rmdir(&self, ctx: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let mut state = self.state();
        let place = self.place(&mut state, parent, name)?;
        let parent = place.inode.into();
        self.take_away(&mut state, place, || self.inner.rmdir(ctx, parent, name))
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
        let mut state = self.state();
        let from = self.place(&mut state, olddir, oldname)?;
        let to = self.place(&mut state, newdir, newname)?;
        self.move_name(&mut state, from, to, flags)
    }

    fn link(&self, _ctx: Context, id: u64, newparent: u64, newname: &CStr) -> io::Result<Entry> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        let inode = self.inode(&mut state, slot)?;
        self.require_linked(&mut state, slot, inode)?;
        let place = self.place(&mut state, newparent, newname)?;
        self.link_name(&mut state, inode, place)
    }

    fn open(&self, ctx: Context, id: u64, kill_priv: bool, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.open_kind(ctx, id, OpenKind::File, kill_priv, flags)
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
        let mut state = self.state();
        let place = self.place(&mut state, parent, name)?;
        let (before, again) = self.before_making(&mut state, place)?;
        if !again {
            state.ledger.room_for_handle().map_err(no_room)?;
        }
        state.changes += 1;
        let label = extensions.secctx.clone().filter(|_| again);
        let made = self.inner.create(ctx, place.inode.into(), name, mode, kill_priv, flags, umask, extensions);
        let (entry, handle, options) = match made {
            Err(error) if again => {
                let entry = self.made_before(place, &before, error)?;
                let flags = flags & !((libc::O_CREAT | libc::O_EXCL) as u32);
                let opened = self.inner.open(ctx, entry.inode.into(), kill_priv, flags);
                let (handle, options) =
                    opened.inspect_err(|_| self.inner.forget(ourselves(), entry.inode.into(), 1))?;
                (entry, handle, options)
            }
            other => other.inspect_err(|error| self.lookup_refused(&mut state, place, error))?,
        };
        let inode = entry.inode;
        let handle = handle.ok_or_else(|| error(libc::EBADF))?.into();
        self.label_again(&before, label, inode).inspect_err(|_| self.let_go(OpenKind::File, inode, handle))?;
        let told = self.tell(&mut state, place.slot, name.to_bytes(), entry, Cause::SourceReplaced);
        let entry = told.inspect_err(|_| self.let_go(OpenKind::File, inode, handle))?;
        let node = self.slot(&state, entry.inode)?;
        let entered = self.enter(&mut state, node, OpenKind::File, flags, (inode, handle));
        let fh = entered.inspect_err(|_| {
            // The guest will not forget what it is not told.
            state.ledger.untell(node);
            self.settle(&mut state);
        })?;
        Ok((entry, Some(fh), options))
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
        let live = self.live(&mut self.state(), id, handle)?;
        match live {
            Live::Library { inode, handle } => {
                self.inner.read(ctx, inode.into(), handle.into(), w, size, offset, lock_owner, flags)
            }
            Live::Adopted(file) => self.adopted.read(&file, w, size, offset),
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
        let mut state = self.state();
        let live = self.live(&mut state, id, handle)?;
        let write = Write { size, offset, delayed: delayed_write, kill_priv, flags };
        self.write_to(&mut state, ctx, &live, r, &write)
    }

    fn flush(&self, ctx: Context, id: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        match self.live(&mut self.state(), id, handle)? {
            Live::Library { inode, handle } => self.inner.flush(ctx, inode.into(), handle.into(), lock_owner),
            Live::Adopted(file) => self.adopted.flush(&file),
        }
    }

    fn fsync(&self, ctx: Context, id: u64, datasync: bool, handle: u64) -> io::Result<()> {
        match self.live(&mut self.state(), id, handle)? {
            Live::Library { inode, handle } => self.inner.fsync(ctx, inode.into(), datasync, handle.into()),
            Live::Adopted(file) => self.adopted.fsync(&file, datasync),
        }
    }

    fn fallocate(&self, ctx: Context, id: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let mut state = self.state();
        let live = self.live(&mut state, id, handle)?;
        self.allocate(&mut state, ctx, &live, (mode, offset, length))
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
        self.close(&mut self.state(), id, handle)
    }

    fn statfs(&self, ctx: Context, id: u64) -> io::Result<libc::statvfs64> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        match self.target(&mut state, slot)? {
            Target::Library(inode) => self.inner.statfs(ctx, inode.into()),
            Target::Adopted(file) => self.adopted.statfs(&file),
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
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        self.set_attribute(&mut state, ctx, slot, (name, value), flags, extra_flags)
    }

    fn getxattr(&self, _ctx: Context, id: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        self.get_attribute(&mut state, slot, name, size)
    }

    fn listxattr(&self, ctx: Context, id: u64, size: u32) -> io::Result<ListxattrReply> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        match self.target(&mut state, slot)? {
            Target::Library(inode) => self.inner.listxattr(ctx, inode.into(), size),
            Target::Adopted(file) => self.adopted.listxattr(&file, size),
        }
    }

    fn removexattr(&self, ctx: Context, id: u64, name: &CStr) -> io::Result<()> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        self.remove_attribute(&mut state, ctx, slot, name)
    }

    fn opendir(&self, ctx: Context, id: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.open_kind(ctx, id, OpenKind::Directory, false, flags)
    }

    fn readdir(&self, ctx: Context, id: u64, handle: u64, size: u32, offset: u64) -> io::Result<F::DirIter> {
        match self.live(&mut self.state(), id, handle)? {
            Live::Library { inode, handle } => self.inner.readdir(ctx, inode.into(), handle.into(), size, offset),
            Live::Adopted(_) => Err(error(libc::ENOTDIR)),
        }
    }

    fn fsyncdir(&self, ctx: Context, id: u64, datasync: bool, handle: u64) -> io::Result<()> {
        match self.live(&mut self.state(), id, handle)? {
            Live::Library { inode, handle } => self.inner.fsyncdir(ctx, inode.into(), datasync, handle.into()),
            Live::Adopted(_) => Err(error(libc::ENOTDIR)),
        }
    }

    fn releasedir(&self, _ctx: Context, id: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.close(&mut self.state(), id, handle)
    }

    fn access(&self, ctx: Context, id: u64, mask: u32) -> io::Result<()> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        let inode = self.inode(&mut state, slot)?;
        self.inner.access(ctx, inode.into(), mask)
    }

    fn lseek(&self, ctx: Context, id: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        match self.live(&mut self.state(), id, handle)? {
            Live::Library { inode, handle } => self.inner.lseek(ctx, inode.into(), handle.into(), offset, whence),
            Live::Adopted(file) => self.adopted.lseek(&file, offset, whence),
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
        let mut state = self.state();
        let from = self.live(&mut state, inode_in, handle_in)?;
        let to = self.live(&mut state, inode_out, handle_out)?;
        drop(state);
        if let (Live::Library { inode: i, handle: h }, Live::Library { inode, handle }) = (&from, &to) {
            let (from, to) = ((*i).into(), (*inode).into());
            return self.inner.copyfilerange(
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
                let from = Place { file: source, offset: offset_in };
                let to = Place { file: target, offset: offset_out };
                self.adopted.copyfilerange(from, to, len, flags)
            })
        })
    }

    fn syncfs(&self, ctx: Context, id: u64) -> io::Result<()> {
        let mut state = self.state();
        let slot = self.slot(&state, id)?;
        let inode = self.inode(&mut state, slot)?;
        self.inner.syncfs(ctx, inode.into())
    }

    fn tmpfile(&self) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        Err(error(libc::ENOSYS))
    }
}
