//! The guest's FUSE_INIT, told to an engine that the guest never mounted with.
//!
//! What client and server agree on is said once, at mount. It is kept in the ledger, request and reply, and a new
//! engine hears the request again. Should it answer anything else than the guest was told, this engine's configuration
//! cannot serve this mount. Each time the request is answered in a little memory of our own: in the guest's it might be
//! changed before it is recorded, and then no engine could ever answer the same.

use std::io;

use thiserror::Error;
use virtiofsd::filesystem::FileSystem;

use super::Device;
use super::request::{Reply, Request};
use super::scratch::{MOST, Scratch};

/// Why an engine cannot take a mount over.
#[derive(Debug, Error)]
pub(crate) enum ReplayError {
    /// It would have agreed on something else.
    #[error("it would have answered the guest's FUSE_INIT differently")]
    Differs,
    /// The little memory could not be made.
    #[error("scratch memory: {0}")]
    Scratch(#[from] io::Error),
}

impl<F: FileSystem + Send + Sync + 'static> Device<F> {
    /// Answers the guest's FUSE_INIT, and notes what was agreed.
    pub(super) fn answer_init(&self, request: &Request<'_>) -> Reply {
        let sent = request.sent(MOST);
        let (reply, bytes) = match self.answer_alone(&sent) {
            Ok(answered) => answered,
            Err(error) => {
                tracing::error!("the guest cannot mount: {error}");
                return request.refuse();
            }
        };
        if reply.malformed {
            return request.refuse();
        }
        if reply.errno == 0 {
            self.core.record_init(&sent, &bytes);
            *self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(sent);
        }
        request.reply(&bytes, reply)
    }

    /// Tells this engine what the guest agreed on with an earlier one, unless it has been told.
    pub(crate) fn replay_init(&self) -> Result<(), ReplayError> {
        let Some((sent, agreed)) = self.core.init() else { return Ok(()) };
        let mut told = self.told.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if told.as_ref() == Some(&sent) {
            return Ok(());
        }
        self.core.replay_init(true);
        let answered = self.answer_alone(&sent);
        self.core.replay_init(false);
        *told = Some(sent);
        if answered?.1 == agreed { Ok(()) } else { Err(ReplayError::Differs) }
    }

    /// Has a request answered out of the guest's sight.
    fn answer_alone(&self, sent: &[u8]) -> Result<(Reply, Vec<u8>), ReplayError> {
        let scratch = Scratch::new()?;
        let request = Request::new(scratch.memory(), scratch.queue(sent)?);
        let reply = request.answer(&self.server, &scratch);
        let bytes = request.replied_bytes(reply.bytes as usize);
        Ok((reply, bytes))
    }
}
