//! Accepts connections at an endpoint's socket, at a bounded rate.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use virtiofs_contract::control::Rejection;

use super::{Endpoint, Inner, RejectReason};
use crate::channel::Receiver;
use crate::disposal::Foreign;
use crate::poll::{Interest, wait_readable};
use crate::rate::Allowance;

/// Connections that a socket accepts at once: half of what it can have. After that, one more in each interval; the others wait
/// in its backlog. A VMM that connects in a loop starts an engine each time.
const ACCEPT_BURST: u32 = 128;
const ACCEPT_INTERVAL: Duration = Duration::from_millis(20);

/// Pause if no connection can be accepted (no descriptors left).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

impl Endpoint {
    pub(super) fn accept_until(self: &Arc<Self>, listener: &UnixListener, stopped: &Receiver<()>) {
        let mut rate = Allowance::new(ACCEPT_BURST, ACCEPT_INTERVAL, Instant::now());
        let mut paused_until = None;
        loop {
            let interests = [Interest::of(stopped), Interest::maybe(paused_until.is_none().then_some(listener))];
            match wait_readable(&interests, paused_until) {
                Ok([true, _]) => return,
                Ok([false, true]) => {
                    self.accept_one(listener);
                    paused_until = (!rate.take(Instant::now())).then(|| rate.next_at());
                }
                Ok([false, false]) => paused_until = None,
                Err(error) => tracing::error!(%error, "poll"),
            }
        }
    }

    fn accept_one(self: &Arc<Self>, listener: &UnixListener) {
        match listener.accept() {
            Ok((stream, _)) => self.handle_connection(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(endpoint = self.inner().spec.name, %error, "connection not accepted");
                thread::sleep(ACCEPT_AGAIN);
            }
        }
    }

    fn handle_connection(self: &Arc<Self>, stream: UnixStream) {
        // Keep the connection open until the rejection is counted, so that the VMM sees it only afterwards. Descriptors may
        // wait in it already.
        let _open = stream.try_clone().map(|stream| Foreign::new(stream.into(), self.account.clone()));
        if let Err(reason) = self.open_session(stream) {
            let mut inner = self.inner();
            inner.counts.rejected_exclusive +=
                u64::from(matches!(reason, RejectReason::Exclusive | RejectReason::ExclusiveElsewhere));
            inner.counts.rejected_connections += 1;
            inner.reject(&reason.to_string());
        }
    }
}

impl Inner {
    /// Counts a session that ends because engines cannot share its guest's memory.
    pub(super) fn reject_memory(&mut self, session: &str, reason: &str) {
        self.counts.rejected_memory += 1;
        self.reject(&format!("{session}: {reason}"));
    }

    /// Records the reason of a rejection that has been counted.
    fn reject(&mut self, reason: &str) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        self.counts.last_rejection = Some(Rejection { at, message: reason.into() });
        self.save();
        self.lines.rejection(reason);
    }
}
