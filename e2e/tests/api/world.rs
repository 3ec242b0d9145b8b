//! The environment of every test: a cluster, an operator, and the operations of the tests.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Cluster, Kubectl, Operator, condition_of, until, wait_for};
use e2e::suite::{self, World as _};
use serde_json::{Value, json};

pub(crate) struct World {
    // Dropped first: it releases its lease, for which the API server has to run.
    pub(crate) operator: Option<Operator>,
    agents: HashMap<String, Kubectl>,
    pub(crate) cluster: Cluster,
}

impl suite::World for World {
    fn start() -> Result<Self> {
        Ok(World { operator: None, agents: HashMap::new(), cluster: Cluster::start()? })
    }

    /// Ensures that an operator works, whatever the previous test has done to it.
    fn ready(&mut self) -> Result<()> {
        let alive = match &self.operator {
            Some(operator) => operator.ended()?.is_none(),
            None => false,
        };
        if !alive {
            self.operator = None;
            self.operator = Some(Operator::start(&self.cluster, "one")?);
        }
        self.operator()?.until_working()
    }

    /// Removes what a test created. The next test starts with an empty cluster.
    fn clean_up(&mut self) {
        let admin = self.admin();
        // A failure here appears in the next test with an explanation.
        let _ = admin.run(&["annotate", "vfs", "--all", "virtiofs.dev/force-delete=true", "--overwrite"]);
        let _ = admin.run(&["delete", "vfs", "--all", "--timeout=60s"]);
        // Only the operator and the garbage collector delete exports.
        let _ = wait_for("exports to be deleted", || Ok(admin.list("vfe", &[])?.is_empty().then_some(())));
        let _ = admin.run(&["delete", "nodes", "--all", "--timeout=60s"]);
        self.agents.clear();
    }

    fn explain(&self) -> String {
        let objects = self.admin().run(&["get", "vfs,vfe,nodes", "-o", "wide"]).unwrap_or_default();
        let operator = self.operator.as_ref().map(Operator::log_tail).unwrap_or_default();
        format!("{objects}\n{operator}\n{}", self.cluster.logs())
    }
}

impl World {
    /// Stops the leading operator with SIGTERM.
    pub(crate) fn end_operator(&mut self) -> Result<()> {
        self.operator.take().context("no operator runs")?.stop()
    }

    pub(crate) fn operator(&self) -> Result<&Operator> {
        self.operator.as_ref().context("no operator runs")
    }

    pub(crate) fn admin(&self) -> &Kubectl {
        &self.cluster.admin
    }

    /// Declares a share for the nodes whose label `pool` is the share's name.
    pub(crate) fn declare(&self, name: &str, more: Value) -> Result<()> {
        self.admin().apply(&share(name, more))
    }

