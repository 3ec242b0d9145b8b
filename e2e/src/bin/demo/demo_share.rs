//! The share of the demo, and the load that a guest may run on it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::load::Load;
use e2e::node::Declaration;
use e2e::tree;
use tempfile::TempDir;

/// Limit of files read in one round of a user's directory, so that the demo ends whatever its size.
const MOST_FILES: u32 = 300;

/// Name of the share, and tag of the guest's device.
pub(crate) const NAME: &str = "demo";

/// A directory of the user, which is only read, or a small generated tree.
pub(crate) struct DemoShare {
    source: PathBuf,
    own: bool,
    _generated: Option<TempDir>,
}

impl DemoShare {
    pub(crate) fn new(share: Option<&Path>) -> Result<Self> {
        if let Some(path) = share {
            let source =
                fs::canonicalize(path).with_context(|| format!("SHARE={}: cannot be resolved", path.display()))?;
            ensure!(source.is_dir(), "SHARE={}: not a directory; set SHARE to a directory", path.display());
            return Ok(Self { source, own: true, _generated: None });
        }
        let dir = tempfile::Builder::new().prefix("demo-share-").tempdir().context("creating a directory to share")?;
        tree::plant(&dir.path().join("base"), 60)?;
        tree::plant(&dir.path().join("top"), 60)?;
        Ok(Self { source: dir.path().to_owned(), own: false, _generated: Some(dir) })
    }

    /// The share's declaration; `engine` overrides engine settings.
    pub(crate) fn declaration<'a>(&'a self, engine: &'a str) -> Declaration<'a> {
        let (access, content) = if self.own { ("ReadOnly", "Shared") } else { ("ReadWrite", "Exclusive") };
        Declaration { name: NAME, source: &self.source, access, content, engine, staleness: "{}" }
    }

    pub(crate) fn load_on(&self, mount: &str) -> Load {
        let load = if self.own { Load::default() } else { Load::writing(mount) };
        load.and_reading(mount).at_most(MOST_FILES)
    }

    /// The load on overlayfs, which writes to the guest's memory, whatever the lower layers are.
    pub(crate) fn load_on_overlay(merged: &str) -> Load {
        Load::writing(merged).and_reading(merged).at_most(MOST_FILES)
    }

    /// Lower layers for overlayfs, topmost first.
    pub(crate) fn lower_layers(&self, mount: &str) -> Vec<String> {
        if self.own { vec![mount.to_owned()] } else { vec![format!("{mount}/top"), format!("{mount}/base")] }
    }
}
