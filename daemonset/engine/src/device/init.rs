//! Replay of the guest's FUSE_INIT for an engine that the guest has not mounted with.
//!
//! Client and server negotiate once, at mount. The ledger keeps request and reply, and a new engine answers the request
//! again. If its reply differs from the one that the guest received, its configuration cannot serve this mount. The
//! request is always answered in memory of the engine's own: the guest could change a reply in its memory before it is
//! recorded, and then no engine could give the same reply.

use std::io;

use thiserror::Error;
use virtiofsd::filesystem::FileSystem;

use super::Device;
use super::request::{Reply, Request};
use super::scratch::{MAX_BYTES, Scratch};

/// Why an engine cannot serve a mount.
#[derive(Debug, Error)]
pub(crate) enum ReplayError {
    /// Its reply differs.
    #[error("its reply to the guest's FUSE_INIT would differ")]
    Differs,
    /// The scratch memory could not be created.
    #[error("scratch memory: {0}")]
    Scratch(io::Error),
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// Answers the guest's FUSE_INIT and records request and reply.
    pub(super) fn answer_init(&self, request: &Request<'_>) -> Reply {
        let sent = request.sent(MAX_BYTES);
        let (reply, bytes) = match self.answer_alone(&sent) {
            Ok(answered) => answered,
            Err(error) => {
                tracing::error!("the guest cannot mount: {error}");
                return request.refuse();
            }
        };
        if reply.fault.is_some() {
            return request.refuse();
        }
        if reply.errno == 0 {
            self.shared.record_init(&sent, &bytes);
            *self.init_request.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(sent);
        }
        request.reply(&bytes, reply)
    }

    /// Has this engine answer the FUSE_INIT that the guest sent to an earlier one, if it has not done so yet.
    pub(crate) fn replay_init(&self) -> Result<(), ReplayError> {
        let Some((sent, agreed)) = self.shared.init() else { return Ok(()) };
        let mut init_request = self.init_request.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if init_request.as_ref() == Some(&sent) {
            return Ok(());
        }
        self.shared.set_replaying_init(true);
        let answered = self.answer_alone(&sent);
        self.shared.set_replaying_init(false);
        *init_request = Some(sent);
        if answered?.1 == agreed { Ok(()) } else { Err(ReplayError::Differs) }
    }

    /// Has a request answered in memory that the guest cannot access.
    fn answer_alone(&self, sent: &[u8]) -> Result<(Reply, Vec<u8>), ReplayError> {
        let scratch = Scratch::new().map_err(ReplayError::Scratch)?;
        let chain = scratch.queue(sent).map_err(ReplayError::Scratch)?;
        let mut request = Request::new(scratch.memory(), scratch.table(), chain);
        let reply = request.answer(&self.server, &scratch);
        let bytes = request.replied_bytes(reply.bytes as usize);
        Ok((reply, bytes))
    }
}
