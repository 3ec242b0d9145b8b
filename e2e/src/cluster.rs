//! A Kubernetes cluster to test against: a control plane of our own, from the programs that `make tools-kubernetes`
//! built, or the one that `KUBECONFIG` names. Nothing in it is simulated except nodes, which are kwok's; of a
//! [`RealCluster`] nothing at all is.

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
/// The annotation of nodes that kwok keeps alive.
const FAKE: &str = "kwok.x-k8s.io/node";

/// A cluster with the chart installed. Dropped, everything that was started for it ends.
pub struct Cluster {
    /// Everything is permitted through this.
    pub admin: Kubectl,
    kwok: Process,
    own: Option<ControlPlane>,
    tools: PathBuf,
    dir: TempDir,
}

impl Cluster {
    /// Starts a control plane, or takes the cluster that `KUBECONFIG` names, and installs the chart.
    ///
    /// # Errors
    /// When a program is missing or does not start; its log is in the message.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// The same, with more for kwok to do: documents of its stages.
    ///
    /// # Errors
    /// When a program is missing or does not start; its log is in the message.
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
            // Until it answers, a failure is what is to be expected.
            Ok(admin.run(&["get", "--raw", "/readyz"]).ok().map(drop))
        })
        .map_err(|error| error.context(own.as_ref().map(ControlPlane::logs).unwrap_or_default()))?;
        install_chart(&tools, &admin)?;
        let kwok = start_kwok(&tools, &admin, dir.path(), stages)?;
        Ok(Cluster { admin, kwok, own, tools, dir })
    }

    /// Is this a control plane of our own, which a test may stop?
    pub fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Stops the API server, does something, and starts it again.
    ///
    /// # Errors
    /// When it does not come back, or what is done meanwhile fails.
    pub fn without_api_server(&mut self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let own = self.own.as_mut().context("the API server is not started by this test")?;
        own.stop_api_server()?;
        let acted = act();
        own.start_api_server()?;
        wait_for("the API server to be back", || Ok(self.admin.run(&["get", "--raw", "/readyz"]).ok().map(drop)))?;
        acted
    }

    /// The chart as helm prints it with these options.
    ///
    /// # Errors
    /// When helm refuses them; the message has its output.
    pub fn chart(&self, options: &[&str]) -> Result<String> {
        chart(&self.tools, options)
    }

    /// Files of this cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What explains a failure.
    pub fn logs(&self) -> String {
        self.kwok.log_tail()
    }

    /// A node of kwok's with these labels, which counts as ready from then on.
    ///
    /// # Errors
    /// When it cannot be made or does not become ready.
    pub fn add_node(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        self.add_nodes(std::slice::from_ref(&name.to_owned()), labels)
    }

    /// Several of them.
    ///
    /// # Errors
    /// When they cannot be made or do not become ready.
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

    /// A node goes down: kwok stops looking after it, and it is not ready any more.
    ///
    /// # Errors
    /// When it cannot be changed.
    pub fn take_down(&self, node: &str) -> Result<()> {
        self.admin.run(&["annotate", "node", node, &format!("{FAKE}-")])?;
        let down = json!({"status": {"conditions": [
            {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown", "message": "it does not answer"},
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

    /// It comes back.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn bring_back(&self, node: &str) -> Result<()> {
        self.admin.run(&["annotate", "--overwrite", "node", node, &format!("{FAKE}=fake")])?;
        wait_for("a node to be ready again", || {
            Ok(self.admin.get("node", node)?.filter(|node| is_true(node, "Ready")).map(drop))
        })
    }
}

/// Where kubectl and the others are.
fn tools() -> Result<PathBuf> {
    let tools = std::env::var_os("KUBERNETES_TOOLS").map(PathBuf::from);
    tools.context("KUBERNETES_TOOLS does not say where kubectl and the others are: use `make api` or `make node`")
}

/// Installs the chart as `helm template` prints it, but for the programs, which tests start themselves.
fn install_chart(tools: &Path, admin: &Kubectl) -> Result<()> {
    let documents = chart(tools, &["--set", "workloads.enabled=false"])?;
    admin.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))?;
    admin.apply_text(&documents)?;
    for definition in ["virtiofsshares.virtiofs.dev", "virtiofsexports.virtiofs.dev"] {
        admin.run(&["wait", "--for=condition=Established", "--timeout=60s", "crd", definition])?;
    }
    Ok(())
}

/// The chart as `helm template` prints it with these options.
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

/// Has an object this condition?
pub fn is_true(object: &Value, condition: &str) -> bool {
    condition_of(object, condition)["status"] == "True"
}

/// A condition of an object; `Null` where it has none of this type.
pub fn condition_of<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let conditions = object["status"]["conditions"].as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().find(|condition| condition["type"] == kind).unwrap_or(&Value::Null)
}

fn start_kwok(tools: &Path, admin: &Kubectl, dir: &Path, more: &[&str]) -> Result<Process> {
    let stages = dir.join("kwok.yaml");
    let documents = [&[include_str!("cluster/kwok.yaml")], more].concat().join("---\n");
    std::fs::write(&stages, documents).context("writing what kwok is to do")?;
    let mut command = Command::new(tools.join("kwok"));
    // Reads no file of the user who runs this.
    command.env("HOME", dir);
    command.arg("--config").arg(stages).arg("--kubeconfig").arg(admin.kubeconfig());
    command.arg(format!("--manage-nodes-with-annotation-selector={FAKE}=fake"));
    // Else nobody renews their leases, and they are taken for dead after a while.
    command.arg("--node-lease-duration-seconds=40");
    Process::start(command, &dir.join("kwok.log"), Duration::from_secs(2))
}
