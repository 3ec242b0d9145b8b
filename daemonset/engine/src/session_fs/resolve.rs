//! From the guest's node ids to what serves them, and from the library's entries to node ids.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustc_hash::FxHashSet;
use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::{Entry, FileSystem};

use crate::ledger::{Identity, ROOT, Slot};
use crate::orphaned::OrphanedFile;

use super::SessionFs;
use super::errors::{engine_context, error, is_missing, ledger_full};
use super::identity::is_same_node;
use super::names::NameRef;
use super::nodes::{LIBRARY_ROOT, Target};
use super::request::RequestContext;
use super::state::State;

/// A node that is being looked for, and its names that have not been tried.
struct Search {
    slot: Slot,
    names: std::vec::IntoIter<(Slot, Vec<u8>)>,
    /// The name to follow once its directory has been found.
    pending: Option<(Slot, Vec<u8>)>,
}

impl Search {
    fn new(state: &State, slot: Slot) -> Self {
        Search { slot, names: state.ledger.names(slot).into_iter(), pending: None }
    }
}

impl<F: FileSystem> SessionFs<F> {
    /// The node that the guest means.
    ///
    /// # Errors
    /// `ESTALE` for an id that was never given out, or has been forgotten: the guest's VFS then walks again from the root.
    pub(super) fn slot(&self, state: &State, id: u64) -> io::Result<Slot> {
        state.ledger.slot(id).ok_or_else(|| {
            self.count_fenced();
            error(libc::ESTALE)
        })
    }

    /// The library's inode number of a node.
    ///
    /// # Errors
    /// `ESTALE` if no name leads to the node any more, `ENOENT` for a directory that the guest removed; else the error of the
    /// lookup.
    pub(super) fn inode(&self, state: &mut State, request: RequestContext, slot: Slot) -> io::Result<u64> {
        if slot != ROOT {
            state.directories.close_if_removed(slot);
        }
        self.known_inode(state, request, slot)
    }

    /// The same, without a check whether the directory was removed while it is open.
    pub(super) fn known_inode(&self, state: &mut State, request: RequestContext, slot: Slot) -> io::Result<u64> {
        if slot == ROOT {
            return Ok(LIBRARY_ROOT);
        }
        match self.known_target(state, request, slot)? {
            Target::Library(inode) => Ok(inode),
            Target::Orphaned(_) => Err(error(libc::ESTALE)),
            Target::RemovedDirectory(_) => Err(error(libc::ENOENT)),
        }
    }

    /// What serves a node: the library, or the engine itself if no name leads to the node and the guest has it open.
    pub(super) fn target(&self, state: &mut State, request: RequestContext, slot: Slot) -> io::Result<Target> {
        // While it is open, the file handle of a removed directory can be opened.
        state.directories.close_if_removed(slot);
        self.known_target(state, request, slot)
    }

    fn known_target(&self, state: &mut State, request: RequestContext, slot: Slot) -> io::Result<Target> {
        if let Some(target) = state.nodes.target(slot) {
            return Ok(target.clone());
        }
        if slot == ROOT {
            return Ok(Target::Library(LIBRARY_ROOT));
        }
        match self.resolve(state, request, slot) {
            Ok(inode) => Ok(Target::Library(inode)),
            Err(gone) if gone.raw_os_error() == Some(libc::ESTALE) => {
                let removed = self.take_removed_directory(state, slot);
                removed.or_else(|| self.take_orphan_of_node(state, slot).map(Target::Orphaned)).ok_or(gone)
            }
            Err(other) => Err(other),
        }
    }

    fn take_orphan_of_node(&self, state: &mut State, slot: Slot) -> Option<Arc<OrphanedFile>> {
        let opened = state.ledger.handles_of(slot);
        opened.iter().find_map(|handle| self.take_orphan(state, handle))
    }

    /// Finds a node by its names when this engine first uses it, and the directories above it by theirs. Each node is
    /// tried once, because outdated names may form a cycle.
    fn resolve(&self, state: &mut State, request: RequestContext, node: Slot) -> io::Result<u64> {
        let mut visited = FxHashSet::from_iter([node]);
        let mut searches = vec![Search::new(state, node)];
        while let Some(search) = searches.last_mut() {
            let Some((above, name)) = search.pending.take().or_else(|| search.names.next()) else {
                searches.pop();
                continue;
            };
            match state.nodes.inode_of(above) {
                Some(inode) => match self.resolve_name(state, request, inode, &name, search.slot) {
                    Ok(found) if search.slot == node => return Ok(found),
                    Ok(_) => drop(searches.pop()),
                    Err(gone) if is_missing(&gone) => {}
                    Err(other) => return Err(other),
                },
                None if state.nodes.target(above).is_none() && visited.insert(above) => {
                    search.pending = Some((above, name));
                    searches.push(Search::new(state, above));
                }
                None => {}
            }
        }
        Err(error(libc::ESTALE))
    }

