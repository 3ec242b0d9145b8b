//! What must outlive the agent: the last good version of each share, which the broker keeps for it, opaque. An agent
//! that starts anew beside a document that has turned bad goes on with what its predecessor had accepted.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtiofs_crds::{Document, Origin, Share};

use crate::broker::client::{Client, ClientError};

/// What the broker's keys begin with.
const PREFIX: &str = "agent/last-good/";

/// The broker as a memory.
#[derive(Debug)]
pub(super) struct Memory {
    socket: PathBuf,
    /// Has it been asked what an earlier agent knew?
    recalled: bool,
    /// What it keeps, by name of the share, and which broker that is.
    kept: BTreeMap<String, String>,
    broker: u32,
}

/// One share as it is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    file: PathBuf,
    document: usize,
    object: Value,
}

impl Memory {
    /// The broker behind this control socket.
    pub(super) fn at(socket: PathBuf) -> Self {
        Memory { socket, recalled: false, kept: BTreeMap::new(), broker: 0 }
    }

    /// Is all known that an earlier agent knew?
    pub(super) fn is_recalled(&self) -> bool {
        self.recalled
    }

    /// What an earlier agent had accepted; none: no broker can be asked yet.
    pub(super) fn recall(&mut self) -> Option<Vec<Document>> {
        match self.ask() {
            Ok(documents) => {
                self.recalled = true;
                Some(documents)
            }
            Err(error) => {
                tracing::debug!(%error, "what an earlier agent knew cannot be asked yet");
                None
            }
        }
    }

    fn ask(&mut self) -> Result<Vec<Document>, ClientError> {
        let mut client = Client::connect(&self.socket)?;
        let mut documents = Vec::new();
        self.broker = client.broker_pid();
        for key in client.list_keys(PREFIX)? {
            if let (Some(name), Some(value)) = (key.strip_prefix(PREFIX), client.get(&key)?) {
                documents.extend(parse(&value));
                self.kept.insert(name.to_owned(), value);
            }
        }
        Ok(documents)
    }

    /// Has the broker keep these and nothing else; another broker than before is told everything. What cannot be
    /// told now is told at the next occasion. Is all kept?
    pub(super) fn keep(&mut self, documents: &BTreeMap<String, Document>) -> bool {
        let kept = Client::connect(&self.socket).and_then(|mut client| self.tell(&mut client, documents));
        kept.inspect_err(|error| tracing::debug!(%error, "the last good versions are not kept yet")).is_ok()
    }

    fn tell(&mut self, client: &mut Client, documents: &BTreeMap<String, Document>) -> Result<(), ClientError> {
        if self.broker != client.broker_pid() {
            self.broker = client.broker_pid();
            self.kept.clear();
        }
        for (name, document) in documents {
            let Some(value) = text(document) else { continue };
            if self.kept.get(name) != Some(&value) {
                client.put(&format!("{PREFIX}{name}"), Some(value.clone()))?;
                self.kept.insert(name.clone(), value);
            }
        }
        let gone: Vec<_> = self.kept.keys().filter(|name| !documents.contains_key(*name)).cloned().collect();
        for name in gone {
            client.put(&format!("{PREFIX}{name}"), None)?;
            self.kept.remove(&name);
        }
        Ok(())
    }
}

fn text(document: &Document) -> Option<String> {
    let kept = Kept {
        file: document.origin.file.clone(),
        document: document.origin.document,
        object: serde_json::to_value(&document.object).ok()?,
    };
    serde_json::to_string(&kept).ok()
}

/// None: an agent of another version accepted what this one would not.
fn parse(text: &str) -> Option<Document> {
    let kept: Kept = serde_json::from_str(text).ok()?;
    let (object, share) = Share::from_value(&kept.object).ok()?;
    Some(Document { origin: Origin { file: kept.file, document: kept.document }, object, share })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use virtiofs_crds::read_text;

    use super::*;

    #[test]
    fn what_is_kept_is_what_was_accepted() {
        let text_of_file = "apiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\nmetadata: {name: a}\n\
                            spec: {source: {hostPath: {path: /srv/a}}, engine: {cache: Never}}\n";
        let document = read_text(Path::new("a.yaml"), text_of_file).documents.remove(0);
        let again = parse(&text(&document).unwrap()).unwrap();
        assert_eq!((again.origin, again.share), (document.origin, document.share));
        assert!(parse("{}").is_none() && parse("nonsense").is_none());
    }
}
