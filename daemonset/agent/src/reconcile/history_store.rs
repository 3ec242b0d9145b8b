//! The broker stores the histories of remedies, so that they outlive the agent.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tokio::task::spawn_blocking;
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_remedy::History;

/// Prefix of the keys in the broker's store; the share's name follows.
const PREFIX: &str = "remedies/";

/// The store of histories.
#[derive(Clone, Debug)]
pub(super) struct HistoryStore {
    socket: PathBuf,
}

impl HistoryStore {
    /// The store of the broker behind this control socket.
    pub(super) fn new(socket: PathBuf) -> Self {
        HistoryStore { socket }
    }

    /// The histories that earlier agents stored, by share. A history that cannot be parsed, such as one of another version,
    /// is left out: that share starts without history. `None` if the broker does not answer.
    pub(super) async fn read(&self) -> Option<BTreeMap<String, History>> {
        let socket = self.socket.clone();
        let read = move || -> Result<_, ClientError> {
            let mut client = Client::connect(&socket)?;
            let mut histories = BTreeMap::new();
            for key in client.list_keys(PREFIX)? {
                let share = key.strip_prefix(PREFIX).unwrap_or(&key).to_owned();
                let Some(text) = client.get(&key)? else { continue };
                match serde_json::from_str(&text) {
                    Ok(history) => _ = histories.insert(share, history),
                    Err(error) => tracing::warn!(share, %error, "invalid history of remedies; starting without it"),
                }
            }
            Ok(histories)
        };
        match spawn_blocking(read).await {
            Ok(Ok(histories)) => Some(histories),
            Ok(Err(error)) => {
                tracing::debug!(%error, "histories not read");
                None
            }
            Err(_) => None,
        }
    }

    /// Stores histories, or removes them.
    pub(super) async fn write(&self, histories: Vec<(String, Option<History>)>) {
        let socket = self.socket.clone();
        let write = move || -> Result<(), ClientError> {
            let mut client = Client::connect(&socket)?;
            for (share, history) in histories {
                // Serializing plain data cannot fail.
                let text = history.and_then(|history| serde_json::to_string(&history).ok());
                client.put(&format!("{PREFIX}{share}"), text)?;
            }
            Ok(())
        };
        if let Ok(Err(error)) = spawn_blocking(write).await {
            tracing::debug!(%error, "histories not stored");
        }
    }
}
