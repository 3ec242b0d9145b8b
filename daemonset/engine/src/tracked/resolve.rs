//! From the guest's number of a node to what serves it, and back.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustc_hash::FxHashSet;
use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::{Entry, FileSystem};
use virtiofsd::fuse::ATTR_SUBMOUNT;

use crate::adopted::AdoptedFile;
use crate::ledger::{Full, Identity, ROOT, Slot};

use super::state::{LIBRARY_ROOT, State, Target};
use super::{Tracked, error, ourselves};

/// A directory that is looked for, and those of its names that have not been tried.
struct Sought {
    slot: Slot,
    names: std::vec::IntoIter<(Slot, Vec<u8>)>,
    /// The name that leads to it if the directory above is found.
    tried: Option<(Slot, Vec<u8>)>,
}

impl Sought {
    fn new(state: &State, slot: Slot) -> Self {
        Sought { slot, names: state.ledger.names(slot).into_iter(), tried: None }
    }
}

impl<F: FileSystem> Tracked<F> {
    /// The node that the guest means. An id that was never given out, or has been forgotten, is answered ESTALE:
    /// the guest's VFS then walks again from the root by itself.
    pub(super) fn slot(&self, state: &State, id: u64) -> io::Result<Slot> {
        state.ledger.slot(id).ok_or_else(|| {
            self.fenced();
            error(libc::ESTALE)
        })
    }

    /// The library's number of a node.
    pub(super) fn inode(&self, state: &mut State, slot: Slot) -> io::Result<u64> {
        if slot == ROOT {
            return Ok(LIBRARY_ROOT);
        }
        match state.bindings.target(slot) {
            Some(Target::Library(inode)) => Ok(*inode),
            Some(Target::Adopted(_)) => Err(error(libc::ESTALE)),
            None => self.resolve(state, slot),
        }
    }

    /// What serves a node: the library, or we ourselves where no name leads to it any more.
    pub(super) fn target(&self, state: &mut State, slot: Slot) -> io::Result<Target> {
        if let Some(target) = state.bindings.target(slot) {
            return Ok(target.clone());
        }
        match self.inode(state, slot) {
            Ok(inode) => Ok(Target::Library(inode)),
            Err(gone) if gone.raw_os_error() == Some(libc::ESTALE) => {
                self.adopt_node(state, slot).map(Target::Adopted).ok_or(gone)
            }
            Err(other) => Err(other),
        }
    }

    fn adopt_node(&self, state: &mut State, slot: Slot) -> Option<Arc<AdoptedFile>> {
        let opened = state.ledger.handles_of(slot);
        opened.iter().find_map(|handle| self.adopt(state, handle))
    }

    /// Finds a node by its names, the first time it is used in this engine, and on the way the directories above it by
    /// theirs. Each is tried once: old names may lead in a circle.
    fn resolve(&self, state: &mut State, node: Slot) -> io::Result<u64> {
        let mut met = FxHashSet::from_iter([node]);
        let mut way = vec![Sought::new(state, node)];
        while let Some(sought) = way.last_mut() {
            let Some((above, name)) = sought.tried.take().or_else(|| sought.names.next()) else {
                way.pop();
                continue;
            };
            match state.bindings.inode_of(above) {
                Some(inode) => match self.step(state, inode, &name, sought.slot) {
                    Ok(found) if sought.slot == node => return Ok(found),
                    Ok(_) => drop(way.pop()),
                    Err(gone) if names_nothing(&gone) => {}
                    Err(other) => return Err(other),
                },
                None if state.bindings.target(above).is_none() && met.insert(above) => {
                    sought.tried = Some((above, name));
                    way.push(Sought::new(state, above));
                }
                None => {}
            }
        }
        Err(error(libc::ESTALE))
    }

    /// One step down: is what `name` leads to the node in `slot`?
    fn step(&self, state: &mut State, above: u64, name: &[u8], slot: Slot) -> io::Result<u64> {
        let name = component(name)?;
        let parent = state.bindings.slot_of(above).unwrap_or(ROOT);
        let entry = self
            .inner
            .lookup(ourselves(), above.into(), &name)
            .inspect_err(|error| self.name_not_resolved(state, (parent, name.to_bytes()), slot, error))?;
        // The domain follows from the one above by the same rule as when the guest was told.
        if identity(state.ledger.identity(parent), &entry) != state.ledger.identity(slot) {
            self.inner.forget(ourselves(), entry.inode.into(), 1);
            self.name_leads_elsewhere(state, (parent, name.to_bytes()), slot);
            return Err(error(libc::ESTALE));
        }
        state.bindings.bind(slot, entry.inode);
        Ok(entry.inode)
    }

    /// Tells the guest of an entry: from now on it holds the node once more. `cause`: what it means if the guest held
    /// another node by that name.
    pub(super) fn tell(
        &self,
        state: &mut State,
        parent: Slot,
        name: &[u8],
        mut entry: Entry,
        cause: Cause,
    ) -> io::Result<Entry> {
        let (slot, displaced) = self.recognise(state, parent, name, &entry).inspect_err(|_| {
            self.inner.forget(ourselves(), entry.inode.into(), 1);
        })?;
        if let Some(told) = displaced {
            self.name_is_stale(state, (parent, name), told, cause);
        }
        let id = state.ledger.id(slot);
        (entry.inode, entry.generation) = (id, id >> 32);
        entry.attr = self.outward(entry.attr);
        Ok(entry)
    }

