//! A share's exports follow the share, and the share's status follows theirs.

use anyhow::{Context, Result, ensure};
use e2e::cluster::{until, wait_for};
use serde_json::{Value, json};

use crate::world::{State, World};

pub(crate) fn a_share_gets_exports_and_a_status(world: &mut World) -> Result<()> {
    world.nodes("images", &["n1", "n2", "n3"])?;
    world.cluster.add_node("other", &[("pool", "none")])?;
    world.declare("images", json!({"content": "Immutable"}))?;
    let exports = world.until_exports("images", "three", |exports| exports.len() == 3)?;
    let spec = &exports["n1"]["spec"];
    ensure!(spec["engine"]["cache"] == "Always" && spec["mode"] == "Serve", "{spec:#}");
    world.until_reason("images", "Ready", "NodesNotReady")?;
    for (node, sessions) in [("n1", 2), ("n2", 1)] {
        world.report_status("images", node, State::Used(sessions))?;
    }
    world.report_status("images", "n3", State::SourceMissing)?;
    let share = world.until_share("images", "counted", |share| share["status"]["nodes"]["ready"] == 2)?;
    ensure!(share["status"]["sessions"] == 3, "{:#}", share["status"]);
    let table = world.admin().run(&["get", "vfs,vfe"])?;
    println!("{table}");
    for word in ["images", "NodesNotReady", "SourceMissing", "Serving", "n3"] {
        ensure!(table.contains(word), "no {word} in\n{table}");
    }
    let wide = world.admin().run(&["get", "vfs", "-o", "wide"])?;
    ensure!(!table.contains("Immutable") && wide.contains("Immutable"), "{wide}");
    world.report_status("images", "n3", State::Serving)?;
    world.until_reason("images", "Ready", "AllNodesReady")?;
    for node in ["n1", "n2", "n3"] {
        wait_for("a label", || {
            let found = world.admin().get("node", node)?.context("no node")?;
            Ok((found["metadata"]["labels"]["share.virtiofs.dev/images"] == "true").then_some(()))
        })?;
    }
    let of_a_node = world.admin().list("vfe", &["--field-selector=spec.nodeName=n2"])?;
    ensure!(of_a_node.len() == 1, "{of_a_node:#?}");
    Ok(())
}

/// A reconcile of everything writes nothing.
pub(crate) fn nothing_is_written_when_nothing_changes(world: &mut World) -> Result<()> {
    world.served("quiet", &["q1", "q2"], json!({}))?;
    let operator = world.operator()?;
    let labelled = || -> Result<bool> {
        let nodes = world.admin().list("nodes", &["-l", "share.virtiofs.dev/quiet=true"])?;
        Ok(nodes.len() == 2)
    };
    wait_for("both labels", || Ok(labelled()?.then_some(())))?;
    let count = |name: &str| operator.metric(name).context("the operator does not answer");
    let (reconciles, writes) = (count("virtiofs_operator_reconciles_total")?, count("virtiofs_operator_writes_total")?);
    for value in ["a", "b", "c"] {
        // A change of a node that does not matter, but causes a reconcile.
        world.admin().run(&["label", "--overwrite", "node", "q1", &format!("unrelated={value}")])?;
        let before = count("virtiofs_operator_reconciles_total")?;
        until(
            "another reconcile",
            || operator.log_tail(),
            || Ok((count("virtiofs_operator_reconciles_total")? > before).then_some(())),
        )?;
    }
    let (reconciled, wrote) = (count("virtiofs_operator_reconciles_total")?, count("virtiofs_operator_writes_total")?);
    ensure!(reconciled >= reconciles + 3, "{reconciled} reconciles after {reconciles}");
    ensure!(wrote == writes, "{} writes without a reason\n{}", wrote - writes, operator.log_tail());
    Ok(())
}

