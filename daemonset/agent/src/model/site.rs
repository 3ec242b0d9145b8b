//! Paths that are the same for all shares.

use std::path::PathBuf;

use virtiofs_client::runtime_dir::RuntimeDir;

/// Paths that are the same for all shares.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    /// Where sockets are.
    pub(crate) runtime_dir: RuntimeDir,
    /// The directory of manifests, if shares are declared in one.
    pub(crate) manifests: Option<PathBuf>,
}
