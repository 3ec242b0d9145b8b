//! Names and nodes that the guest holds, confirmed by one system call instead of the library's lookup.
//!
//! A name leads to the node that the guest holds by it if its directory is open (`open_directories`) and the file there
//! has the stamp that was taken of the node. Everything else is the library's to answer: names that the guest does not
//! hold, files that are younger than a second, mount points, file systems without birth times.

use std::ffi::{CStr, CString};
use std::io;

use rustix::fs::AtFlags;
use virtiofsd::filesystem::{Context, Entry, FileSystem};
use virtiofsd::fuse::Attr;

use crate::ledger::{OpenKind, Slot};

use super::SessionFs;
use super::errors::{engine_context, errno, error, ledger_full};
use super::handles::OpenFile;
use super::names::NameRef;
use super::open_directories::OpenDirectory;
use super::open_files::file_system;
use super::request::RequestContext;
use super::stamp::Found;
use super::state::State;

/// What one system call says about a name.
pub(super) enum Confirmed {
    /// It leads to the node that the guest holds by it.
    Node(Slot, Attr),
    /// It does not exist.
    Missing,
    /// Nothing: the library has to look.
    Nothing,
}

impl<F: FileSystem> SessionFs<F> {
    /// Whether a name leads to the node that the guest holds by it: `held`.
    pub(super) fn confirm_name(&self, state: &mut State, at: NameRef<'_>, held: Option<Slot>) -> Confirmed {
        let parent = at.parent;
        let Some(node) = held else { return Confirmed::Nothing };
        let Some(directory) = state.directories.get(parent) else { return Confirmed::Nothing };
        match directory.find(at.name) {
            Ok(found) => match self.attributes_of(state, node, found) {
                Some(attr) => Confirmed::Node(node, attr),
                None => Confirmed::Nothing,
            },
            Err(gone) if errno(&gone) == libc::ENOENT && !state.directories.close_if_removed(parent) => {
                Confirmed::Missing
            }
            Err(_) => Confirmed::Nothing,
        }
    }

    /// The attributes of a node, if one of its names leads to it.
    pub(super) fn confirm_node(&self, state: &mut State, node: Slot) -> Option<Attr> {
        if let Some(directory) = state.directories.get(node) {
            let found = directory.itself().ok()??;
            return self.orphaned.attributes(found.stat).ok();
        }
        state.nodes.stamp(node)?;
        let (parent, name) = state.ledger.first_name(node)?;
        let found = state.directories.get(parent)?.find(&CString::new(name).ok()?).ok()?;
        self.attributes_of(state, node, found)
    }

    /// The attributes of what was found, if it is the node.
    fn attributes_of(&self, state: &State, node: Slot, found: Found) -> Option<Attr> {
        let same = found.stamp.is_some() && found.stamp == state.nodes.stamp(node);
        if same { self.orphaned.attributes(found.stat).ok() } else { None }
    }

    /// The reply to a lookup of a name that leads to the node that the guest holds by it.
    pub(super) fn reply_held(
        &self,
        state: &mut State,
        request: RequestContext,
        ctx: Context,
        at: NameRef<'_>,
        (node, attr): (Slot, Attr),
    ) -> io::Result<Entry> {
        let (parent, name) = at.key();
        // The library has counted the node once, when the guest received it, whatever the guest counts.
        state.ledger.add_lookup(request.ring, parent, name, node).map_err(ledger_full)?;
        if request.is_lookup() {
            state.nodes.set_looked_up(node, ctx.pid);
        }
        let id = state.ledger.id(node);
        Ok(Entry {
            inode: id,
            generation: id >> 32,
            attr: self.guest_attr(state, node, attr),
            attr_timeout: self.orphaned.attr_timeout(),
            entry_timeout: self.entry_timeout,
        })
    }

    /// The library has found that `name` leads to a node that the guest held by it before: prepares for the next time.
    pub(super) fn prepare_confirmation(
        &self,
        state: &mut State,
        (parent, name): (Slot, &CStr),
        node: Slot,
        attr: &Attr,
    ) {
        self.use_directory(state, parent);
        if state.nodes.stamp(node).is_some() {
            return;
        }
        let found = state.directories.get(parent).and_then(|directory| directory.find(name).ok());
        let found = found.filter(|found| found.has_attributes(attr));
        if let Some(stamp) = found.and_then(|found| found.stamp).filter(|stamp| stamp.is_settled()) {
            state.nodes.set_stamp(node, stamp);
        }
    }

    /// The same for a node that was not reached by a name.
    pub(super) fn prepare_node_confirmation(&self, state: &mut State, node: Slot, attr: &Attr) {
        let Some((parent, name)) = state.ledger.first_name(node) else { return };
        if let Ok(name) = CString::new(name) {
            self.prepare_confirmation(state, (parent, &name), node, attr);
        }
    }

    /// A directory is used; opens it if it is used often.
    pub(super) fn use_directory(&self, state: &mut State, slot: Slot) {
        if state.directories.count_use(slot)
            && let Some(inode) = state.nodes.inode_of(slot)
            && let Ok(Some(directory)) = self.open_directory(inode)
        {
            let first = state.keeps_nothing();
            state.directories.insert(slot, directory);
            if first {
                self.shared.wake_sweep.notify_one();
            }
        }
    }

    fn open_directory(&self, inode: u64) -> io::Result<Option<OpenDirectory>> {
        let (handle, _) = self.library.opendir(engine_context(), inode.into(), libc::O_RDONLY as u32)?;
        let handle = handle.ok_or_else(|| error(libc::EBADF))?.into();
        let listing = OpenFile::Library { inode, handle };
        let opened = self.with_file(&listing, |listing| OpenDirectory::open(listing, file_system(listing)?));
        self.close_unused(OpenKind::Directory, inode, handle);
        opened
    }

    /// Removes the name, as the library does; the library itself only where the directory is not open. A share that is
    /// read-only leaves the error to the library.
    pub(super) fn remove_from_host(
        &self,
        state: &mut State,
        ctx: Context,
        at: NameRef<'_>,
        kind: OpenKind,
    ) -> io::Result<()> {
        let parent = at.parent_inode.into();
        match (state.directories.get(at.parent).filter(|_| self.orphaned.is_writable()), kind) {
            (Some(directory), OpenKind::File) => directory.unlink(at.name, AtFlags::empty()),
            (Some(directory), OpenKind::Directory) => directory.unlink(at.name, AtFlags::REMOVEDIR),
            (None, OpenKind::File) => self.library.unlink(ctx, parent, at.name),
            (None, OpenKind::Directory) => self.library.rmdir(ctx, parent, at.name),
        }
    }
}
