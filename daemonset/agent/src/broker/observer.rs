//! Reads the broker's status, one reader at a time: a status that was asked for later must not be taken in
//! earlier, or counts would seem to go backwards and be added twice. What brokers before this one have counted is
//! kept by the broker, for agents after this one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use virtiofs_contract::control::Status;

use super::client::{Client, ClientError};
use super::totals::{RunningTotals, ShareTotals};

/// What the keys begin with under which the broker keeps the counts of those before it.
const PREFIX: &str = "agent/totals/";

/// Reads status, and keeps the running totals of everyone who does.
#[derive(Debug)]
pub(crate) struct Observer {
    socket: PathBuf,
    /// Locked for as long as a status is being read.
    totals: Arc<Mutex<RunningTotals>>,
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
        Observer { socket, totals: Arc::default() }
    }

    /// Asks the broker.
    pub(crate) async fn observe(&self) -> Observation {
        let mut totals = self.totals.clone().lock_owned().await;
        let socket = self.socket.clone();
        let observed = spawn_blocking(move || {
            let status = observe(&socket, &mut totals);
            Observation { status, totals: totals.all() }
        });
        observed.await.unwrap_or_else(|_| {
            // Only a runtime that is shutting down drops a task that was started.
            Observation { status: Err(ClientError::Unexpected), totals: BTreeMap::new() }
        })
    }
}

fn observe(socket: &Path, totals: &mut RunningTotals) -> Result<Status, ClientError> {
    let mut client = Client::connect(socket)?;
    if !totals.is_recalled() {
        let mut kept = Vec::new();
        for key in client.list_keys(PREFIX)? {
            kept.extend(client.get(&key)?.map(|value| (key[PREFIX.len()..].to_owned(), value)));
        }
        totals.recall(kept);
    }
    let status = client.status()?;
    totals.observe(&status);
    for (share, value) in totals.to_keep(status.pid) {
        match client.put(&format!("{PREFIX}{share}"), Some(value)) {
            Ok(()) => totals.is_kept(&share, status.pid),
            Err(error) => tracing::debug!(share, %error, "counts of earlier brokers are not kept yet"),
        }
    }
    Ok(status)
}
