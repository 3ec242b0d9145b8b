//! A cluster of one node, with everything that a node has: scheduler, kubelet, containerd. Nothing in it is simulated.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::containerd::Containerd;
use super::control_plane::{ControlPlane, Nodes};
use super::kubelet::Kubelet;
use super::wait::{until, wait_for};
use super::{Kubectl, image, is_true, tools};
use crate::parts::Parts;
use crate::seclusion::SERVICE;

/// The node's name.
const NODE: &str = "node";

/// A cluster without anything of ours in it. To be started by a test that keeps to itself. Dropped, its daemons end;
/// containers end with the test's first process.
pub struct RealCluster {
    /// Everything is permitted through this.
    pub admin: Kubectl,
    kubelet: Kubelet,
    containerd: Containerd,
    control_plane: ControlPlane,
    tools: PathBuf,
    dir: TempDir,
}

impl RealCluster {
    /// Starts it, and waits until the node is ready.
    ///
    /// # Errors
    /// When a program is missing or does not start; its log is in the message.
    pub fn start(parts: &Parts) -> Result<Self> {
        let tools = tools()?;
        let dir = tempfile::Builder::new().prefix("node-").tempdir().context("making a directory for a node")?;
        let nodes = Nodes::Real { name: NODE, service: SERVICE };
        let control_plane = ControlPlane::start(&tools, dir.path(), nodes)?;
        let containerd = Containerd::start(dir.path())?;
        for archive in image::write_all(parts, dir.path())? {
            containerd.import(&archive)?;
        }
        let admin = Kubectl::new(tools.join("kubectl"), control_plane.kubeconfig());
        // Until it answers, a failure is what is to be expected.
        wait_for("the API server", || Ok(admin.run(&["get", "--raw", "/readyz"]).ok().map(drop)))
            .map_err(|error| error.context(control_plane.logs()))?;
        let kubeconfig = control_plane.kubelet_kubeconfig();
        let kubelet = Kubelet::start(&tools, dir.path(), NODE, kubeconfig, &containerd)?;
        let cluster = RealCluster { admin, kubelet, containerd, control_plane, tools, dir };
        cluster.until_ready()?;
        // Controllers make it some time after the namespace, and no pod is admitted before.
        until("the default service account", || cluster.logs(), || cluster.admin.get("serviceaccount", "default"))?;
        Ok(cluster)
    }

    /// Waits until the node is ready.
    ///
    /// # Errors
    /// When it does not become so.
    pub fn until_ready(&self) -> Result<()> {
        let look = || Ok(self.admin.get("node", NODE)?.filter(|node| is_true(node, "Ready")).map(drop));
        until("the node to be ready", || self.logs(), look)
    }

    /// Makes an image known to the node.
    ///
    /// # Errors
    /// When it cannot be imported.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.containerd.import(archive)
    }

    /// Ends the kubelet and starts another, under all that runs.
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart_kubelet(&mut self) -> Result<()> {
        self.kubelet.restart()
    }

    /// The kubelet's root directory, with pods' volumes.
    pub fn kubelet_dir(&self) -> PathBuf {
        self.kubelet.root()
    }

    /// helm and others.
    pub fn tools(&self) -> &Path {
        &self.tools
    }

    /// Files of this cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What explains a failure.
    pub fn logs(&self) -> String {
        [self.control_plane.logs(), self.containerd.log_tail(), self.kubelet.log_tail()].join("\n")
    }
}
