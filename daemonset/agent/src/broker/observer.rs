//! Reads the broker's status, one reader at a time: a status that was asked for later must not be taken in
//! earlier, or counts would seem to go backwards and be added twice.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use virtiofs_contract::control::Status;

use super::client::{Client, ClientError};
use super::totals::{RunningTotals, ShareTotals};

/// Reads status, and keeps the running totals of everyone who does.
#[derive(Debug)]
pub(crate) struct Observer {
    socket: PathBuf,
    totals: Mutex<RunningTotals>,
}

/// What was read.
#[derive(Debug)]
pub(crate) struct Observation {
    /// The broker's status, or why there is none.
    pub(crate) status: Result<Status, ClientError>,
    /// Counts by share, over all brokers so far.
    pub(crate) totals: BTreeMap<String, ShareTotals>,
}

impl Observer {
    /// A reader of the broker behind this control socket.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Observer { socket, totals: Mutex::default() }
    }

    /// Asks the broker.
    pub(crate) async fn observe(&self) -> Observation {
        let mut totals = self.totals.lock().await;
        let socket = self.socket.clone();
        let status = match spawn_blocking(move || Client::connect(&socket)?.status()).await {
            Ok(status) => status,
            // Only a runtime that is shutting down drops a task that was started.
            Err(_) => Err(ClientError::Unexpected),
        };
        if let Ok(status) = &status {
            totals.observe(status);
        }
        Observation { status, totals: totals.all() }
    }
}
