//! `agent.json` in the runtime directory: what the agent knows and the broker does not, for `virtiofsctl status`.
//!
//! A file, not a socket: it can be read without an agent. It is replaced as a whole, so a reader never sees a part of it.
//! Whether its writer still runs is known from the lock in the same directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::report::Report;

/// Version of the file's content.
const VERSION: &str = "agent.virtiofs.dev/v1";

/// What the agent last published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Published {
    /// Version of this document.
    pub api_version: String,
    /// Process id of the agent.
    pub pid: u32,
    /// Version of the agent.
    pub version: String,
    /// Where shares are declared.
    pub shares_dir: Option<PathBuf>,
    /// State of the shares.
    pub report: Report,
}

impl Published {
    /// The report of this process.
    pub fn new(shares_dir: Option<PathBuf>, report: Report) -> Self {
        Published {
            api_version: VERSION.to_owned(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            shares_dir,
            report,
        }
    }

    /// Replaces the file.
    ///
    /// # Errors
    /// The file cannot be written or renamed.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("json.new");
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o644).open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        fs::rename(new, path)
    }

    /// Reads the file. `None` if there is none, or if it was written by an agent of another version.
    pub fn read(path: &Path) -> Option<Self> {
        let published: Published = serde_json::from_reader(io::BufReader::new(File::open(path).ok()?)).ok()?;
        (published.api_version == VERSION).then_some(published)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_back_and_another_version_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.json");
        assert_eq!(Published::read(&path), None);
        let mut published = Published::new(None, Report::default());
        published.write(&path).unwrap();
        assert_eq!(Published::read(&path), Some(published.clone()));
        published.api_version = "agent.virtiofs.dev/v2".into();
        published.write(&path).unwrap();
        assert_eq!(Published::read(&path), None);
    }
}
