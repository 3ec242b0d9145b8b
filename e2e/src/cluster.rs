//! A Kubernetes cluster to test against: a control plane of its own, from the programs that `make tools-kubernetes`
//! builds, or the cluster that `KUBECONFIG` names. Only its nodes are simulated (by kwok). A [`RealCluster`] simulates
//! nothing.

mod access;
mod agent;
mod containerd;
mod control_plane;
mod image;
mod kubectl;
mod kubelet;
mod operator;
mod real;
pub mod sessions;
pub mod traces;
mod vm;
mod wait;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

pub use self::agent::NodeDaemons;
use self::control_plane::{ControlPlane, Nodes};
pub use self::image::VM as VM_IMAGE;
pub use self::kubectl::Kubectl;
pub use self::operator::Operator;
pub use self::real::RealCluster;
pub use self::vm::{VmPod, volume_of};
pub use self::wait::{until, wait_for};
use crate::process::Process;

/// Namespace that the chart is installed in.
pub const NAMESPACE: &str = "virtiofs-system";
/// The annotation of nodes that kwok maintains.
const FAKE: &str = "kwok.x-k8s.io/node";

/// A cluster in which the chart is installed. Stops everything that it started on drop.
pub struct Cluster {
    /// kubectl with all permissions.
    pub admin: Kubectl,
    kwok: Process,
    own: Option<ControlPlane>,
    tools: PathBuf,
    dir: TempDir,
}

impl Cluster {
    /// Starts a control plane, or connects to the cluster that `KUBECONFIG` names, and installs the chart.
    ///
    /// # Errors
    /// If a program is missing or does not start; its log is in the message.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// Like [`Cluster::start`], with additional kwok stages as YAML documents.
    ///
    /// # Errors
    /// If a program is missing or does not start; its log is in the message.
    pub fn start_with(stages: &[&str]) -> Result<Self> {
        let tools = tools()?;
        let dir = tempfile::Builder::new().prefix("cluster-").tempdir().context("making a directory for a cluster")?;
        let (own, kubeconfig) = match std::env::var_os("KUBECONFIG") {
            Some(given) => (None, PathBuf::from(given)),
            None => {
                let own = ControlPlane::start(&tools, dir.path(), Nodes::Fake)?;
                let kubeconfig = own.kubeconfig().to_owned();
                (Some(own), kubeconfig)
            }
        };
        let admin = Kubectl::new(tools.join("kubectl"), kubeconfig);
        wait_for("the API server", || {
            // Requests fail until the API server is up.
            Ok(admin.run(&["get", "--raw", "/readyz"]).ok().map(drop))
        })
        .map_err(|error| error.context(own.as_ref().map(ControlPlane::logs).unwrap_or_default()))?;
        install_chart(&tools, &admin)?;
        let kwok = start_kwok(&tools, &admin, dir.path(), stages)?;
        Ok(Cluster { admin, kwok, own, tools, dir })
    }

    /// True if this control plane was started by the test, so that the test may stop it.
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Stops the API server, runs `act`, and starts the API server again.
    ///
    /// # Errors
    /// If the API server does not start again, or `act` fails.
    pub fn without_api_server(&mut self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let own = self.own.as_mut().context("this test did not start the API server and cannot stop it")?;
        own.stop_api_server()?;
        let acted = act();
        own.start_api_server()?;
        wait_for("the API server to be back", || Ok(self.admin.run(&["get", "--raw", "/readyz"]).ok().map(drop)))?;
        acted
    }

    /// Renders the chart with these options (`helm template`).
    ///
    /// # Errors
    /// If helm fails; the message has its output.
    pub fn chart(&self, options: &[&str]) -> Result<String> {
        chart(&self.tools, options)
    }

    /// Temporary directory for the files of this cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Logs that explain a failure.
    pub fn logs(&self) -> String {
        self.kwok.log_tail()
    }

    /// Adds a kwok node with these labels and waits until it is ready.
    ///
    /// # Errors
    /// If the node cannot be created or does not become ready.
    pub fn add_node(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        self.add_nodes(std::slice::from_ref(&name.to_owned()), labels)
    }

