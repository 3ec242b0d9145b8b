//! `agent.json` in the runtime directory: what the agent knows and the broker does not, for `status` to show.
//!
//! A file rather than a socket: it is there without anyone answering, and it is replaced as a whole, so a
//! reader never sees half of it. Whether its writer still lives is told by the lock beside it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::reconcile::Turn;
use crate::report::Report;

/// Version of the file's content.
const VERSION: &str = "agent.virtiofs.dev/v1";

/// What the agent last published.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Published {
    /// Version of this document.
    pub(crate) api_version: String,
    /// Process id of the agent.
    pub(crate) pid: u32,
    /// Version of the agent.
    pub(crate) version: String,
    /// Where shares are declared.
    pub(crate) shares_dir: Option<PathBuf>,
    /// How the shares are doing.
    pub(crate) report: Report,
}

impl Published {
    /// What this process has to say.
    pub(crate) fn new(shares_dir: Option<PathBuf>, report: Report) -> Self {
        Published {
            api_version: VERSION.to_owned(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            shares_dir,
            report,
        }
    }

    /// Replaces what was published before.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("json.new");
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o644).open(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        fs::rename(new, path)
    }

    /// Reads what was published last; none where nothing was, or by an agent of another version.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        let published: Published = serde_json::from_reader(io::BufReader::new(File::open(path).ok()?)).ok()?;
        (published.api_version == VERSION).then_some(published)
    }
}

/// Publishes each report that differs from the one before. Ends with the loop that turns.
pub(crate) async fn keep(mut turns: watch::Receiver<Turn>, path: PathBuf, shares_dir: Option<PathBuf>) {
    let mut known = Report::default();
    while turns.changed().await.is_ok() {
        let report = turns.borrow_and_update().report.clone();
        if report != known {
            let published = Published::new(shares_dir.clone(), report.clone());
            if let Err(error) = published.write(&path) {
                tracing::warn!(%error, path = %path.display(), "cannot publish");
            }
            known = report;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_read_back_and_another_version_is_not() {
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
