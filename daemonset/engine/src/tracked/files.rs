//! What the guest has open.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::fstatvfs;
use virtiofsd::filesystem::{FileSystem, OpenOptions};

use crate::adopted::{AdoptedFile, kernel_file_handle, open_by_kernel_handle};
use crate::ledger::{FileHandle, Full, OpenKind, Opened, Slot};

use super::orphans::park_removed;
use super::seams::Glance;
use super::state::{Live, State, Target};
use super::{Tracked, error, ourselves};

/// Flags that belong to the act of opening, not to the open file. The library takes O_APPEND and O_NOATIME off by
/// itself and appends by each write's own flag.
const ONCE: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY | libc::O_APPEND | libc::O_NOATIME;

/// The flags to open a file with again.
fn lasting(flags: u32) -> u32 {
    flags & !(ONCE as u32)
}

impl<F: FileSystem> Tracked<F> {
    /// The guest's handle, as the ledger knows it. One that is not open on that node is no handle at all.
    pub(super) fn opened(&self, state: &State, id: u64, fh: u64) -> io::Result<Opened> {
        let node = self.slot(state, id)?;
        state.ledger.opened(fh).filter(|opened| opened.node == node).ok_or_else(|| error(libc::EBADF))
    }

    /// What the guest's handle is in this engine; opened again on its first use.
    pub(super) fn live(&self, state: &mut State, id: u64, fh: u64) -> io::Result<Live> {
        let opened = self.opened(state, id, fh)?;
        match state.bindings.live(opened.slot) {
            Some(live) => Ok(live),
            None => self.open_again(state, &opened),
        }
    }

    fn open_again(&self, state: &mut State, opened: &Opened) -> io::Result<Live> {
        let live = match self.target(state, opened.node) {
            Ok(Target::Library(inode)) => self.open_same(state, inode, opened)?,
            Ok(Target::Adopted(_)) => None,
            Err(gone) if gone.raw_os_error() == Some(libc::ESTALE) => None,
            Err(other) => return Err(other),
        };
        let live = match live {
            Some(live) => live,
            None => Live::Adopted(self.adopt(state, opened).ok_or_else(|| error(libc::ESTALE))?),
        };
        state.bindings.set_live(opened.slot, live.clone());
        Ok(live)
    }

    /// Opens the library's inode, if that is the very file the guest had open: a number may have been given to
    /// another file meanwhile.
    fn open_same(&self, state: &mut State, inode: u64, opened: &Opened) -> io::Result<Option<Live>> {
        let handle = match opened.kind {
            OpenKind::Directory => self.inner.opendir(ourselves(), inode.into(), opened.flags)?.0,
            OpenKind::File => self.inner.open(ourselves(), inode.into(), false, opened.flags)?.0,
        };
        let handle: u64 = handle.ok_or_else(|| error(libc::EBADF))?.into();
        if opened.kind == OpenKind::File && self.file_handle(state, inode, handle) != opened.file_handle {
            self.inner.release(ourselves(), inode.into(), 0, handle.into(), false, false, None)?;
            return Ok(None);
        }
        Ok(Some(Live::Library { inode, handle }))
    }

    /// Takes a file over that no name leads to: from the broker's keeping, or by its kernel file handle.
    pub(super) fn adopt(&self, state: &mut State, opened: &Opened) -> Option<Arc<AdoptedFile>> {
        if opened.kind == OpenKind::Directory {
            return None;
        }
        let parked = state.parking.fetch(state.ledger.fh(opened.slot));
        let file = parked.or_else(|| self.open_by_handle(opened))?;
        let file = Arc::new(AdoptedFile::adopt(file).ok()?);
        if state.bindings.target(opened.node).is_none() {
            state.bindings.adopt(opened.node, file.clone());
        }
        state.bindings.set_live(opened.slot, Live::Adopted(file.clone()));
        Some(file)
    }

    /// Opens a file by its kernel file handle, on whichever file system of the share it is known.
    fn open_by_handle(&self, opened: &Opened) -> Option<File> {
        let FileHandle { kind, bytes, .. } = &opened.file_handle;
        let flags = self.adopted.open_flags(opened.flags as i32).ok().filter(|_| !bytes.is_empty())?;
        let open = |mount: &File| open_by_kernel_handle(mount, *kind, bytes, flags).ok();
        self.mounts.iter().find_map(|mount| open(mount).filter(|file| known_as(file) == opened.file_handle))
    }

    /// Enters what the library has just opened. Returns the guest's number for it.
    pub(super) fn enter(
        &self,
        state: &mut State,
        node: Slot,
        kind: OpenKind,
        flags: u32,
        (inode, handle): (u64, u64),
    ) -> io::Result<u64> {
        let file_handle = match kind {
            OpenKind::File => self.file_handle(state, inode, handle),
            OpenKind::Directory => FileHandle::default(),
        };
        let live = Live::Library { inode, handle };
        let fh = self.enter_live(state, node, kind, lasting(flags), &file_handle, live.clone());
        match fh {
            Ok(fh) => {
                if self.park_at_open && kind == OpenKind::File {
                    self.park_one(state, fh, &live);
                }
                Ok(fh)
            }
            Err(full) => {
                self.let_go(kind, inode, handle);
                Err(full)
            }
        }
    }

    fn enter_live(
        &self,
        state: &mut State,
        node: Slot,
        kind: OpenKind,
        flags: u32,
        file_handle: &FileHandle,
        live: Live,
    ) -> io::Result<u64> {
        let fh = state.ledger.open(node, kind, flags, file_handle).map_err(|Full| error(libc::ENFILE))?;
        state.bindings.set_live(fh as u32, live);
        state.parking.entered(fh);
        Ok(fh)
    }