    /// Adds several nodes with these labels and waits until they are ready.
    ///
    /// # Errors
    /// If a node cannot be created or does not become ready.
    pub fn add_nodes(&self, names: &[String], labels: &[(&str, &str)]) -> Result<()> {
        let labels: serde_json::Map<String, Value> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), json!(value))).collect();
        let items: Vec<Value> = names.iter().map(|name| fake_node(name, &labels)).collect();
        self.admin.apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}))?;
        wait_for(&format!("{} nodes to be ready", names.len()), || {
            let nodes = self.admin.list("nodes", &[])?;
            let ready = nodes.iter().filter(|node| is_true(node, "Ready"));
            let ready: HashSet<&str> = ready.filter_map(|node| node["metadata"]["name"].as_str()).collect();
            Ok(names.iter().all(|name| ready.contains(name.as_str())).then_some(()))
        })
    }

    /// Stops a node: kwok no longer maintains it, and it becomes NotReady.
    ///
    /// # Errors
    /// If the API server rejects the change.
    pub fn stop_node(&self, node: &str) -> Result<()> {
        self.admin.run(&["annotate", "node", node, &format!("{FAKE}-")])?;
        let down = json!({"status": {"conditions": [
            {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "no answer"},
        ]}});
        self.admin.run(&[
            "patch",
            "node",
            node,
            "--subresource=status",
            "--type=strategic",
            "-p",
            &down.to_string(),
        ])?;
        Ok(())
    }

    /// Starts a stopped node again and waits until it is ready.
    ///
    /// # Errors
    /// If the node does not become ready.
    pub fn restart_node(&self, node: &str) -> Result<()> {
        self.admin.run(&["annotate", "--overwrite", "node", node, &format!("{FAKE}=fake")])?;
        wait_for("a node to be ready again", || {
            Ok(self.admin.get("node", node)?.filter(|node| is_true(node, "Ready")).map(drop))
        })
    }
}

/// Directory of kubectl, helm and the other Kubernetes programs.
fn tools() -> Result<PathBuf> {
    let tools = std::env::var_os("KUBERNETES_TOOLS").map(PathBuf::from);
    tools.context("KUBERNETES_TOOLS: not set, must be the directory of kubectl; use `make api` or `make node`")
}

/// Installs the chart as `helm template` renders it, without the workloads: tests start the programs themselves.
fn install_chart(tools: &Path, admin: &Kubectl) -> Result<()> {
    let documents = chart(tools, &["--set", "workloads.enabled=false"])?;
    admin.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))?;
    admin.apply_text(&documents)?;
    for definition in ["virtiofsshares.virtiofs.dev", "virtiofsexports.virtiofs.dev"] {
        admin.run(&["wait", "--for=condition=Established", "--timeout=60s", "crd", definition])?;
    }
    Ok(())
}

/// Renders the chart with these options (`helm template`).
fn chart(tools: &Path, options: &[&str]) -> Result<String> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/virtiofs-operator");
    let mut helm = Command::new(tools.join("helm"));
    helm.args(["template", "virtiofs", "--namespace", NAMESPACE]).arg(chart).args(options);
    let output = helm.output().context("running helm")?;
    ensure!(output.status.success(), "helm template: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn fake_node(name: &str, labels: &serde_json::Map<String, Value>) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {FAKE: "fake"}},
        "spec": {"taints": [{"key": FAKE, "value": "fake", "effect": "NoSchedule"}]},
    })
}

/// True if the object has this condition with status `True`.
pub fn is_true(object: &Value, condition: &str) -> bool {
    condition_of(object, condition)["status"] == "True"
}

/// The condition of this type; `Null` if the object does not have it.
pub fn condition_of<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let conditions = object["status"]["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().find(|condition| condition["type"] == kind).unwrap_or(&Value::Null)
}

fn start_kwok(tools: &Path, admin: &Kubectl, dir: &Path, more: &[&str]) -> Result<Process> {
    let stages = dir.join("kwok.yaml");
    let documents = [&[include_str!("cluster/kwok.yaml")], more].concat().join("---\n");
    std::fs::write(&stages, documents).context("writing kwok's stages")?;
    let mut command = Command::new(tools.join("kwok"));
    // kwok must not read files of the user who runs this.
    command.env("HOME", dir);
    command.arg("--config").arg(stages).arg("--kubeconfig").arg(admin.kubeconfig());
    command.arg(format!("--manage-nodes-with-annotation-selector={FAKE}=fake"));
    // Without a lease the node lifecycle controller marks the nodes as unreachable after a while.
    command.arg("--node-lease-duration-seconds=40");
    Process::start(command, &dir.join("kwok.log"), Duration::from_secs(2))
}
