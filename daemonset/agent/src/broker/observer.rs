//! Reads the broker's status, one reader at a time: a later status must not be added before an earlier one, or counts would
//! seem to go backwards and be added twice. The broker stores the counts of earlier brokers for the next agent.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_client::totals::{RunningTotals, ShareTotals};
use virtiofs_contract::control::Status;

/// Prefix of the keys under which the broker stores the counts of earlier brokers.
const PREFIX: &str = "agent/totals/";

/// Reads the status, and sums its counts over brokers.
#[derive(Debug)]
pub(crate) struct Observer {
    socket: PathBuf,
    /// Locked while a status is being read.
    totals: Arc<Mutex<RunningTotals>>,
}

/// A status with the counts at the same moment.
#[derive(Debug)]
pub(crate) struct Observation {
    /// The broker's status, or why it could not be read.
    pub(crate) status: Result<Status, ClientError>,
    /// Counts by share, summed over brokers.
    pub(crate) totals: BTreeMap<String, ShareTotals>,
}

impl Observer {
    /// An observer of the broker behind this control socket.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Observer { socket, totals: Arc::default() }
    }

    /// Reads the status.
    pub(crate) async fn observe(&self) -> Observation {
        let mut totals = self.totals.clone().lock_owned().await;
        let socket = self.socket.clone();
        let observed = spawn_blocking(move || {
            let status = observe(&socket, &mut totals);
            Observation { status, totals: totals.all() }
        });
        observed.await.unwrap_or_else(|_| {
            // Only a runtime that is shutting down drops a running task.
            Observation { status: Err(ClientError::Unexpected), totals: BTreeMap::new() }
        })
    }
}

fn observe(socket: &Path, totals: &mut RunningTotals) -> Result<Status, ClientError> {
    let mut client = Client::connect(socket)?;
    if !totals.is_loaded() {
        let mut stored = Vec::new();
        for key in client.list_keys(PREFIX)? {
            stored.extend(client.get(&key)?.map(|value| (key[PREFIX.len()..].to_owned(), value)));
        }
        totals.load(stored);
    }
    let status = client.status()?;
    totals.observe(&status);
    for (share, value) in totals.to_store(status.instance) {
        match client.put(&format!("{PREFIX}{share}"), Some(value)) {
            Ok(()) => totals.note_stored(&share, status.instance),
            Err(error) => tracing::debug!(share, %error, "counts of earlier brokers not stored yet"),
        }
    }
    Ok(status)
}