    /// Adds nodes to that pool.
    pub(crate) fn nodes(&self, pool: &str, names: &[&str]) -> Result<()> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        self.cluster.add_nodes(&names, &[("pool", pool)])
    }

    /// The share; `Null` if it does not exist.
    pub(crate) fn share(&self, name: &str) -> Result<Value> {
        Ok(self.admin().get("vfs", name)?.unwrap_or_default())
    }

    /// The exports of a share by node.
    pub(crate) fn exports(&self, share: &str) -> Result<HashMap<String, Value>> {
        let found = self.admin().list("vfe", &[&format!("--field-selector=spec.shareName={share}")])?;
        Ok(found.into_iter().map(|it| (it["spec"]["nodeName"].as_str().unwrap_or_default().to_owned(), it)).collect())
    }

    /// Waits until `wanted` is true for a share's exports, and returns them.
    pub(crate) fn until_exports(
        &self,
        share: &str,
        what: &str,
        wanted: impl Fn(&HashMap<String, Value>) -> bool,
    ) -> Result<HashMap<String, Value>> {
        until(
            &format!("exports of {share}: {what}"),
            || self.explain(),
            || Ok(Some(self.exports(share)?).filter(|exports| wanted(exports))),
        )
    }

    /// Waits until `wanted` is true for a share, and returns it.
    pub(crate) fn until_share(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        until(
            &format!("share {name}: {what}"),
            || self.explain(),
            || Ok(Some(self.share(name)?).filter(|share| wanted(share))),
        )
    }

    /// Waits until a condition of a share has this reason.
    pub(crate) fn until_reason(&self, name: &str, condition: &str, reason: &str) -> Result<Value> {
        self.until_share(name, reason, |share| condition_of(share, condition)["reason"] == reason)
    }

    /// Runs `act` while the admission policy that protects exports is not enforced, and enforces it again.
    pub(crate) fn without_export_policy(&self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        const BINDING: [&str; 2] = ["validatingadmissionpolicybinding", "virtiofs-exports"];
        let mut binding = self.admin().get(BINDING[0], BINDING[1])?.context("no such policy")?;
        binding["metadata"] = json!({"name": BINDING[1]});
        let tried = json!({
            "apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsExport", "metadata": {"name": "tried"},
            "spec": {"shareName": "s", "nodeName": "n", "revision": "1", "access": "ReadOnly", "content": "Shared",
                     "source": {"hostPath": {"path": "/srv"}}, "engine": {
                "cache": "Auto", "entryTimeout": "1s", "attrTimeout": "1s", "negativeTimeout": "0s",
                "inodeFileHandles": "Prefer", "writeback": "Disabled", "xattr": "Disabled", "posixACL": "Disabled",
                "securityLabel": "Disabled", "killpriv": "Disabled", "announceSubmounts": "Enabled",
                "readdirplus": "Enabled", "allowMmap": "Disabled", "directIO": "Disabled", "deviceNodes": "Disabled",
                "fileCapabilities": "Disabled", "maxInodes": 4000000, "queues": 1, "sandbox": "Auto",
            }},
        });
        let until_accepted = |accepted: bool| {
            wait_for("the API server to apply a policy", || {
                Ok((self.admin().try_text(&tried.to_string()).is_ok() == accepted).then_some(()))
            })
        };
        self.admin().run(&["delete", BINDING[0], BINDING[1]])?;
        let acted = until_accepted(true).and_then(|()| act());
        self.admin().apply(&binding)?;
        until_accepted(false)?;
        acted
    }

    /// kubectl with the rights of a node's agent.
    pub(crate) fn agent(&mut self, node: &str) -> Result<Kubectl> {
        if !self.agents.contains_key(node) {
            self.agents.insert(node.to_owned(), self.cluster.agent_of(node)?);
        }
        Ok(self.agents[node].clone())
    }

    /// Reports a status for a share as the node's agent.
    pub(crate) fn report_status(&mut self, share: &str, node: &str, state: State) -> Result<()> {
        let export = self.exports(share)?.remove(node).with_context(|| format!("{node} has no export of {share}"))?;
        self.agent(node)?.apply_status(&status_of(&export, state))
    }

    /// Reports `Serving` for a share as the agents of all nodes.
    pub(crate) fn report_all(&mut self, share: &str) -> Result<()> {
        for (node, export) in self.exports(share)? {
            self.agent(&node)?.apply_status(&status_of(&export, State::Serving))?;
        }
        Ok(())
    }

    /// Declares a share and reports as all nodes of its pool that they serve it.
    pub(crate) fn served(&mut self, name: &str, nodes: &[&str], more: Value) -> Result<()> {
        self.nodes(name, nodes)?;
        self.declare(name, more)?;
        self.until_exports(name, "one for each node", |exports| exports.len() == nodes.len())?;
        self.report_all(name)?;
        self.until_reason(name, "Ready", "AllNodesReady").map(drop)
    }

    /// The nodes whose exports have the share's current revision.
    pub(crate) fn rolled_out_to(&self, name: &str) -> Result<Vec<String>> {
        let share = self.share(name)?;
        ensure!(
            share["status"]["observedGeneration"] == share["metadata"]["generation"],
            "the share is not reconciled yet"
        );
        let exports = self.exports(name)?;
        let asked = exports.iter().filter(|(_, it)| it["spec"]["revision"] == share["status"]["revision"]);
        let mut nodes: Vec<String> = asked.map(|(node, _)| node.clone()).collect();
        nodes.sort();
        Ok(nodes)
    }

    /// Waits until the current revision is rolled out to exactly these nodes.
    pub(crate) fn until_rolled_out_to(&self, name: &str, nodes: &[&str]) -> Result<()> {
        until(
            &format!("{name} to be rolled out to {nodes:?}"),
            || self.explain(),
            || Ok(self.rolled_out_to(name).ok().filter(|asked| asked == nodes).map(drop)),
        )
    }
}

/// The state that an agent reports for an export.
#[derive(Clone, Copy, Debug)]
pub(crate) enum State {
    Serving,
    Used(usize),
    SourceMissing,
    Drained,
    Draining(usize),
}

/// A share for the nodes of the pool of its name.
pub(crate) fn share(name: &str, more: Value) -> Value {
    let mut share = json!({
        "apiVersion": "virtiofs.dev/v1alpha1",
        "kind": "VirtiofsShare",
        "metadata": {"name": name},
        "spec": {
            "source": {"hostPath": {"path": format!("/srv/{name}")}},
            "nodes": {"selector": {"matchLabels": {"pool": name}}},
        },
    });
    if let (Some(spec), Some(more)) = (share["spec"].as_object_mut(), more.as_object()) {
        spec.extend(more.clone());
    }
    share
}

/// The status that an agent applies.
pub(crate) fn status_of(export: &Value, state: State) -> Value {
    let (ready, reason, message, sessions) = match state {
        State::Serving => ("True", "Serving", "", 0),
        State::Used(sessions) => ("True", "Serving", "", sessions),
        State::SourceMissing => ("False", "SourceMissing", "the directory does not exist (create it)", 0),
        State::Drained => ("False", "Drained", "", 0),
        State::Draining(sessions) => ("False", "Draining", "", sessions),
    };
    let now = time_now();
    json!({
        "apiVersion": "virtiofs.dev/v1alpha1",
        "kind": "VirtiofsExport",
        "metadata": {"name": export["metadata"]["name"], "uid": export["metadata"]["uid"]},
        "status": {
            "observedGeneration": export["metadata"]["generation"],
            "observedRevision": export["spec"]["revision"],
            "sessions": sessions,
            "users": (0..sessions).map(|n| format!("vms/vm-{n}")).collect::<Vec<_>>(),
            "conditions": [{
                "type": "Ready", "status": ready, "reason": reason, "message": message, "lastTransitionTime": now,
            }],
        },
    })
}

/// The current time in the format of conditions.
fn time_now() -> String {
    let output = std::process::Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]).output();
    output.map(|it| String::from_utf8_lossy(&it.stdout).trim().to_owned()).unwrap_or_default()
}

/// A file of this workspace.
pub(crate) fn in_tree(path: &str) -> PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}
