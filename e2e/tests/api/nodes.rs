//! Nodes that go down, go away, come back, and change their labels.

use anyhow::{Context, Result, ensure};
use e2e::cluster::wait_for;
use serde_json::json;

use crate::world::{How, World};

pub(crate) fn a_node_goes_down_and_comes_back(world: &mut World) -> Result<()> {
    world.served("downs", &["d1", "d2"], json!({"rollout": {"maxUnavailable": 1}}))?;
    world.cluster.take_down("d1")?;
    let share = world.until_share("downs", "one down", |share| share["status"]["nodes"]["unreachable"] == 1)?;
    ensure!(share["status"]["nodes"]["ready"] == 1 && share["status"]["nodes"]["selected"] == 2, "{share:#}");
    // A change passes it over, and waits for nobody.
    world.declare("downs", json!({"rollout": {"maxUnavailable": 1}, "content": "Immutable"}))?;
    world.until_asked("downs", &["d2"])?;
    world.answer("downs", "d2", How::Serving)?;
    world.until_reason("downs", "Progressing", "Complete")?;
    ensure!(world.asked("downs")? == ["d2"], "a node that is down was asked");
    world.cluster.bring_back("d1")?;
    world.until_asked("downs", &["d1", "d2"])?;
    world.answer("downs", "d1", How::Serving)?;
    let share = world.until_share("downs", "all updated", |share| share["status"]["nodes"]["updated"] == 2)?;
    ensure!(share["status"]["nodes"]["unreachable"] == 0, "{share:#}");
    Ok(())
}

pub(crate) fn a_node_is_deleted_and_comes_back(world: &mut World) -> Result<()> {
    world.served("gone", &["g1", "g2"], json!({}))?;
    world.answer("gone", "g1", How::Used(3))?;
    let uid = world.exports("gone")?["g1"]["metadata"]["uid"].clone();
    world.admin().run(&["delete", "node", "g1"])?;
    world.until_exports("gone", "one", |exports| exports.len() == 1)?;
    world.until_share("gone", "one node", |share| share["status"]["nodes"]["selected"] == 1)?;
    world.nodes("gone", &["g1"])?;
    let exports = world.until_exports("gone", "two", |exports| exports.len() == 2)?;
    ensure!(exports["g1"]["metadata"]["uid"] != uid, "it is the old one");
    Ok(())
}

pub(crate) fn a_node_loses_its_label(world: &mut World) -> Result<()> {
    world.served("pools", &["l1", "l2"], json!({}))?;
    world.answer("pools", "l1", How::Used(1))?;
    world.admin().run(&["label", "node", "l1", "pool-"])?;
    let drains = |exports: &std::collections::HashMap<String, serde_json::Value>| {
        exports.get("l1").is_some_and(|export| export["spec"]["mode"] == "Drain")
    };
    world.until_exports("pools", "l1 drains", drains)?;
    wait_for("the label of the share to go", || {
        let node = world.admin().get("node", "l1")?.context("no node")?;
        Ok(node["metadata"]["labels"].get("share.virtiofs.dev/pools").is_none().then_some(()))
    })?;
    world.answer("pools", "l1", How::Draining(1))?;
    world.until_share("pools", "still counted", |share| share["status"]["sessions"] == 1)?;
    // Wanted again, it serves at once.
    world.admin().run(&["label", "node", "l1", "pool=pools"])?;
    world.until_exports("pools", "l1 serves", |exports| exports["l1"]["spec"]["mode"] == "Serve")?;
    world.admin().run(&["label", "node", "l1", "pool-"])?;
    world.until_exports("pools", "l1 drains", drains)?;
    world.answer("pools", "l1", How::Drained)?;
    world.until_exports("pools", "l1 has left", |exports| exports.len() == 1)?;
    Ok(())
}
