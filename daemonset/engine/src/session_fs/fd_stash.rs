//! The fd stash: open files that the broker keeps for the next engine.
//!
//! An unlinked file lives as long as a process has it open. An engine that dies would be the last one, so before the
//! guest unlinks or renames over a file it has open, the broker receives a duplicate of the descriptor.

use std::fs::File;
use std::os::fd::AsFd;

use rustc_hash::FxHashSet;
use virtiofs_contract::channel::{ChannelError, PacketChannel};
use virtiofs_contract::engine::{StashReply, StashRequest};

/// The engine's end of the stash's channel. It belongs to the locked state, so there is one request at a time.
pub(crate) struct FdStash {
    channel: PacketChannel,
    /// Number of the last request.
    last_request: u64,
    /// Handles that this engine has stashed, or found in the stash.
    stashed: FxHashSet<u64>,
    /// Handles that this engine has opened: no earlier one can have stashed them.
    opened_here: FxHashSet<u64>,
}

impl FdStash {
    pub(crate) fn new(channel: PacketChannel) -> Self {
        FdStash { channel, last_request: 0, stashed: FxHashSet::default(), opened_here: FxHashSet::default() }
    }

    /// This engine has opened the handle.
    pub(super) fn opened(&mut self, fh: u64) {
        self.opened_here.insert(fh);
    }

    /// Sends the file behind a handle to the broker and waits until it is stashed. If that fails, the file is lost with
    /// this engine: that is logged, and the guest's request continues.
    pub(super) fn stash(&mut self, fh: u64, file: &File) {
        if self.stashed.contains(&fh) {
            return;
        }
        match self.request(|request| StashRequest::Stash { request, handle: fh }, Some(file)) {
            Ok((StashReply::Stashed { accepted: true, .. }, _)) => drop(self.stashed.insert(fh)),
            Ok(_) => tracing::warn!(fh, "fd stash: full; the file is lost if this engine ends"),
            Err(error) => tracing::warn!(fh, "fd stash: stashing a file: {error}"),
        }
    }

    /// Fetches the file that this engine or an earlier one stashed for a handle.
    pub(super) fn fetch(&mut self, fh: u64) -> Option<File> {
        match self.request(|request| StashRequest::Fetch { request, handle: fh }, None) {
            Ok((StashReply::Fetched { found: true, .. }, Some(file))) => {
                self.stashed.insert(fh);
                Some(file)
            }
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(fh, "fd stash: fetching a file: {error}");
                None
            }
        }
    }

    /// Releases the file of a handle that the guest has closed, or never received.
    pub(super) fn release(&mut self, fh: u64) {
        if self.stashed.remove(&fh) | !self.opened_here.remove(&fh) {
            self.send(&StashRequest::Release { handle: fh });
        }
    }

    /// Releases all files: the guest holds nothing any more.
    pub(super) fn release_all(&mut self) {
        self.stashed.clear();
        self.opened_here.clear();
        self.send(&StashRequest::ReleaseAll);
    }

    fn send(&self, message: &StashRequest) {
        if let Err(error) = self.channel.send(message, &[]) {
            tracing::warn!("fd stash: releasing files: {error}");
        }
    }

    fn request(
        &mut self,
        message: impl FnOnce(u64) -> StashRequest,
        file: Option<&File>,
    ) -> Result<(StashReply, Option<File>), ChannelError> {
        self.last_request += 1;
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        self.channel.send(&message(self.last_request), &fds)?;
        loop {
            let (reply, fds) = self.channel.receive::<StashReply>()?;
            // Another number: a restarted broker has answered an earlier request again.
            if reply.request() == self.last_request {
                return Ok((reply, fds.into_iter().next().map(File::from)));
            }
        }
    }
}