    /// Binds the node in `slot` to the library's inode if `name` below `above` leads to that node.
    fn resolve_name(
        &self,
        state: &mut State,
        request: RequestContext,
        above: u64,
        name: &[u8],
        slot: Slot,
    ) -> io::Result<u64> {
        let name = component(name)?;
        let parent = state.nodes.slot_of(above).unwrap_or(ROOT);
        let entry = self
            .library
            .lookup(engine_context(), above.into(), &name)
            .inspect_err(|error| self.name_unresolved(state, request, (parent, name.to_bytes()), slot, error))?;
        // By the same rule as when the guest received the node.
        let found = self.identify(state, (parent, name.to_bytes()), &entry);
        if !is_same_node(state.ledger.identity(parent), found, state.ledger.identity(slot)) {
            self.library.forget(engine_context(), entry.inode.into(), 1);
            self.drop_stale_name(state, request, (parent, name.to_bytes()), slot, Cause::SourceReplaced);
            return Err(error(libc::ESTALE));
        }
        state.nodes.bind(slot, entry.inode, entry.attr.mode);
        Ok(entry.inode)
    }

    /// Turns an entry of the library's into one for the guest, and counts the lookup in the ledger. `held`: the node that
    /// the guest holds by the name. `cause`: what it means if that is another node.
    ///
    /// # Errors
    /// `ENFILE` if the guest holds as much as it may; the lookup is then returned to the library.
    pub(super) fn reply_entry(
        &self,
        state: &mut State,
        request: RequestContext,
        (at, held): (NameRef<'_>, Option<Slot>),
        mut entry: Entry,
        cause: Cause,
    ) -> io::Result<Entry> {
        let (slot, displaced) = self
            .node_of_entry(state, request, (at, held), &entry)
            .inspect_err(|_| self.library.forget(engine_context(), entry.inode.into(), 1))?;
        if let Some(displaced) = displaced {
            self.count_stale_name(state, at.key(), displaced, cause);
        }
        let id = state.ledger.id(slot);
        (entry.inode, entry.generation) = (id, id >> 32);
        entry.attr = self.guest_attr(state, slot, entry.attr);
        Ok(entry)
    }

    /// The guest's node for an entry, a new one if it holds none. The library's inode number decides whether it is the
    /// same. Also returns the node that the guest held by that name, if that is another one.
    fn node_of_entry(
        &self,
        state: &mut State,
        request: RequestContext,
        (at, held): (NameRef<'_>, Option<Slot>),
        entry: &Entry,
    ) -> io::Result<(Slot, Option<Slot>)> {
        let (parent, name) = at.key();
        if let Some(slot) = state.nodes.slot_of(entry.inode) {
            state.nodes.count_extra_lookup(slot);
            let displaced = state.ledger.add_lookup(request.ring, parent, name, slot).map_err(ledger_full)?;
            return Ok((slot, displaced));
        }
        let identity = self.identify(state, (parent, name), entry);
        if let Some(slot) = self.bind_known_node(state, request, held, entry, identity) {
            let displaced = state.ledger.add_lookup(request.ring, parent, name, slot).map_err(ledger_full)?;
            return Ok((slot, displaced));
        }
        let (slot, displaced) = state.ledger.add_node(request.ring, parent, name, identity).map_err(ledger_full)?;
        self.release_ended(state);
        state.nodes.bind(slot, entry.inode, entry.attr.mode);
        Ok((slot, displaced))
    }

    /// Binds an entry that is new to this engine to a node that the guest received from an earlier one, if it is that
    /// node. `held`: the node that the guest holds by the name. Names of other nodes may be dropped, and this one too.
    fn bind_known_node(
        &self,
        state: &mut State,
        request: RequestContext,
        held: Option<Slot>,
        entry: &Entry,
        identity: Identity,
    ) -> Option<Slot> {
        if let Some(slot) = held.filter(|slot| {
            *slot != ROOT && state.nodes.target(*slot).is_none() && state.ledger.identity(*slot) == identity
        }) {
            state.nodes.bind(slot, entry.inode, entry.attr.mode);
            return Some(slot);
        }
        for slot in state.ledger.nodes_with_identity(identity).into_iter().filter(|slot| *slot != ROOT) {
            match self.target(state, request, slot) {
                // By its own names it leads to the same inode and is bound to that now. The library has counted one
                // lookup for that, and one for the entry.
                Ok(Target::Library(inode)) if inode == entry.inode => {
                    state.nodes.count_extra_lookup(slot);
                    return Some(slot);
                }
                // While the file is open, no other file has its inode number: a name leads to it again.
                Ok(Target::Orphaned(file)) if is_open_as(&file, entry) => {
                    state.nodes.bind(slot, entry.inode, entry.attr.mode);
                    return Some(slot);
                }
                _ => {}
            }
        }
        None
    }

    /// Returns the library's lookups of nodes that have ended, before their slots are used for other nodes.
    pub(super) fn release_ended(&self, state: &mut State) {
        for slot in state.ledger.take_ended() {
            state.directories.close(slot);
            if let Some((inode, lookups)) = state.nodes.unbind(slot) {
                self.library.forget(engine_context(), inode.into(), lookups);
            }
        }
    }
}

fn is_open_as(file: &OrphanedFile, entry: &Entry) -> bool {
    file.file().metadata().is_ok_and(|found| found.ino() == entry.attr.ino && found.nlink() > 0)
}

/// A name from the ledger, checked again: another engine wrote it.
///
/// # Errors
/// `ESTALE` if it is not a single component.
pub(super) fn component(name: &[u8]) -> io::Result<CString> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(error(libc::ESTALE));
    }
    CString::new(name).map_err(|_| error(libc::ESTALE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_the_ledger_is_one_component() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/etc", b"a\0b"] {
            assert_eq!(component(bad).unwrap_err().raw_os_error(), Some(libc::ESTALE), "{bad:?}");
        }
        assert_eq!(component(b"\xff").unwrap().to_bytes(), b"\xff");
    }
}
