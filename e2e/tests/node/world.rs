//! The environment of every test: a cluster of one node with the chart installed, and the operations of the tests.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use e2e::cluster::sessions::sessions;
use e2e::cluster::traces::Traces;
use e2e::cluster::{Kubectl, NAMESPACE, RealCluster, condition_of, is_true, until};
use e2e::document::{Step, examples};
use e2e::parts::Parts;
use e2e::suite::{self, World as _};
use e2e::tree;
use serde_json::{Value, json};
use virtiofs_contract::control::SessionStatus;

/// Namespace that the shares of the tests admit.
pub(crate) const VMS: &str = "vms";
/// Namespace that they do not admit.
pub(crate) const OTHERS: &str = "others";
/// Number of files in a share.
const FILES: u64 = 60;

pub(crate) struct World {
    pub(crate) cluster: RealCluster,
}

impl suite::World for World {
    fn start() -> Result<Self> {
        let world = World { cluster: RealCluster::start(&Parts::locate()?)? };
        for namespace in [VMS, OTHERS] {
            world.admin().run(&["create", "namespace", namespace])?;
        }
        world.install().map_err(|error| error.context(world.explain()))?;
        Ok(world)
    }

    fn ready(&mut self) -> Result<()> {
        self.cluster.until_ready()?;
        self.until_driver()?;
        self.until_cleaned_up()
    }

    fn explain(&self) -> String {
        let admin = self.admin();
        let run = |arguments: &[&str]| admin.run(arguments).unwrap_or_else(|error| format!("{error:#}\n"));
        let mut text = run(&["get", "pods,vfs,vfe,csinodes", "-A", "-o", "wide"]);
        text += &run(&["get", "events", "-A", "--sort-by=.metadata.creationTimestamp"]);
        for part in [
            "deployment/virtiofs-operator",
            "daemonset/virtiofs-agent",
            "daemonset/virtiofs-broker",
            "daemonset/virtiofs-keeper",
        ] {
            text += &format!("---- {part}:\n{}", run(&["-n", NAMESPACE, "logs", part, "--tail=100"]));
        }
        format!("{text}\n{}", self.cluster.logs())
    }

    fn clean_up(&mut self) {
        // A failure here appears in the next test with an explanation.
        for namespace in [VMS, OTHERS, "default"] {
            let _ = self.admin().run(&["-n", namespace, "delete", "pods", "--all", "--timeout=60s"]);
        }
        let _ = self.admin().run(&["delete", "vfs", "--all", "--timeout=60s"]);
    }
}

impl World {
    pub(crate) fn admin(&self) -> &Kubectl {
        &self.cluster.admin
    }

    /// Installs the chart with the README's first example.
    fn install(&self) -> Result<()> {
        for step in examples("README.md", "### Kubernetes")?.remove(0) {
            match step {
                // The set-up has already built the image.
                Step::Shell(command) if command.starts_with("make ") => (),
                Step::Shell(command) => drop(self.cluster.shell(&command, "")?),
                Step::Guest(command) => anyhow::bail!("{command}: no guest is running"),
            }
        }
        Ok(())
    }

    /// Waits until CSINode lists the driver.
    pub(crate) fn until_driver(&self) -> Result<()> {
        until("the driver to be in CSINode", || self.explain(), || Ok(self.has_driver()?.then_some(())))
    }

    /// True if CSINode lists the driver.
    pub(crate) fn has_driver(&self) -> Result<bool> {
        let drivers = self.admin().list("csinodes", &[])?;
        let drivers = drivers.iter().flat_map(|node| node["spec"]["drivers"].as_array().cloned().unwrap_or_default());
        Ok(drivers.into_iter().any(|driver| driver["name"] == "csi.virtiofs.dev"))
    }

    /// Waits until `wanted` is true for a pod, and returns the pod.
    pub(crate) fn until_pod(
        &self,
        namespace: &str,
        name: &str,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        until(
            &format!("pod {name}: {what}"),
            || self.explain(),
            || Ok(Some(self.admin().get_in(namespace, "pod", name)?).filter(&wanted)),
        )
    }

    /// Deletes a pod and waits until it no longer exists.
    pub(crate) fn delete_pod(&self, namespace: &str, name: &str) -> Result<()> {
        self.admin().run(&["-n", namespace, "delete", "pod", name, "--wait=false", "--ignore-not-found"])?;
        self.until_pod(namespace, name, "gone", Value::is_null).map(drop)
    }

