//! Open files in the broker's keeping.
//!
//! An unlinked file lives as long as somebody has it open. An engine that dies would be the last, so before the
//! guest unlinks or renames over what it has open, the broker takes a duplicate of the descriptor.

use std::fs::File;
use std::os::fd::AsFd;

use rustc_hash::FxHashSet;
use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::engine::{StashReply, StashRequest};

/// The engine's end of the parking channel. One question at a time, from the thread that serves the rings.
pub(crate) struct Parking {
    channel: PacketChannel,
    /// Handles that this engine has parked or found parked.
    known: FxHashSet<u64>,
    /// Handles that the guest has from this engine: no earlier one can have parked them.
    entered: FxHashSet<u64>,
}

impl Parking {
    pub(crate) fn new(channel: PacketChannel) -> Self {
        Parking { channel, known: FxHashSet::default(), entered: FxHashSet::default() }
    }

    /// The guest has got this handle from this engine.
    pub(super) fn entered(&mut self, fh: u64) {
        self.entered.insert(fh);
    }

    /// Parks the file behind a guest's handle and waits until it is there. Refused or failed: the handle goes
    /// unprotected, which is said, and the guest's call goes on.
    pub(super) fn park(&mut self, fh: u64, file: &File) {
        if self.known.contains(&fh) {
            return;
        }
        match self.ask(&StashRequest::Stash { handle: fh }, Some(file)) {
            Ok((StashReply::Stashed { accepted: true }, _)) => drop(self.known.insert(fh)),
            Ok(_) => tracing::warn!("the broker keeps no more files for this session: one goes unprotected"),
            Err(error) => tracing::warn!("parking: {error}"),
        }
    }

    /// The file that was parked for a guest's handle, by this engine or an earlier one.
    pub(super) fn fetch(&mut self, fh: u64) -> Option<File> {
        match self.ask(&StashRequest::Fetch { handle: fh }, None) {
            Ok((StashReply::Fetched { found: true }, Some(file))) => {
                self.known.insert(fh);
                Some(file)
            }
            Ok(_) => None,
            Err(error) => {
                tracing::warn!("parking: {error}");
                None
            }
        }
    }

    /// The guest has closed the handle, or has never got it.
    pub(super) fn release(&mut self, fh: u64) {
        if self.known.remove(&fh) | !self.entered.remove(&fh) {
            self.tell(&StashRequest::Release { handle: fh });
        }
    }

    /// The guest has let go of everything.
    pub(super) fn release_all(&mut self) {
        self.known.clear();
        self.entered.clear();
        self.tell(&StashRequest::ReleaseAll);
    }

    fn tell(&self, message: &StashRequest) {
        if let Err(error) = self.channel.send(message, &[]) {
            tracing::warn!("parking: {error}");
        }
    }

    fn ask(&self, question: &StashRequest, file: Option<&File>) -> Result<(StashReply, Option<File>), ChannelError> {
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        self.channel.send(question, &fds)?;
        let (answer, fds) = self.channel.receive()?;
        Ok((answer, fds.into_iter().next().map(File::from)))
    }
}
