//! Operations that make, move and remove names: looked at before they are done, recognised when done again.

use std::ffi::CStr;
use std::io;

use virtiofs_contract::staleness::Cause;
use virtiofsd::filesystem::{Entry, Extensions, FileSystem, SecContext, SetxattrFlags};

use crate::ledger::{Before, Slot};

use super::replay::{self, Now};
use super::state::State;
use super::{Tracked, errno, no_room, ourselves};

/// A name below a directory: the guest's node, the library's number, the name.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) slot: Slot,
    pub(super) inode: u64,
    pub(super) name: &'a CStr,
}

impl<F: FileSystem> Tracked<F> {
    pub(super) fn place<'a>(&self, state: &mut State, parent: u64, name: &'a CStr) -> io::Result<Place<'a>> {
        let slot = self.slot(state, parent)?;
        Ok(Place { slot, inode: self.inode(state, slot)?, name })
    }

    /// The inode number that a name leads to; 0: none.
    fn number_at(&self, place: Place<'_>) -> u64 {
        match self.inner.lookup(ourselves(), place.inode.into(), place.name) {
            Ok(entry) => {
                self.inner.forget(ourselves(), entry.inode.into(), 1);
                entry.attr.ino
            }
            Err(_) => 0,
        }
    }

    /// The same, from what the guest was told; asked of the host only where it was told nothing.
    fn number_known(&self, state: &State, place: Place<'_>) -> u64 {
        match state.ledger.find(place.slot, place.name.to_bytes()) {
            Some(slot) => state.ledger.identity(slot).ino,
            None => self.number_at(place),
        }
    }

    /// A name was looked up: if it does not lead any more to what the guest has open by it, others have moved or
    /// removed that.
    pub(super) fn park_displaced(&self, state: &mut State, place: Place<'_>, found: &io::Result<Entry>) {
        let Some(told) = state.ledger.find(place.slot, place.name.to_bytes()) else { return };
        let now = found.as_ref().ok().and_then(|entry| state.bindings.slot_of(entry.inode));
        if now != Some(told) {
            self.park_removed(state, told);
        }
    }

    /// unlink and rmdir.
    pub(super) fn take_away(
        &self,
        state: &mut State,
        place: Place<'_>,
        act: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let (before, again) =
            self.before(state, |state| Before { existed: self.number_known(state, place) != 0, ..Before::default() });
        let victim = state.ledger.find(place.slot, place.name.to_bytes());
        self.park_last(state, victim);
        state.changes += 1;
        match act() {
            Err(error) if again && replay::removed(&before, errno(&error)) => {}
            other => other?,
        }
        state.ledger.remove(place.slot, place.name.to_bytes());
        victim.inspect(|victim| state.bindings.set_unlinked(*victim));
        self.settle(state);
        Ok(())
    }

    /// mkdir, mknod, symlink: `act` makes the name.
    pub(super) fn make(
        &self,
        state: &mut State,
        place: Place<'_>,
        extensions: Extensions,
        act: impl FnOnce(Extensions) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let (before, again) = self.before_making(state, place)?;
        state.changes += 1;
        let label = extensions.secctx.clone().filter(|_| again);
        let entry = match act(extensions) {
            Err(error) if again => self.made_before(place, &before, error)?,
            other => other?,
        };
        self.label_again(&before, label, entry.inode)?;
        // What the guest held by that name was gone already, or the name could not have been made.
        self.tell(state, place.slot, place.name.to_bytes(), entry, Cause::SourceRemoved)
    }

    /// Did the name exist, and may it have been made already? That is asked of the host, and not of what the guest
    /// was told, nor of any clock: that of the file's times may be another one, or a coarse one.
    ///
    /// # Errors
    /// `ENFILE` if it did not and there is no room to tell the guest of it: then nothing is made.
    pub(super) fn before_making(&self, state: &mut State, place: Place<'_>) -> io::Result<(Before, bool)> {
        let (before, again) =
            self.before(state, |_| Before { existed: self.number_at(place) != 0, ..Before::default() });
        if !again && !before.existed {
            let room = state.ledger.room_for_node();
            room.and_then(|()| state.ledger.room_for_name(place.name.to_bytes().len())).map_err(no_room)?;
        }
        Ok((before, again))
    }

    /// The entry that the first run of this request made, or the error.
    pub(super) fn made_before(&self, place: Place<'_>, before: &Before, error: io::Error) -> io::Result<Entry> {
        if !replay::made(before, errno(&error)) {
            return Err(error);
        }
        self.inner.lookup(ourselves(), place.inode.into(), place.name)
    }

    /// The first run may have made a file and not come as far as its security label.
    pub(super) fn label_again(&self, before: &Before, label: Option<SecContext>, inode: u64) -> io::Result<()> {
        let Some(SecContext { name, secctx }) = label.filter(|_| !before.existed) else { return Ok(()) };
        let labelled = self.inner.setxattr(ourselves(), inode.into(), &name, &secctx, 0, SetxattrFlags::empty());
        labelled.inspect_err(|_| self.inner.forget(ourselves(), inode.into(), 1))
    }

    pub(super) fn move_name(&self, state: &mut State, from: Place<'_>, to: Place<'_>, flags: u32) -> io::Result<()> {
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let (before, again) = self.before(state, |state| Before {
            first: self.number_known(state, from),
            second: self.number_known(state, to),
            ..Before::default()
        });
        state.changes += 1;
        let now = || Now { from: self.number_at(from), to: self.number_at(to) };
        let done = again && replay::renamed(&before, now(), exchange);
        let victim = state.ledger.find(to.slot, to.name.to_bytes()).filter(|_| !exchange);
        if !done {
            self.park_last(state, victim);
            let (old, new) = (from.inode.into(), to.inode.into());
            self.inner.rename(ourselves(), old, from.name, new, to.name, flags)?;
        }
        let told = state.ledger.find(to.slot, to.name.to_bytes()).map(|slot| state.ledger.identity(slot).ino);
        // The first run may have come as far as the ledger.
        if !(done && told == Some(before.first)) {
            let (old, new) = (from.name.to_bytes(), to.name.to_bytes());
            state.ledger.rename((from.slot, old), (to.slot, new), exchange);
            victim.inspect(|victim| state.bindings.set_unlinked(*victim));
            self.settle(state);
        }
        Ok(())
    }

    pub(super) fn link_name(&self, state: &mut State, inode: u64, place: Place<'_>) -> io::Result<Entry> {
        let (before, again) =
            self.before(state, |_| Before { existed: self.number_at(place) != 0, ..Before::default() });
        if !again {
            state.ledger.room_for_name(place.name.to_bytes().len()).map_err(no_room)?;
        }
        state.changes += 1;
        let entry = match self.inner.link(ourselves(), inode.into(), place.inode.into(), place.name) {
            Err(error) if again && errno(&error) == libc::EEXIST && !before.existed => {
                let entry = self.inner.lookup(ourselves(), place.inode.into(), place.name)?;
                if entry.inode != inode {
                    self.inner.forget(ourselves(), entry.inode.into(), 1);
                    return Err(error);
                }
                entry
            }
            other => other?,
        };
        self.tell(state, place.slot, place.name.to_bytes(), entry, Cause::SourceRemoved)
    }
}
