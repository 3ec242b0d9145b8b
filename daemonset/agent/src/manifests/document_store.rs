//! The broker stores the last valid version of each share, so that a restarted agent can continue with it if its document
//! has become invalid.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_crds::{Document, Origin, Share};

/// Prefix of the keys in the broker's store.
const PREFIX: &str = "agent/last-good/";

/// The store of documents.
#[derive(Debug)]
pub(super) struct DocumentStore {
    socket: PathBuf,
    /// True once the documents of an earlier agent have been loaded.
    loaded: bool,
    /// The stored values by share, and the process id of the broker that stores them.
    stored: BTreeMap<String, String>,
    broker: u32,
}

/// One share as it is stored.
#[derive(Serialize, Deserialize)]
struct Stored {
    file: PathBuf,
    document: usize,
    object: Value,
}

impl DocumentStore {
    /// The store of the broker behind this control socket.
    pub(super) fn at(socket: PathBuf) -> Self {
        DocumentStore { socket, loaded: false, stored: BTreeMap::new(), broker: 0 }
    }

    /// True once the documents of an earlier agent have been loaded.
    pub(super) fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Loads the documents of an earlier agent; `None` if no broker answers.
    pub(super) fn load(&mut self) -> Option<Vec<Document>> {
        match self.read() {
            Ok(documents) => {
                self.loaded = true;
                Some(documents)
            }
            Err(error) => {
                tracing::debug!(%error, "documents of an earlier agent not loaded yet");
                None
            }
        }
    }

    fn read(&mut self) -> Result<Vec<Document>, ClientError> {
        let mut client = Client::connect(&self.socket)?;
        let mut documents = Vec::new();
        self.broker = client.broker_pid();
        for key in client.list_keys(PREFIX)? {
            if let (Some(name), Some(value)) = (key.strip_prefix(PREFIX), client.get(&key)?) {
                documents.extend(parse(&value));
                self.stored.insert(name.to_owned(), value);
            }
        }
        Ok(documents)
    }

    /// Stores exactly these documents; a new broker stores all of them. True if all are stored; else the next call retries.
    pub(super) fn store(&mut self, documents: &BTreeMap<String, Document>) -> bool {
        let stored = Client::connect(&self.socket).and_then(|mut client| self.write(&mut client, documents));
        stored.inspect_err(|error| tracing::debug!(%error, "documents not stored yet")).is_ok()
    }

    fn write(&mut self, client: &mut Client, documents: &BTreeMap<String, Document>) -> Result<(), ClientError> {
        if self.broker != client.broker_pid() {
            self.broker = client.broker_pid();
            self.stored.clear();
        }
        for (name, document) in documents {
            let Some(value) = text(document) else { continue };
            if self.stored.get(name) != Some(&value) {
                client.put(&format!("{PREFIX}{name}"), Some(value.clone()))?;
                self.stored.insert(name.clone(), value);
            }
        }
        let removed: Vec<_> = self.stored.keys().filter(|name| !documents.contains_key(*name)).cloned().collect();
        for name in removed {
            client.put(&format!("{PREFIX}{name}"), None)?;
            self.stored.remove(&name);
        }
        Ok(())
    }
}

fn text(document: &Document) -> Option<String> {
    let stored = Stored {
        file: document.origin.file.clone(),
        document: document.origin.document,
        object: serde_json::to_value(&document.object).ok()?,
    };
    serde_json::to_string(&stored).ok()
}

/// `None` if this version does not accept the document.
fn parse(text: &str) -> Option<Document> {
    let stored: Stored = serde_json::from_str(text).ok()?;
    let (object, share) = Share::from_value(&stored.object).ok()?;
    Some(Document { origin: Origin { file: stored.file, document: stored.document }, object, share })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use virtiofs_crds::read_text;

    use super::*;

    #[test]
    fn a_document_is_read_back() {
        let text_of_file = "apiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\nmetadata: {name: a}\n\
                            spec: {source: {hostPath: {path: /srv/a}}, engine: {cache: Never}}\n";
        let document = read_text(Path::new("a.yaml"), text_of_file).documents.remove(0);
        let again = parse(&text(&document).unwrap()).unwrap();
        assert_eq!((again.origin, again.share), (document.origin, document.share));
        assert!(parse("{}").is_none() && parse("nonsense").is_none());
    }
}
