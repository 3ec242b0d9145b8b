//! The last known exports, in a file in the runtime directory: an agent that starts while the API server is unreachable
//! continues with them. The file is lost at a reboot, as is the broker's state.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use virtiofs_crds::VirtiofsExport;

/// Name of the file in the runtime directory.
const FILE: &str = "exports.json";

/// Content of the file.
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
    /// The file in this runtime directory. Content of another node is ignored.
    pub(crate) fn of(runtime_dir: &Path, node: &str) -> Self {
        LastGood { path: runtime_dir.join(FILE), node: node.to_owned() }
    }

    /// The last known exports; empty if there is no valid file.
    pub(crate) fn read(&self) -> Vec<VirtiofsExport> {
        let content = fs::read(&self.path).ok().and_then(|text| serde_json::from_slice::<Content>(&text).ok());
        content.filter(|content| content.node == self.node).map(|content| content.exports).unwrap_or_default()
    }

    /// Replaces the file atomically. Status is left out: it is made again.
    ///
    /// # Errors
    /// The file cannot be written.
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
    fn exports_are_read_back_by_an_agent_of_the_same_node() {
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
