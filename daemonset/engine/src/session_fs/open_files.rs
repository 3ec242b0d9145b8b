//! Opening, reopening and closing what the guest has open.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::fstatvfs;
use virtiofsd::filesystem::{FileSystem, OpenOptions};

use crate::ledger::{FileHandle, OpenKind, Opened, Slot};
use crate::orphaned::{KernelFileHandle, OrphanedFile, kernel_file_handle, open_by_kernel_handle};

use super::SessionFs;
use super::errors::{engine_context, error, ledger_full};
use super::handles::OpenFile;
use super::library_io::probe_file;
use super::nodes::Target;
use super::orphan_scan;
use super::request::RequestContext;
use super::state::State;

/// Flags of the act of opening, not of the open file. The library removes O_APPEND and O_NOATIME itself, and appends by
/// the flag of each write.
const OPEN_ONLY_FLAGS: i32 =
    libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY | libc::O_APPEND | libc::O_NOATIME;

/// The flags to reopen a file with.
fn reopen_flags(flags: u32) -> u32 {
    flags & !(OPEN_ONLY_FLAGS as u32)
}

/// True if a file cannot be opened again: no name leads to it, or its mode or state does not allow now what was allowed
/// when the guest opened it. The guest keeps the rights that it opened it with, if an open descriptor is left.
fn is_stale_or_denied(error: &io::Error) -> bool {
    let denied = [libc::EACCES, libc::EPERM, libc::EROFS, libc::ETXTBSY];
    error.raw_os_error().is_some_and(|errno| errno == libc::ESTALE || denied.contains(&errno))
}

impl<F: FileSystem> SessionFs<F> {
    /// The guest's handle, as the ledger knows it.
    ///
    /// # Errors
    /// `EBADF` if it is not open on that node.
    pub(super) fn opened(&self, state: &State, id: u64, fh: u64) -> io::Result<Opened> {
        let node = self.slot(state, id)?;
        state.ledger.opened(fh).filter(|opened| opened.node == node).ok_or_else(|| error(libc::EBADF))
    }

    /// What serves the guest's handle in this engine; reopened when this engine first uses it.
    pub(super) fn open_file(
        &self,
        state: &mut State,
        request: RequestContext,
        id: u64,
        fh: u64,
    ) -> io::Result<OpenFile> {
        let opened = self.opened(state, id, fh)?;
        match state.handles.get(opened.slot) {
            Some(file) => Ok(file),
            None => self.reopen(state, request, &opened),
        }
    }

    /// Opens a file again in this engine; if that is denied, the stashed descriptor serves.
    fn reopen(&self, state: &mut State, request: RequestContext, opened: &Opened) -> io::Result<OpenFile> {
        let file = match self.target(state, request, opened.node) {
            Ok(Target::Library(inode)) => self.reopen_same_file(state, inode, opened),
            Ok(Target::Orphaned(_) | Target::RemovedDirectory(_)) => Err(error(libc::ESTALE)),
            Err(other) => Err(other),
        };
        let file = match file {
            Ok(file) => file,
            Err(failed) if is_stale_or_denied(&failed) => {
                OpenFile::Orphaned(self.take_orphan(state, opened).ok_or(failed)?)
            }
            Err(other) => return Err(other),
        };
        state.handles.insert(opened.slot, file.clone());
        Ok(file)
    }

    /// Opens the library's inode.
    ///
    /// # Errors
    /// `ESTALE` if it is not the file that the guest had open: its inode number has been given to another file.
    fn reopen_same_file(&self, state: &mut State, inode: u64, opened: &Opened) -> io::Result<OpenFile> {
        let handle = match opened.kind {
            OpenKind::Directory => self.library.opendir(engine_context(), inode.into(), opened.flags)?.0,
            OpenKind::File => self.library.open(engine_context(), inode.into(), false, opened.flags)?.0,
        };
        let handle: u64 = handle.ok_or_else(|| error(libc::EBADF))?.into();
        if opened.kind == OpenKind::File
            && self.file_handle(state, inode, handle) != state.ledger.file_handle(opened.slot)
        {
            self.library.release(engine_context(), inode.into(), 0, handle.into(), false, false, None)?;
            return Err(error(libc::ESTALE));
        }
        Ok(OpenFile::Library { inode, handle })
    }

