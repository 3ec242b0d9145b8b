//! A share that is in use is kept, names its users, and does not block the cluster.

use anyhow::{Result, ensure};
use e2e::cluster::{condition_of, wait_for};
use serde_json::{Value, json};

use crate::world::{State, World};

pub(crate) fn a_share_in_use_is_kept(world: &mut World) -> Result<()> {
    world.served("used", &["u1", "u2"], json!({}))?;
    world.report_status("used", "u1", State::Used(2))?;
    world.admin().run(&["delete", "vfs", "used", "--wait=false"])?;
    world.until_exports("used", "all drain", |exports| {
        exports.len() == 2 && exports.values().all(|export| export["spec"]["mode"] == "Drain")
    })?;
    world.report_status("used", "u1", State::Draining(2))?;
    world.report_status("used", "u2", State::Drained)?;
    world.until_exports("used", "one remaining", |exports| exports.len() == 1)?;
    let share = world.until_reason("used", "Deleting", "InUse")?;
    let message = condition_of(&share, "Deleting")["message"].as_str().unwrap_or_default().to_owned();
    ensure!(message == "2 sessions: node u1: vms/vm-0, vms/vm-1", "{message}");
    ensure!(condition_of(&share, "Ready")["reason"] == "Deleting", "{share:#}");
    println!("{}", world.admin().run(&["get", "vfs,vfe"])?);
    world.report_status("used", "u1", State::Drained)?;
    world.until_share("used", "gone", Value::is_null)?;
    world.until_exports("used", "gone", |exports| exports.is_empty())?;
    Ok(())
}

pub(crate) fn a_forced_deletion_does_not_wait(world: &mut World) -> Result<()> {
    world.served("forced", &["c1"], json!({}))?;
    world.report_status("forced", "c1", State::Used(1))?;
    world.cluster.stop_node("c1")?;
    world.admin().run(&["delete", "vfs", "forced", "--wait=false"])?;
    let share = world.until_reason("forced", "Deleting", "InUse")?;
    let message = condition_of(&share, "Deleting")["message"].as_str().unwrap_or_default().to_owned();
    ensure!(message.contains("node c1 (unreachable)"), "{message}");
    world.admin().run(&["annotate", "vfs", "forced", "virtiofs.dev/force-delete=true"])?;
    world.until_share("forced", "gone", Value::is_null)?;
    // The garbage collector deletes exports whose share is deleted.
    wait_for("the garbage collector", || Ok(world.exports("forced")?.is_empty().then_some(())))
}