    /// Which of the guest's nodes an entry is, the truth being the library's own number; a new one if it is none.
    /// Also the node that the guest held by that name, where that is another one.
    fn recognise(
        &self,
        state: &mut State,
        parent: Slot,
        name: &[u8],
        entry: &Entry,
    ) -> io::Result<(Slot, Option<Slot>)> {
        let full = |Full| error(libc::ENFILE);
        if let Some(slot) = state.bindings.slot_of(entry.inode) {
            state.bindings.count_extra(slot);
            return state.ledger.tell(parent, name, slot).map(|displaced| (slot, displaced)).map_err(full);
        }
        match self.bind_look_alike(state, parent, name, entry) {
            Some(slot) => state.ledger.tell(parent, name, slot).map(|displaced| (slot, displaced)).map_err(full),
            None => {
                let identity = identity(state.ledger.identity(parent), entry);
                let (slot, displaced) = state.ledger.tell_new(parent, name, identity).map_err(full)?;
                self.settle(state);
                state.bindings.bind(slot, entry.inode);
                Ok((slot, displaced))
            }
        }
    }

    /// An entry whose number is new to this engine may be a node that an earlier engine told the guest of.
    fn bind_look_alike(&self, state: &mut State, parent: Slot, name: &[u8], entry: &Entry) -> Option<Slot> {
        let identity = identity(state.ledger.identity(parent), entry);
        let same_name = state.ledger.find(parent, name);
        if let Some(slot) = same_name.filter(|slot| {
            *slot != ROOT && state.bindings.target(*slot).is_none() && state.ledger.identity(*slot) == identity
        }) {
            state.bindings.bind(slot, entry.inode);
            return Some(slot);
        }
        for slot in state.ledger.look_alikes(identity).into_iter().filter(|slot| *slot != ROOT) {
            match self.target(state, slot) {
                // By its own names it leads to the same number: it is bound to that now, and the library has counted
                // one reference for that and one for the entry.
                Ok(Target::Library(inode)) if inode == entry.inode => {
                    state.bindings.count_extra(slot);
                    return Some(slot);
                }
                // As long as the file is open its number is nobody else's: a name leads to it again.
                Ok(Target::Adopted(file)) if is_open_as(&file, entry) => {
                    state.bindings.bind(slot, entry.inode);
                    return Some(slot);
                }
                _ => {}
            }
        }
        None
    }

    /// Nodes have ended: the library's references go back to it, before their slots mean other nodes.
    pub(super) fn settle(&self, state: &mut State) {
        for slot in state.ledger.take_ended() {
            if let Some((inode, references)) = state.bindings.unbind(slot) {
                self.inner.forget(ourselves(), inode.into(), references);
            }
        }
    }

    /// Attributes as the guest is to see them. Mount points are always announced to this layer, which tells file
    /// systems apart by them; the guest sees them only where that was agreed.
    pub(super) fn outward(&self, mut attr: virtiofsd::fuse::Attr) -> virtiofsd::fuse::Attr {
        if !self.submounts_agreed.load(std::sync::atomic::Ordering::Relaxed) {
            attr.flags &= !ATTR_SUBMOUNT;
        }
        attr
    }
}

/// What an entry of the library's is known by, below a node of this identity.
pub(super) fn identity(above: Identity, entry: &Entry) -> Identity {
    let mount = entry.attr.flags & ATTR_SUBMOUNT != 0;
    let domain = if mount { below_mount(above.domain, entry.attr.ino) } else { above.domain };
    Identity { ino: entry.attr.ino, domain }
}

/// Can a node of this identity stand below one of that? Not if the guest was told of it under another root.
pub(super) fn belongs_below(above: Identity, node: Identity) -> bool {
    node.domain == above.domain || node.domain == below_mount(above.domain, node.ino)
}

fn is_open_as(file: &AdoptedFile, entry: &Entry) -> bool {
    file.file().metadata().is_ok_and(|found| found.ino() == entry.attr.ino && found.nlink() > 0)
}

/// Errors that say: this name does not lead to it (any more). Others say nothing about the node.
pub(super) fn names_nothing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ESTALE | libc::ELOOP))
}

/// The names in a ledger were checked when they were written, by whichever engine wrote them.
pub(super) fn component(name: &[u8]) -> io::Result<CString> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(error(libc::ESTALE));
    }
    CString::new(name).map_err(|_| error(libc::ESTALE))
}

/// The domain below a mount point.
fn below_mount(above: u32, ino: u64) -> u32 {
    let mixed = (ino ^ (u64::from(above) << 32)).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_from_a_ledger_is_one_component_or_nothing() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/etc", b"a\0b"] {
            assert_eq!(component(bad).unwrap_err().raw_os_error(), Some(libc::ESTALE), "{bad:?}");
        }
        assert_eq!(component(b"\xff").unwrap().to_bytes(), b"\xff");
    }

    #[test]
    fn what_was_told_under_another_root_belongs_nowhere() {
        let (root, node) = (Identity { ino: 1, domain: 7 }, Identity { ino: 12, domain: 7 });
        assert!(belongs_below(root, node));
        assert!(belongs_below(root, Identity { domain: below_mount(7, 12), ..node }), "a mount point");
        assert!(!belongs_below(root, Identity { domain: below_mount(7, 13), ..node }));
        assert!(!belongs_below(Identity { domain: 8, ..root }, node));
    }

    #[test]
    fn domains_differ_by_mount_point_and_by_what_is_above() {
        assert_ne!(below_mount(0, 2), 0);
        assert_ne!(below_mount(0, 2), below_mount(0, 3));
        assert_ne!(below_mount(0, 2), below_mount(below_mount(0, 2), 2));
    }
}