    /// Takes over a file that cannot be opened again by name: from the fd stash, or by its kernel file handle.
    pub(super) fn take_orphan(&self, state: &mut State, opened: &Opened) -> Option<Arc<OrphanedFile>> {
        if opened.kind == OpenKind::Directory {
            return None;
        }
        let stashed = state.stash.fetch(state.ledger.fh(opened.slot));
        let file = stashed.or_else(|| self.open_by_handle(&state.ledger.file_handle(opened.slot), opened.flags))?;
        let file = Arc::new(OrphanedFile::new(file).ok()?);
        if state.nodes.target(opened.node).is_none() {
            state.nodes.bind_orphan(opened.node, file.clone());
        }
        state.handles.insert(opened.slot, OpenFile::Orphaned(file.clone()));
        Some(file)
    }

    /// Opens a file by its kernel file handle, on whichever file system of the share it is found.
    fn open_by_handle(&self, wanted: &FileHandle, flags: u32) -> Option<File> {
        let FileHandle { kind, bytes, .. } = wanted;
        let flags = self.orphaned.open_flags(flags as i32).ok().filter(|_| !bytes.is_empty())?;
        let open = |mount: &File| open_by_kernel_handle(mount, *kind, bytes, flags).ok();
        self.mounts.iter().find_map(|mount| open(mount).filter(|file| handle_of(file) == *wanted))
    }

    /// Records what the library has just opened. Returns the guest's number for it.
    ///
    /// # Errors
    /// `ENFILE` if the ledger has no room; the library's handle is then closed.
    pub(super) fn add_handle(
        &self,
        state: &mut State,
        request: RequestContext,
        node: Slot,
        kind: OpenKind,
        flags: u32,
        (inode, handle): (u64, u64),
    ) -> io::Result<u64> {
        let file_handle = match kind {
            OpenKind::File => self.file_handle(state, inode, handle),
            OpenKind::Directory => FileHandle::default(),
        };
        let file = OpenFile::Library { inode, handle };
        let recorded = self.record_handle(state, request, node, kind, flags, &file_handle, file.clone());
        let fh = recorded.inspect_err(|_| self.close_unused(kind, inode, handle))?;
        if self.stash_at_open && kind == OpenKind::File {
            self.stash_handle(state, fh, &file);
        }
        Ok(fh)
    }

    #[expect(clippy::too_many_arguments, reason = "what a handle is recorded with")]
    fn record_handle(
        &self,
        state: &mut State,
        request: RequestContext,
        node: Slot,
        kind: OpenKind,
        flags: u32,
        file_handle: &FileHandle,
        file: OpenFile,
    ) -> io::Result<u64> {
        let flags = reopen_flags(flags);
        let fh = state.ledger.open(request.ring, node, kind, flags, file_handle).map_err(ledger_full)?;
        state.handles.insert(fh as u32, file);
        state.stash.opened(fh);
        Ok(fh)
    }

    /// OPENDIR of a directory that the guest removed: nothing is open on the host.
    pub(super) fn open_removed_directory(
        &self,
        state: &mut State,
        request: RequestContext,
        node: Slot,
        kind: OpenKind,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        if kind != OpenKind::Directory {
            return Err(error(libc::EISDIR));
        }
        let (flags, none) = (reopen_flags(flags), FileHandle::default());
        let fh = state.ledger.open(request.ring, node, kind, flags, &none).map_err(ledger_full)?;
        state.stash.opened(fh);
        Ok((Some(fh), OpenOptions::empty()))
    }

    /// OPEN of a file to which no name leads.
    pub(super) fn open_orphan(
        &self,
        state: &mut State,
        request: RequestContext,
        node: Slot,
        file: &OrphanedFile,
        flags: u32,
        kill_priv: bool,
    ) -> io::Result<(u64, OpenOptions)> {
        let (opened, options) = self.orphaned.open(file, kill_priv, flags)?;
        // The library counts what it opens for the guest; these files are bounded here.
        if opened.file().as_raw_fd() as u64 > self.highest_descriptor {
            return Err(error(libc::ENFILE));
        }
        let file_handle = handle_of(opened.file());
        let file = OpenFile::Orphaned(Arc::new(opened));
        let fh = self.record_handle(state, request, node, OpenKind::File, flags, &file_handle, file.clone())?;
        self.stash_handle(state, fh, &file);
        Ok((fh, options))
    }

