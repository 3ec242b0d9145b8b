//! A change reaches nodes a few at a time and halts at the first node that regresses.

use anyhow::{Result, ensure};
use e2e::cluster::{condition_of, wait_for};
use serde_json::{Value, json};

use crate::world::{State, World};

fn one_at_a_time(more: Value) -> Value {
    let mut spec = json!({"rollout": {"maxUnavailable": 1}});
    if let (Some(spec), Some(more)) = (spec.as_object_mut(), more.as_object()) {
        spec.extend(more.clone());
    }
    spec
}

pub(crate) fn a_rollout_halts_and_continues(world: &mut World) -> Result<()> {
    world.served("steps", &["r1", "r2", "r3"], one_at_a_time(json!({})))?;
    world.declare("steps", one_at_a_time(json!({"content": "Immutable"})))?;
    world.until_rolled_out_to("steps", &["r1"])?;
    world.until_reason("steps", "Reconciling", "RollingOut")?;
    world.report_status("steps", "r1", State::SourceMissing)?;
    let share = world.until_reason("steps", "Stalled", "RolloutHalted")?;
    let message = condition_of(&share, "Stalled")["message"].as_str().unwrap_or_default().to_owned();
    ensure!(
        message.contains("r1 regressed after the change: it no longer serves the share: SourceMissing"),
        "{message}"
    );
    println!("{}", world.admin().run(&["get", "vfs,vfe"])?);
    wait_for("an Event", || {
        let events = world.admin().run(&["get", "events.events.k8s.io", "-n", "default"])?;
        Ok(events.contains("RolloutHalted").then_some(()))
    })?;
    ensure!(world.rolled_out_to("steps")? == ["r1"], "the roll-out continued");
    // The admin repairs the node.
    world.report_status("steps", "r1", State::Serving)?;
    world.until_rolled_out_to("steps", &["r1", "r2"])?;
    world.report_status("steps", "r2", State::Serving)?;
    world.until_rolled_out_to("steps", &["r1", "r2", "r3"])?;
    world.report_status("steps", "r3", State::Serving)?;
    let share = world.until_reason("steps", "Reconciling", "Complete")?;
    ensure!(share["status"]["nodes"]["updated"] == 3, "{:#}", share["status"]);
    Ok(())
}

/// A roll-out goes node by node; a change of consumers reaches all nodes at once.
pub(crate) fn consumers_change_at_once(world: &mut World) -> Result<()> {
    world.served("admits", &["h1", "h2"], one_at_a_time(json!({})))?;
    let consumers = json!({"namespaces": {"matchNames": ["vms"]}});
    world.declare("admits", one_at_a_time(json!({"content": "Immutable", "consumers": consumers})))?;
    let exports = world.until_exports("admits", "all admit vms", |exports| {
        exports.values().all(|export| export["spec"]["consumers"] == consumers)
    })?;
    ensure!(exports["h2"]["spec"]["content"] == "Shared", "h2 was changed before h1: {:#}", exports["h2"]);
    world.until_rolled_out_to("admits", &["h1"])?;
    world.declare("admits", one_at_a_time(json!({"content": "Immutable"})))?;
    world.until_exports("admits", "no namespace is admitted", |exports| {
        exports.values().all(|export| export["spec"]["consumers"]["namespaces"].is_null())
    })?;
    Ok(())
}

pub(crate) fn an_edit_during_a_rollout_goes_to_the_last_revision(world: &mut World) -> Result<()> {
    world.served("edits", &["e1", "e2", "e3"], one_at_a_time(json!({})))?;
    world.declare("edits", one_at_a_time(json!({"content": "Immutable"})))?;
    world.until_rolled_out_to("edits", &["e1"])?;
    // The admin edits the share again before the first node has reported.
    world.declare("edits", one_at_a_time(json!({"content": "Exclusive"})))?;
    for nodes in [&["e1"][..], &["e1", "e2"], &["e1", "e2", "e3"]] {
        world.until_rolled_out_to("edits", nodes)?;
        world.report_status("edits", nodes[nodes.len() - 1], State::Serving)?;
    }
    world.until_reason("edits", "Reconciling", "Complete")?;
    let exports = world.exports("edits")?;
    ensure!(exports.values().all(|export| export["spec"]["content"] == "Exclusive"), "{exports:#?}");
    Ok(())
}
