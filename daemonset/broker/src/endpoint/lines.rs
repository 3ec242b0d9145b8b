//! Bounds the log lines that VMMs cause at one endpoint.

use std::time::{Duration, Instant};

use crate::rate::LineRate;

/// Rejections of an endpoint that are logged at once, and the interval after which one more is.
const REJECTION_BURST: u32 = 10;
const REJECTION_INTERVAL: Duration = Duration::from_secs(1);

/// Connections of an endpoint whose lines are logged from their beginning at once, and the interval after which those of one
/// more are. The lines of others are logged once a guest is served.
const SESSION_LINES_BURST: u32 = 64;
const SESSION_LINES_INTERVAL: Duration = Duration::from_secs(1);

/// The log lines of one endpoint.
#[derive(Debug)]
pub(super) struct Lines {
    endpoint: String,
    rejections: LineRate,
    sessions: LineRate,
}

impl Lines {
    pub(super) fn new(endpoint: &str) -> Self {
        Lines {
            endpoint: endpoint.into(),
            rejections: LineRate::new(REJECTION_BURST, REJECTION_INTERVAL),
            sessions: LineRate::new(SESSION_LINES_BURST, SESSION_LINES_INTERVAL),
        }
    }

    /// Logs that a connection is rejected.
    pub(super) fn rejection(&mut self, reason: &str) {
        if let Some(dropped) = self.rejections.pass(Instant::now()) {
            tracing::warn!(endpoint = self.endpoint, reason, dropped, "connection rejected");
        }
    }

    /// True if the lines of another connection are not to be logged.
    pub(super) fn session(&mut self) -> bool {
        match self.sessions.pass(Instant::now()) {
            Some(0) => false,
            Some(dropped) => {
                tracing::info!(endpoint = self.endpoint, dropped, "more connections than are logged");
                false
            }
            None => true,
        }
    }
}
