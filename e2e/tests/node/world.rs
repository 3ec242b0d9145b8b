//! What every test has: a cluster of one node, and the words in which tests are told.

use anyhow::Result;
use e2e::cluster::{Kubectl, RealCluster, until};
use e2e::parts::Parts;
use e2e::suite::{self, World as _};
use serde_json::Value;

pub(crate) struct World {
    pub(crate) cluster: RealCluster,
}

impl suite::World for World {
    fn start() -> Result<Self> {
        Ok(World { cluster: RealCluster::start(&Parts::locate()?)? })
    }

    fn ready(&mut self) -> Result<()> {
        self.cluster.until_ready()
    }

    fn explain(&self) -> String {
        let admin = self.admin();
        let pods = admin.run(&["get", "pods", "-A", "-o", "wide"]).unwrap_or_default();
        let events = admin.run(&["get", "events", "-A", "--sort-by=.metadata.creationTimestamp"]).unwrap_or_default();
        format!("{pods}\n{events}\n{}", self.cluster.logs())
    }

    fn clean_up(&mut self) {
        // What fails here shows in the next test, with an explanation.
        let _ = self.admin().run(&["delete", "pods", "--all", "--timeout=60s"]);
    }
}

impl World {
    pub(crate) fn admin(&self) -> &Kubectl {
        &self.cluster.admin
    }

    /// Waits until a pod is as it should be, and returns it.
    pub(crate) fn until_pod(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        until(&format!("pod {name}: {what}"), || self.explain(), || Ok(self.admin().get("pod", name)?.filter(&wanted)))
    }
}
