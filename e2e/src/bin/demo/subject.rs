//! What is shared, and what a guest may do with it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use e2e::load::Load;
use e2e::node::Declaration;
use e2e::tree;
use tempfile::TempDir;

/// Files read in one round of a directory of someone's own, so that the demo ends whatever its size.
const MOST_FILES: u32 = 300;

/// The share's name, and the guest's device.
pub(crate) const NAME: &str = "demo";

/// A directory of someone's own, which is only read, or a small tree made up for the demo.
pub(crate) struct Subject {
    source: PathBuf,
    own: bool,
    _made_up: Option<TempDir>,
}

impl Subject {
    pub(crate) fn new(share: Option<&Path>) -> Result<Self> {
        if let Some(path) = share {
            let source =
                fs::canonicalize(path).with_context(|| format!("SHARE={} cannot be shared", path.display()))?;
            ensure!(source.is_dir(), "SHARE={} is not a directory; name one", path.display());
            return Ok(Self { source, own: true, _made_up: None });
        }
        let dir = tempfile::Builder::new().prefix("demo-share-").tempdir().context("making a directory to share")?;
        tree::plant(&dir.path().join("base"), 60)?;
        tree::plant(&dir.path().join("top"), 60)?;
        Ok(Self { source: dir.path().to_owned(), own: false, _made_up: Some(dir) })
    }

    /// `engine` overrides what follows from the rest.
    pub(crate) fn declaration<'a>(&'a self, engine: &'a str) -> Declaration<'a> {
        let (access, content) = if self.own { ("ReadOnly", "Shared") } else { ("ReadWrite", "Exclusive") };
        Declaration { name: NAME, source: &self.source, access, content, engine, staleness: "{}" }
    }

    pub(crate) fn load_on(&self, mount: &str) -> Load {
        let load = if self.own { Load::default() } else { Load::writing(mount) };
        load.and_reading(mount).at_most(MOST_FILES)
    }

    /// What overlayfs writes goes to the guest's memory, whatever lies below.
    pub(crate) fn load_on_overlay(merged: &str) -> Load {
        Load::writing(merged).and_reading(merged).at_most(MOST_FILES)
    }

    /// Directories for overlayfs, topmost first.
    pub(crate) fn lower_layers(&self, mount: &str) -> Vec<String> {
        if self.own { vec![mount.to_owned()] } else { vec![format!("{mount}/top"), format!("{mount}/base")] }
    }
}
