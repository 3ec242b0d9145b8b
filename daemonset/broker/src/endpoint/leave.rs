//! Leaving sessions to the next broker.

use std::sync::PoisonError;
use std::time::Duration;

use super::{Endpoint, Inner};
use crate::session::Command;

impl Endpoint {
    /// Stops accepting, and begins to leave the sessions to the next broker.
    pub(crate) fn begin_to_leave(&self) {
        let inner = self.inner();
        if let Some(listening) = &inner.listening {
            listening.stop.send(());
        }
        inner.sessions.values().for_each(|live| live.sender.send(Command::Leave));
    }

    /// Returns true if all sessions were left in time.
    pub(crate) fn wait_until_left(&self, longest: Duration) -> bool {
        let inner = self.inner();
        let waiting = |inner: &mut Inner| !inner.sessions.is_empty();
        let waited = self.session_ended.wait_timeout_while(inner, longest, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.sessions.is_empty()
    }

    pub(super) fn session_left(&self, id: &str) {
        self.host.supervisor.forget(id);
        if let Some(live) = self.inner().sessions.remove(id) {
            // The next broker has what it shares.
            std::mem::forget(live);
        }
        self.session_ended.notify_all();
    }
}