    /// The pods of a daemon, without terminating ones.
    pub(crate) fn daemons(&self, name: &str) -> Result<Vec<Value>> {
        let selector = format!("--selector=app.kubernetes.io/name={name}");
        let pods = self.admin().list("pods", &["-n", NAMESPACE, &selector])?;
        Ok(pods.into_iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).collect())
    }

    /// The only pod of a daemon.
    pub(crate) fn daemon(&self, name: &str) -> Result<Value> {
        let mut pods = self.daemons(name)?;
        ensure!(pods.len() == 1, "{} pods of {name} instead of one", pods.len());
        Ok(pods.remove(0))
    }

    /// Waits until a daemon runs in another pod than `before`, and returns it.
    pub(crate) fn until_other_daemon(&self, name: &str, before: &Value) -> Result<Value> {
        let other = |pod: &Value| pod["metadata"]["uid"] != before["metadata"]["uid"] && is_true(pod, "Ready");
        until(&format!("another {name}"), || self.explain(), || Ok(self.daemon(name).ok().filter(other)))
    }

    /// Fills a directory of the node with files whose names describe their content. Do not call it while a guest reads
    /// them.
    fn plant(&self, name: &str) -> Result<()> {
        let source = Path::new("/srv").join(name);
        fs::create_dir_all(&source).context("creating a source directory")?;
        tree::plant(&source, FILES)
    }

    /// Declares a share of a directory of the node for the namespace [`VMS`], or changes it.
    pub(crate) fn declare(&self, name: &str, more: Value) -> Result<()> {
        let mut share = json!({
            "apiVersion": "virtiofs.dev/v1alpha1",
            "kind": "VirtiofsShare",
            "metadata": {"name": name},
            "spec": {
                "source": {"hostPath": {"path": format!("/srv/{name}")}},
                "consumers": {"namespaces": {"matchNames": [VMS]}},
                "socket": {"owner": 107, "group": 107},
            },
        });
        if let (Some(spec), Some(more)) = (share["spec"].as_object_mut(), more.as_object()) {
            spec.extend(more.clone());
        }
        self.admin().apply(&share)
    }

    /// Declares a share and waits until it is served.
    pub(crate) fn serve(&self, name: &str, more: Value) -> Result<()> {
        self.plant(name)?;
        self.declare(name, more)?;
        self.until_export(name, "served", |export| is_true(export, "Ready")).map(drop)
    }

    /// The export of a share on the node.
    pub(crate) fn export(&self, share: &str) -> Result<Value> {
        let mut found = self.admin().list("vfe", &[&format!("--field-selector=spec.shareName={share}")])?;
        Ok(found.pop().unwrap_or_default())
    }

    /// Waits until `wanted` is true for a share's export, and returns the export.
    pub(crate) fn until_export(&self, share: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        until(
            &format!("export of {share}: {what}"),
            || self.explain(),
            || Ok(Some(self.export(share)?).filter(|export| wanted(export))),
        )
    }

    /// Waits until the node serves the share's current generation.
    pub(crate) fn until_applied(&self, share: &str) -> Result<()> {
        until(
            &format!("{share} to be applied"),
            || self.explain(),
            || {
                let declared = self.admin().get("vfs", share)?.unwrap_or_default();
                let seen = declared["status"]["observedGeneration"] == declared["metadata"]["generation"];
                let export = self.export(share)?;
                let revision = &declared["status"]["revision"];
                let all = declared["status"]["nodes"]["updated"] == 1;
                let done = all
                    && export["status"]["observedRevision"] == *revision
                    && condition_of(&export, "Ready")["status"] == "True";
                Ok((seen && done).then_some(()))
            },
        )
    }

    /// The only session on the node.
    pub(crate) fn session(&self) -> Result<SessionStatus> {
        let mut sessions = sessions()?;
        ensure!(sessions.len() == 1, "{} sessions instead of one", sessions.len());
        Ok(sessions.remove(0))
    }

    /// Waits until `wanted` is true for the only session on the node.
    pub(crate) fn until_session(&self, what: &str, wanted: impl Fn(&SessionStatus) -> bool) -> Result<SessionStatus> {
        until(&format!("the session: {what}"), || self.explain(), || Ok(self.session().ok().filter(&wanted)))
    }

    /// Waits until everything that appeared on the node since `before` is removed.
    pub(crate) fn until_everything_is_removed(&self, before: &Traces) -> Result<()> {
        let left = || Traces::now().map(|now| now.since(before)).unwrap_or_default();
        let nothing = || Ok(Traces::now()?.since(before).is_empty().then_some(()));
        until("everything to be removed", || format!("{}{}", left(), self.explain()), nothing)
    }

    /// Waits until the kubelet has removed the directories of deleted pods.
    fn until_cleaned_up(&self) -> Result<()> {
        let cleaned_up = || {
            let kept = fs::read_dir("/var/lib/kubelet/pods").context("listing directories of pods")?.count();
            Ok((kept == self.admin().list("pods", &["-A"])?.len()).then_some(()))
        };
        until("the kubelet to clean up", || self.explain(), cleaned_up)
    }
}
