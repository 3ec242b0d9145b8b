//! Histories lie with the broker: an agent keeps nothing that it cannot read back.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tokio::task::spawn_blocking;
use virtiofs_remedy::History;

use crate::broker::client::{Client, ClientError};

/// Keys of histories in the broker's store begin so; the share's name follows.
const PREFIX: &str = "remedies/";

/// Whoever keeps histories.
#[derive(Clone, Debug)]
pub(crate) struct Keeper {
    socket: PathBuf,
}

impl Keeper {
    /// The broker behind this control socket.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Keeper { socket }
    }

    /// What earlier agents have left, by share. What cannot be read (by another version, say) is left out: that
    /// share begins anew. None: the broker does not answer.
    pub(crate) async fn read(&self) -> Option<BTreeMap<String, History>> {
        let socket = self.socket.clone();
        let read = move || -> Result<_, ClientError> {
            let mut client = Client::connect(&socket)?;
            let mut histories = BTreeMap::new();
            for key in client.list_keys(PREFIX)? {
                let share = key.strip_prefix(PREFIX).unwrap_or(&key).to_owned();
                let Some(text) = client.get(&key)? else { continue };
                match serde_json::from_str(&text) {
                    Ok(history) => _ = histories.insert(share, history),
                    Err(error) => tracing::warn!(share, %error, "what was done about staleness before is not known"),
                }
            }
            Ok(histories)
        };
        match spawn_blocking(read).await {
            Ok(Ok(histories)) => Some(histories),
            Ok(Err(error)) => {
                tracing::debug!(%error, "histories cannot be read");
                None
            }
            Err(_) => None,
        }
    }

    /// Keeps these, or forgets them.
    pub(crate) async fn write(&self, histories: Vec<(String, Option<History>)>) {
        let socket = self.socket.clone();
        let write = move || -> Result<(), ClientError> {
            let mut client = Client::connect(&socket)?;
            for (share, history) in histories {
                // Plain data, which always can be written down.
                let text = history.and_then(|history| serde_json::to_string(&history).ok());
                client.put(&format!("{PREFIX}{share}"), text)?;
            }
            Ok(())
        };
        if let Ok(Err(error)) = spawn_blocking(write).await {
            tracing::debug!(%error, "histories cannot be kept");
        }
    }
}