    /// Opens once more a file that no name leads to.
    pub(super) fn open_adopted(
        &self,
        state: &mut State,
        node: Slot,
        file: &AdoptedFile,
        flags: u32,
        kill_priv: bool,
    ) -> io::Result<(u64, OpenOptions)> {
        let (again, options) = self.adopted.open(file, kill_priv, flags)?;
        // The library counts what it opens for the guest; this, nobody does.
        if again.file().as_raw_fd() as u64 > self.highest_descriptor {
            return Err(error(libc::ENFILE));
        }
        let file_handle = known_as(again.file());
        let live = Live::Adopted(Arc::new(again));
        let fh = self.enter_live(state, node, OpenKind::File, lasting(flags), &file_handle, live.clone())?;
        self.park_one(state, fh, &live);
        Ok((fh, options))
    }

    /// The guest closes a handle.
    pub(super) fn close(&self, state: &mut State, id: u64, fh: u64) -> io::Result<()> {
        if state.current.again && state.ledger.progress() > 0 {
            return Ok(());
        }
        let opened = self.opened(state, id, fh)?;
        state.parking.release(fh);
        if let Some(Live::Library { inode, handle }) = state.bindings.drop_live(opened.slot) {
            self.close_library(opened.kind, inode, handle)?;
        }
        state.ledger.close(opened.slot);
        self.settle(state);
        Ok(())
    }

    /// Closes what the guest does not get.
    pub(super) fn let_go(&self, kind: OpenKind, inode: u64, handle: u64) {
        if let Err(error) = self.close_library(kind, inode, handle) {
            tracing::warn!("a file that was opened in vain is not closed: {error}");
        }
    }

    fn close_library(&self, kind: OpenKind, inode: u64, handle: u64) -> io::Result<()> {
        match kind {
            OpenKind::File => self.inner.release(ourselves(), inode.into(), 0, handle.into(), false, false, None),
            OpenKind::Directory => self.inner.releasedir(ourselves(), inode.into(), 0, handle.into()),
        }
    }

    /// Shows the file behind any handle.
    pub(super) fn with_file<T>(&self, live: &Live, look: impl FnMut(&File) -> io::Result<T>) -> io::Result<T> {
        look_at(&*self.inner, live, look)
    }

    /// Which file an open one is. Asked of the kernel once per inode.
    fn file_handle(&self, state: &mut State, inode: u64, handle: u64) -> FileHandle {
        if let Some(known) = state.bindings.file_handle(inode) {
            return known.clone();
        }
        let live = Live::Library { inode, handle };
        let found = self.with_file(&live, |file| Ok(known_as(file))).unwrap_or_default();
        state.bindings.set_file_handle(inode, &found);
        found
    }

    /// A name of a node is about to go. If it is the last one, what the guest has open of it is put into the broker's
    /// keeping. That is asked of the file: the names that the guest was told may be old, and there may be others.
    pub(super) fn park_last(&self, state: &mut State, victim: Option<Slot>) {
        for opened in victim.map(|victim| state.ledger.handles_of(victim)).unwrap_or_default() {
            if opened.kind == OpenKind::Directory {
                continue;
            }
            let live = state.bindings.live(opened.slot).map_or_else(|| self.open_again(state, &opened), Ok);
            let links = live.and_then(|live| {
                let links = self.with_file(&live, |file| Ok(file.metadata()?.nlink()))?;
                Ok((live, links))
            });
            match links {
                Ok((_, links)) if links > 1 => return,
                Ok((live, _)) => self.park_one(state, state.ledger.fh(opened.slot), &live),
                Err(error) => tracing::warn!("a file about to be unlinked cannot be kept: {error}"),
            }
        }
    }

    /// Something says that others may have removed a node: what the guest has open of it is put into the broker's
    /// keeping if so, for this engine is the last to have it.
    pub(super) fn park_removed(&self, state: &mut State, node: Slot) {
        park_removed(&*self.inner, state, node);
    }

    fn park_one(&self, state: &mut State, fh: u64, live: &Live) {
        let parked = self.with_file(live, |file| {
            state.parking.park(fh, file);
            Ok(())
        });
        if let Err(error) = parked {
            tracing::warn!("a file cannot be kept: {error}");
        }
    }
}

/// Shows the file behind a handle.
pub(super) fn look_at<F: FileSystem, T>(
    inner: &F,
    live: &Live,
    mut look: impl FnMut(&File) -> io::Result<T>,
) -> io::Result<T> {
    let (inode, handle) = match live {
        Live::Library { inode, handle } => (*inode, *handle),
        Live::Adopted(file) => return look(file.file()),
    };
    let mut seen = None;
    let glance = Glance(|file: &File| {
        seen = Some(look(file)?);
        Ok(())
    });
    inner.read(ourselves(), inode.into(), handle.into(), glance, 0, 0, None, 0)?;
    seen.ok_or_else(|| error(libc::EBADF))
}

/// Which file this is, whatever its inode number; empty where the file system does not say.
fn known_as(file: &File) -> FileHandle {
    match (kernel_file_handle(file), file_system(file)) {
        (Ok(Some((kind, bytes))), Ok(file_system)) => FileHandle { kind, bytes, file_system },
        _ => FileHandle::default(),
    }
}

/// The file system's own number, which it keeps when it is mounted again on another device; else that device's.
fn file_system(file: &File) -> io::Result<u64> {
    match fstatvfs(file)?.f_fsid {
        0 => Ok(file.metadata()?.dev()),
        number => Ok(number),
    }
}