pub(crate) fn two_shares_of_one_path_and_long_names(world: &mut World) -> Result<()> {
    let (first, second) = ("s".repeat(63), format!("{}t", "s".repeat(62)));
    let node = format!("{}.{}.{}.example", "n".repeat(63), "o".repeat(63), "p".repeat(63));
    ensure!(node.len() >= 199, "{}", node.len());
    world.cluster.add_node(&node, &[("pool", "long")])?;
    for share in [&first, &second] {
        let placed = json!({
            "nodes": {"selector": {"matchLabels": {"pool": "long"}}},
            "source": {"hostPath": {"path": "/srv/same"}},
        });
        world.declare(share, placed)?;
        world.until_exports(share, "one", |exports| exports.len() == 1)?;
        world.report_status(share, &node, State::Serving)?;
        world.until_reason(share, "Ready", "AllNodesReady")?;
    }
    wait_for("both labels", || {
        let found = world.admin().get("node", &node)?.context("no node")?;
        let labels = &found["metadata"]["labels"];
        let labelled = |share: &str| labels[format!("share.virtiofs.dev/{share}")] == "true";
        Ok((labelled(&first) && labelled(&second)).then_some(()))
    })?;
    // The API server rejects a name that is too long for a label.
    let refused =
        world.declare(&"u".repeat(64), json!({"nodes": {}})).expect_err("a name of 64 was accepted").to_string();
    ensure!(refused.contains("is not a name of 1 to 63"), "{refused}");
    Ok(())
}

/// Without the admission policy, which rejects all of these changes: the operator does not depend on it.
pub(crate) fn changes_of_an_export_are_reverted(world: &mut World) -> Result<()> {
    world.served("whole", &["w1"], json!({}))?;
    let name = world.exports("whole")?["w1"]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    world.without_export_policy(|| {
        let admin = world.admin();
        let patch = |patch: &str| admin.run(&["patch", "vfe", &name, "--type=merge", "-p", patch]);
        patch(r#"{"spec":{"engine":{"maxInodes":1234},"access":"ReadWrite"}}"#)?;
        world.until_exports("whole", "as declared", |exports| {
            let spec = &exports["w1"]["spec"];
            spec["access"] == "ReadOnly" && spec["engine"]["maxInodes"] != 1234
        })?;
        let owner = r#"{"apiVersion":"v1","kind":"Namespace","name":"default","uid":"0"}"#;
        for metadata in [
            r#"{"finalizers":["example.com/keep"]}"#,
            &format!(r#"{{"ownerReferences":[{owner}]}}"#),
            r#"{"labels":{"virtiofs.dev/share":"other"}}"#,
        ] {
            patch(&format!(r#"{{"metadata":{metadata}}}"#))?;
            world.until_exports("whole", &format!("without {metadata}"), |exports| {
                exports.get("w1").is_some_and(|export| has_operator_metadata(export, "whole"))
            })?;
        }
        admin.run(&["delete", "vfe", &name])?;
        world.until_exports("whole", "created again", |exports| {
            exports.get("w1").is_some_and(|it| it["status"].is_null())
        })?;
        Ok(())
    })
}

/// True if the export's metadata is what the operator writes.
fn has_operator_metadata(export: &Value, share: &str) -> bool {
    let metadata = &export["metadata"];
    let owners = metadata["ownerReferences"].as_array().map_or(&[][..], Vec::as_slice);
    metadata["labels"]["virtiofs.dev/share"] == share
        && metadata["finalizers"].is_null()
        && matches!(owners, [owner] if owner["kind"] == "VirtiofsShare" && owner["name"] == share)
}

/// Without the admission policy: exports of other users are deleted, whether the share exists or not.
pub(crate) fn foreign_exports_are_deleted(world: &mut World) -> Result<()> {
    world.served("genuine", &["g1"], json!({}))?;
    let genuine = world.exports("genuine")?.remove("g1").unwrap_or_default();
    world.without_export_policy(|| {
        for share in ["genuine", "missing"] {
            let mut foreign = json!({
                "apiVersion": "virtiofs.dev/v1alpha1",
                "kind": "VirtiofsExport",
                "metadata": {"name": format!("foreign-{share}"), "finalizers": ["example.com/keep"]},
                "spec": genuine["spec"],
            });
            foreign["spec"]["shareName"] = json!(share);
            let name = format!("foreign-{share}");
            world.admin().apply(&foreign)?;
            wait_for("a foreign export to be deleted", || {
                Ok(world.admin().get("vfe", &name)?.is_none().then_some(()))
            })?;
        }
        let kept = world.exports("genuine")?.remove("g1").unwrap_or_default();
        ensure!(kept["metadata"]["uid"] == genuine["metadata"]["uid"], "the share's own export was deleted too");
        Ok(())
    })
}
