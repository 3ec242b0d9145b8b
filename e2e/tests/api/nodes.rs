//! Nodes that stop, are deleted, return, and change their labels.

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Kubectl, NAMESPACE, Operator, wait_for};
use e2e::suite::World as _;
use serde_json::json;

use crate::world::{State, World};

pub(crate) fn a_node_goes_down_and_comes_back(world: &mut World) -> Result<()> {
    world.served("downs", &["d1", "d2"], json!({"rollout": {"maxUnavailable": 1}}))?;
    world.cluster.stop_node("d1")?;
    let share = world.until_share("downs", "one unreachable", |share| share["status"]["nodes"]["unreachable"] == 1)?;
    ensure!(share["status"]["nodes"]["ready"] == 1 && share["status"]["nodes"]["selected"] == 2, "{share:#}");
    // A roll-out skips the node and does not wait for it.
    world.declare("downs", json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}))?;
    world.until_rolled_out_to("downs", &["d2"])?;
    world.report_status("downs", "d2", State::Serving)?;
    world.until_reason("downs", "Reconciling", "Complete")?;
    ensure!(world.rolled_out_to("downs")? == ["d2"], "the change was rolled out to a stopped node");
    world.cluster.restart_node("d1")?;
    world.until_rolled_out_to("downs", &["d1", "d2"])?;
    world.report_status("downs", "d1", State::Serving)?;
    let share = world.until_share("downs", "all updated", |share| share["status"]["nodes"]["updated"] == 2)?;
    ensure!(share["status"]["nodes"]["unreachable"] == 0, "{share:#}");
    Ok(())
}

pub(crate) fn a_node_is_deleted_and_comes_back(world: &mut World) -> Result<()> {
    world.served("gone", &["g1", "g2"], json!({}))?;
    world.report_status("gone", "g1", State::Used(3))?;
    let uid = world.exports("gone")?["g1"]["metadata"]["uid"].clone();
    world.admin().run(&["delete", "node", "g1"])?;
    world.until_exports("gone", "one", |exports| exports.len() == 1)?;
    world.until_share("gone", "one node", |share| share["status"]["nodes"]["selected"] == 1)?;
    world.nodes("gone", &["g1"])?;
    let exports = world.until_exports("gone", "two", |exports| exports.len() == 2)?;
    ensure!(exports["g1"]["metadata"]["uid"] != uid, "the old export still exists");
    Ok(())
}

pub(crate) fn a_node_loses_its_label(world: &mut World) -> Result<()> {
    world.served("pools", &["l1", "l2"], json!({}))?;
    world.report_status("pools", "l1", State::Used(1))?;
    world.admin().run(&["label", "node", "l1", "pool-"])?;
    let drains = |exports: &std::collections::HashMap<String, serde_json::Value>| {
        exports.get("l1").is_some_and(|export| export["spec"]["mode"] == "Drain")
    };
    world.until_exports("pools", "l1 drains", drains)?;
    wait_for("the share's label to be removed", || {
        let node = world.admin().get("node", "l1")?.context("no node")?;
        Ok(node["metadata"]["labels"].get("share.virtiofs.dev/pools").is_none().then_some(()))
    })?;
    world.report_status("pools", "l1", State::Draining(1))?;
    world.until_share("pools", "still counted", |share| share["status"]["sessions"] == 1)?;
    // Selected again, the node serves immediately.
    world.admin().run(&["label", "node", "l1", "pool=pools"])?;
    world.until_exports("pools", "l1 serves", |exports| exports["l1"]["spec"]["mode"] == "Serve")?;
    world.admin().run(&["label", "node", "l1", "pool-"])?;
    world.until_exports("pools", "l1 drains", drains)?;
    world.report_status("pools", "l1", State::Drained)?;
    world.until_exports("pools", "l1 is removed", |exports| exports.len() == 1)?;
    Ok(())
}

/// Label of pods that represent agents.
const AGENT: &str = "virtiofs.dev/test-agent";

/// A node whose agent is not ready applies no change, whatever the kubelet reports.
pub(crate) fn a_node_is_as_reachable_as_its_agent(world: &mut World) -> Result<()> {
    world.end_operator()?;
    world.operator = Some(Operator::start_watching_agents(&world.cluster, "agents", &format!("{AGENT}=yes"))?);
    let tested = changes_go_where_agents_are(world);
    world.admin().run(&["delete", "pods", "-n", NAMESPACE, "-l", AGENT, "--force", "--grace-period=0"])?;
    // Leftovers are removed by an operator that does not watch pods; the next test starts one.
    world.end_operator()?;
    world.ready()?;
    tested
}

fn changes_go_where_agents_are(world: &mut World) -> Result<()> {
    let unreachable = |share: &serde_json::Value| share["status"]["nodes"]["unreachable"].clone();
    for node in ["p1", "p2"] {
        put_agent(world.admin(), node)?;
        set_agent(world.admin(), node, "True")?;
    }
    world.served("agents", &["p1", "p2"], json!({}))?;
    set_agent(world.admin(), "p1", "False")?;
    let share = world.until_share("agents", "one agent not ready", |share| unreachable(share) == 1)?;
    ensure!(share["status"]["nodes"]["ready"] == 1, "{share:#}");
    world.declare("agents", json!({"content": "Immutable", "rollout": {"maxUnavailable": "100%"}}))?;
    world.until_rolled_out_to("agents", &["p2"])?;
    world.report_status("agents", "p2", State::Serving)?;
    world.until_reason("agents", "Reconciling", "Complete")?;
    ensure!(world.rolled_out_to("agents")? == ["p2"], "the change was rolled out to a node without an agent");
    set_agent(world.admin(), "p1", "True")?;
    world.until_rolled_out_to("agents", &["p1", "p2"])?;
    world.report_status("agents", "p1", State::Serving)?;
    world.until_share("agents", "both reachable", |share| unreachable(share) == 0)?;
    let gone = ["delete", "pod", "agent-p2", "-n", NAMESPACE, "--force", "--grace-period=0"];
    world.admin().run(&gone)?;
    world.until_share("agents", "one agent deleted", |share| unreachable(share) == 1).map(drop)
}

/// Creates an agent's pod on a node; only the API object exists.
fn put_agent(admin: &Kubectl, node: &str) -> Result<()> {
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": format!("agent-{node}"), "namespace": NAMESPACE, "labels": {AGENT: "yes"}},
        "spec": {
            "nodeName": node,
            "automountServiceAccountToken": false,
            "serviceAccountName": "virtiofs-agent",
            "containers": [{"name": "agent", "image": "agent"}],
        },
    });
    admin.apply(&pod)
}

/// Sets the Ready condition of a node's agent.
fn set_agent(admin: &Kubectl, node: &str, ready: &str) -> Result<()> {
    admin.apply_status(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": format!("agent-{node}"), "namespace": NAMESPACE},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
    }))
}
