//! Operations that make, remove and rename names. Each observes the state before it, by which a repetition recognises
//! what the first run did.

use std::ffi::CStr;
use std::io;

use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::{Context, Entry, Extensions, FileSystem, SecContext, SetxattrFlags};
use virtiofsd::fuse::Opcode;

use crate::ledger::{OpenKind, PriorState, Slot};

use super::SessionFs;
use super::errors::{engine_context, errno, ledger_full};
use super::replay::{self, NamesNow};
use super::request::RequestContext;
use super::state::State;

/// A name below a directory.
#[derive(Clone, Copy)]
pub(super) struct NameRef<'a> {
    /// The directory, as the guest knows it.
    pub(super) parent: Slot,
    /// The directory's inode number in the library.
    pub(super) parent_inode: u64,
    pub(super) name: &'a CStr,
}

impl<'a> NameRef<'a> {
    /// The name as the ledger knows it.
    pub(super) fn key(self) -> (Slot, &'a [u8]) {
        (self.parent, self.name.to_bytes())
    }
}

impl<F: FileSystem> SessionFs<F> {
    /// `name` below the guest's node `parent`.
    pub(super) fn name_ref<'a>(
        &self,
        state: &mut State,
        request: RequestContext,
        parent: u64,
        name: &'a CStr,
    ) -> io::Result<NameRef<'a>> {
        let parent = self.slot(state, parent)?;
        // While it is open, the file handle of a removed directory can be opened. Lookups find out by themselves.
        let looks_up = [Opcode::Lookup as u32, Opcode::Readdirplus as u32].contains(&request.opcode);
        if !looks_up {
            state.directories.close_if_removed(parent);
        }
        Ok(NameRef { parent, parent_inode: self.known_inode(state, request, parent)?, name })
    }

    /// The inode number at a name, as the ledger has it; 0: there is none.
    fn inode_number_at(&self, state: &mut State, at: NameRef<'_>) -> u64 {
        match state.directories.get(at.parent).map(|directory| directory.find(at.name)) {
            // Of the directory's own file system, whose numbers the ledger has as they are.
            Some(Ok(found)) if found.stamp.is_some() => return found.stat.st_ino,
            Some(Err(_)) => return 0,
            _ => {}
        }
        match self.library.lookup(engine_context(), at.parent_inode.into(), at.name) {
            Ok(entry) => {
                self.library.forget(engine_context(), entry.inode.into(), 1);
                self.identify(state, at.key(), &entry).ino
            }
            Err(_) => 0,
        }
    }

    /// The same, from the ledger; the host is asked only where the ledger has no such name.
    fn known_inode_number(&self, state: &mut State, at: NameRef<'_>) -> u64 {
        let (parent, name) = at.key();
        match state.ledger.find(parent, name) {
            Some(slot) => state.ledger.identity(slot).ino,
            None => self.inode_number_at(state, at),
        }
    }

    /// Stashes what the guest has open by a name that was looked up and does not lead to it any more: another process has
    /// moved or removed it. `held`: the node that the guest holds by the name.
    pub(super) fn stash_displaced(&self, state: &mut State, held: Option<Slot>, found: &io::Result<Entry>) {
        let Some(known) = held else { return };
        let now = found.as_ref().ok().and_then(|entry| state.nodes.slot_of(entry.inode));
        if now != Some(known) {
            self.stash_if_removed(state, known);
        }
    }

    /// UNLINK and RMDIR of a `kind`.
    pub(super) fn remove_name(
        &self,
        state: &mut State,
        (request, ctx): (RequestContext, Context),
        at: NameRef<'_>,
        kind: OpenKind,
    ) -> io::Result<()> {
        self.use_directory(state, at.parent);
        let (prior, repeated) = self.prior_state(state, request, |state| PriorState {
            existed: self.known_inode_number(state, at) != 0,
            ..PriorState::default()
        });
        let (parent, name) = at.key();
        let victim = state.ledger.find(parent, name);
        self.stash_before_unlink(state, request, victim);
        let directory = self.record_directory(state, request, victim);
        state.name_changes.count();
        match self.remove_from_host(state, ctx, at, kind) {
            Err(error) if repeated && replay::removed(&prior, errno(&error)) => {}
            other => other.inspect_err(|_| self.directory_remains(state, directory))?,
        }
        state.ledger.remove(parent, name);
        victim.inspect(|victim| state.nodes.set_unlinked(*victim));
        self.directory_removed(state, directory);
        victim.inspect(|victim| state.directories.close(*victim));
        self.release_ended(state);
        Ok(())
    }

    /// MKDIR, MKNOD and SYMLINK: `act` makes the name.
    pub(super) fn make_name(
        &self,
        state: &mut State,
        request: RequestContext,
        at: NameRef<'_>,
        extensions: Extensions,
        act: impl FnOnce(Extensions) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let (prior, repeated) = self.prepare_make(state, request, at)?;
        state.name_changes.count();
        let label = extensions.secctx.clone().filter(|_| repeated);
        let entry = match act(extensions) {
            Err(error) if repeated => self.entry_made_before(at, &prior, error)?,
            other => other?,
        };
        self.restore_label(&prior, label, entry.inode)?;
        let held = state.ledger.find(at.parent, at.name.to_bytes());
        // What the guest held by that name was gone already, or the name could not have been made.
        self.reply_entry(state, request, (at, held), entry, Cause::SourceRemoved)
    }

    /// Observes whether the name exists, and whether it may have been made already. The host decides, not what the guest
    /// knows, and no clock: that of the file's times may be another one, or a coarse one.
    ///
    /// # Errors
    /// `ENFILE` if it does not exist and the ledger has no room for it: nothing is made then.
    pub(super) fn prepare_make(
        &self,
        state: &mut State,
        request: RequestContext,
        at: NameRef<'_>,
    ) -> io::Result<(PriorState, bool)> {
        self.use_directory(state, at.parent);
        let (prior, repeated) = self.prior_state(state, request, |state| PriorState {
            existed: self.inode_number_at(state, at) != 0,
            ..PriorState::default()
        });
        if !repeated && !prior.existed {
            let room = state.ledger.room_for_node();
            room.and_then(|()| state.ledger.room_for_name(at.name.to_bytes().len())).map_err(ledger_full)?;
        }
        Ok((prior, repeated))
    }

    /// The entry that the first run of the request made.
    ///
    /// # Errors
    /// `error`, if the first run did not make it.
    pub(super) fn entry_made_before(&self, at: NameRef<'_>, prior: &PriorState, error: io::Error) -> io::Result<Entry> {
        if !replay::made(prior, errno(&error)) {
            return Err(error);
        }
        self.library.lookup(engine_context(), at.parent_inode.into(), at.name)
    }

    /// Sets the security label again: the first run may have made the file and died before it set the label.
    pub(super) fn restore_label(&self, prior: &PriorState, label: Option<SecContext>, inode: u64) -> io::Result<()> {
        let Some(SecContext { name, secctx }) = label.filter(|_| !prior.existed) else { return Ok(()) };
        let flags = SetxattrFlags::empty();
        let labelled = self.library.setxattr(engine_context(), inode.into(), &name, &secctx, 0, flags);
        labelled.inspect_err(|_| self.library.forget(engine_context(), inode.into(), 1))
    }

    /// RENAME and RENAME2.
    pub(super) fn rename_name(
        &self,
        state: &mut State,
        request: RequestContext,
        from: NameRef<'_>,
        to: NameRef<'_>,
        flags: u32,
    ) -> io::Result<()> {
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let (prior, repeated) = self.prior_state(state, request, |state| PriorState {
            first: self.known_inode_number(state, from),
            second: self.known_inode_number(state, to),
            ..PriorState::default()
        });
        state.name_changes.count();
        let done = repeated && {
            let now = NamesNow { from: self.inode_number_at(state, from), to: self.inode_number_at(state, to) };
            replay::renamed(&prior, now, exchange)
        };
        // Of two names of one file rename(2) removes neither.
        let moved = state.ledger.find(from.parent, from.name.to_bytes());
        let victim = state.ledger.find(to.parent, to.name.to_bytes());
        // The first run may have entered it into the ledger already: then the moved file is there.
        let entered = done && victim.map(|slot| state.ledger.identity(slot).ino) == Some(prior.first);
        let victim = victim.filter(|victim| !exchange && !entered && moved != Some(*victim));
        let directory = self.record_directory(state, request, victim);
        if !done {
            self.stash_before_unlink(state, request, victim);
            let (old, new) = (from.parent_inode.into(), to.parent_inode.into());
            let renamed = self.library.rename(engine_context(), old, from.name, new, to.name, flags);
            renamed.inspect_err(|_| self.directory_remains(state, directory))?;
        }
        if !entered {
            state.ledger.rename(from.key(), to.key(), exchange);
            victim.inspect(|victim| state.nodes.set_unlinked(*victim));
            self.directory_removed(state, directory);
            victim.inspect(|victim| state.directories.close(*victim));
            self.release_ended(state);
        }
        Ok(())
    }

    /// LINK: `at` becomes a name of the library's `inode`.
    pub(super) fn link_name(
        &self,
        state: &mut State,
        request: RequestContext,
        inode: u64,
        at: NameRef<'_>,
    ) -> io::Result<Entry> {
        let (prior, repeated) = self.prior_state(state, request, |state| PriorState {
            existed: self.inode_number_at(state, at) != 0,
            ..PriorState::default()
        });
        if !repeated {
            state.ledger.room_for_name(at.name.to_bytes().len()).map_err(ledger_full)?;
        }
        state.name_changes.count();
        let entry = match self.library.link(engine_context(), inode.into(), at.parent_inode.into(), at.name) {
            Err(error) if repeated && errno(&error) == libc::EEXIST && !prior.existed => {
                let entry = self.library.lookup(engine_context(), at.parent_inode.into(), at.name)?;
                if entry.inode != inode {
                    self.library.forget(engine_context(), entry.inode.into(), 1);
                    return Err(error);
                }
                entry
            }
            other => other?,
        };
        let held = state.ledger.find(at.parent, at.name.to_bytes());
        self.reply_entry(state, request, (at, held), entry, Cause::SourceRemoved)
    }
}
