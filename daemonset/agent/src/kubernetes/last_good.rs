//! The exports that were known last, in a file beside the broker's socket: an agent that starts while the API server is
//! away goes on with them. The file goes where the broker's state goes, at the next boot.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use virtiofs_crds::VirtiofsExport;

/// Name of the file in the runtime directory.
const FILE: &str = "exports.json";

/// What the file holds.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    node: String,
    exports: Vec<VirtiofsExport>,
}

/// The file.
#[derive(Clone, Debug)]
pub(crate) struct LastGood {
    path: PathBuf,
    node: String,
}

impl LastGood {
    /// The file in this runtime directory; what it says of another node is not believed.
    pub(crate) fn of(runtime_dir: &Path, node: &str) -> Self {
        LastGood { path: runtime_dir.join(FILE), node: node.to_owned() }
    }

    /// What was known last; nothing where nothing was, or nothing that can be understood.
    pub(crate) fn read(&self) -> Vec<VirtiofsExport> {
        let content = fs::read(&self.path).ok().and_then(|text| serde_json::from_slice::<Content>(&text).ok());
        content.filter(|content| content.node == self.node).map(|content| content.exports).unwrap_or_default()
    }

    /// Remembers what is known now, as a whole or not at all. A status is not remembered: it is made anew.
    pub(crate) fn write<'a>(&self, exports: impl Iterator<Item = &'a VirtiofsExport>) -> io::Result<()> {
        let bare = |export: &VirtiofsExport| VirtiofsExport { status: None, ..export.clone() };
        let content = Content { node: self.node.clone(), exports: exports.map(bare).collect() };
        let new = self.path.with_extension("json.new");
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(&content)?)?;
        fs::rename(new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::exports::tests::export;
    use super::*;

    #[test]
    fn what_is_remembered_is_read_back_by_the_agent_of_that_node() {
        let folder = tempfile::tempdir().unwrap();
        let file = LastGood::of(folder.path(), "n1");
        assert_eq!(file.read(), []);
        let known = export("a", json!({}));
        file.write([&known].into_iter()).unwrap();
        assert_eq!(file.read(), [known]);
        assert_eq!(LastGood::of(folder.path(), "n2").read(), []);
        fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(file.read(), []);
    }
}