    /// RELEASE and RELEASEDIR.
    pub(super) fn close(&self, state: &mut State, request: RequestContext, id: u64, fh: u64) -> io::Result<()> {
        if request.repeated && state.ledger.progress(request.ring) > 0 {
            return Ok(());
        }
        let opened = self.opened(state, id, fh)?;
        state.stash.release(fh);
        if let Some(OpenFile::Library { inode, handle }) = state.handles.remove(opened.slot) {
            self.close_library(opened.kind, inode, handle)?;
        }
        state.ledger.close(request.ring, opened.slot);
        self.release_ended(state);
        Ok(())
    }

    /// Closes a library handle that the guest does not receive.
    pub(super) fn close_unused(&self, kind: OpenKind, inode: u64, handle: u64) {
        if let Err(error) = self.close_library(kind, inode, handle) {
            tracing::warn!("closing an unused library handle: {error}");
        }
    }

    fn close_library(&self, kind: OpenKind, inode: u64, handle: u64) -> io::Result<()> {
        let (inode, handle) = (inode.into(), handle.into());
        match kind {
            OpenKind::File => self.library.release(engine_context(), inode, 0, handle, false, false, None),
            OpenKind::Directory => self.library.releasedir(engine_context(), inode, 0, handle),
        }
    }

    /// Calls `probe` with the file behind a handle.
    pub(super) fn with_file<T>(&self, file: &OpenFile, probe: impl FnMut(&File) -> io::Result<T>) -> io::Result<T> {
        probe_file(&*self.library, file, probe)
    }

    /// The kernel file handle of an open file, read once per inode.
    fn file_handle(&self, state: &mut State, inode: u64, handle: u64) -> FileHandle {
        if let Some(known) = state.nodes.file_handle(inode) {
            return known.clone();
        }
        let file = OpenFile::Library { inode, handle };
        let directories = &state.directories;
        let found = self.with_file(&file, |file| Ok(handle_on(file, |mount| directories.file_system(mount))));
        let found = found.unwrap_or_default();
        state.nodes.set_file_handle(inode, &found);
        found
    }

    /// Stashes what the guest has open of a node whose name is about to be removed, if that is its last name. The file
    /// itself says so: the names in the ledger may be outdated, and there may be others.
    pub(super) fn stash_before_unlink(&self, state: &mut State, request: RequestContext, victim: Option<Slot>) {
        for opened in victim.map(|victim| state.ledger.handles_of(victim)).unwrap_or_default() {
            if opened.kind == OpenKind::Directory {
                continue;
            }
            let file = state.handles.get(opened.slot).map_or_else(|| self.reopen(state, request, &opened), Ok);
            let links = file.and_then(|file| {
                let links = self.with_file(&file, |file| Ok(file.metadata()?.nlink()))?;
                Ok((file, links))
            });
            match links {
                Ok((_, links)) if links > 1 => return,
                Ok((file, _)) => self.stash_handle(state, state.ledger.fh(opened.slot), &file),
                Err(error) => tracing::warn!("stashing an open file before its unlink: {error}"),
            }
        }
    }

    /// Stashes what the guest has open of a node if another process has removed it: this engine is the last to have it.
    pub(super) fn stash_if_removed(&self, state: &mut State, node: Slot) {
        orphan_scan::stash_if_removed(&*self.library, state, node);
    }

    fn stash_handle(&self, state: &mut State, fh: u64, file: &OpenFile) {
        let stashed = self.with_file(file, |file| {
            state.stash.stash(fh, file);
            Ok(())
        });
        if let Err(error) = stashed {
            tracing::warn!("stashing an open file: {error}");
        }
    }
}

/// Which file this is, whatever its inode number; empty if the file system makes no file handles.
fn handle_of(file: &File) -> FileHandle {
    handle_on(file, |_| None)
}

/// The same. `known`: the number of the file system of a mount, if it is known.
fn handle_on(file: &File, known: impl Fn(u64) -> Option<u64>) -> FileHandle {
    let Ok(Some(KernelFileHandle { kind, bytes, mount_id })) = kernel_file_handle(file) else {
        return FileHandle::default();
    };
    match known(mount_id).map_or_else(|| file_system(file), Ok) {
        Ok(file_system) => FileHandle { kind, bytes: bytes.into(), file_system },
        Err(_) => FileHandle::default(),
    }
}

/// The file system's own number, which it keeps when it is mounted again as another device; else the device's.
pub(super) fn file_system(file: &File) -> io::Result<u64> {
    match fstatvfs(file)?.f_fsid {
        0 => Ok(file.metadata()?.dev()),
        number => Ok(number),
    }
}
