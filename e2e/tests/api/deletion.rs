//! A share in use stays, says by whom, and cannot wedge the cluster.

use anyhow::{Result, ensure};
use e2e::cluster::{condition_of, wait_for};
use serde_json::{Value, json};

use crate::world::{How, World};

pub(crate) fn a_share_in_use_is_kept(world: &mut World) -> Result<()> {
    world.served("used", &["u1", "u2"], json!({}))?;
    world.answer("used", "u1", How::Used(2))?;
    world.admin().run(&["delete", "vfs", "used", "--wait=false"])?;
    world.until_exports("used", "all drain", |exports| {
        exports.len() == 2 && exports.values().all(|export| export["spec"]["mode"] == "Drain")
    })?;
    world.answer("used", "u1", How::Draining(2))?;
    world.answer("used", "u2", How::Drained)?;
    world.until_exports("used", "one left", |exports| exports.len() == 1)?;
    let share = world.until_reason("used", "Deleting", "InUse")?;
    let message = condition_of(&share, "Deleting")["message"].as_str().unwrap_or_default().to_owned();
    ensure!(message == "2 sessions: node u1: vms/vm-0, vms/vm-1", "{message}");
    ensure!(condition_of(&share, "Ready")["reason"] == "Deleting", "{share:#}");
    println!("{}", world.admin().run(&["get", "vfs,vfe"])?);
    world.answer("used", "u1", How::Drained)?;
    world.until_share("used", "gone", Value::is_null)?;
    world.until_exports("used", "gone", |exports| exports.is_empty())?;
    Ok(())
}

pub(crate) fn a_forced_deletion_does_not_wait(world: &mut World) -> Result<()> {
    world.served("forced", &["c1"], json!({}))?;
    world.answer("forced", "c1", How::Used(1))?;
    world.cluster.stop_node("c1")?;
    world.admin().run(&["delete", "vfs", "forced", "--wait=false"])?;
    let share = world.until_reason("forced", "Deleting", "InUse")?;
    let message = condition_of(&share, "Deleting")["message"].as_str().unwrap_or_default().to_owned();
    ensure!(message.contains("node c1 (unreachable)"), "{message}");
    world.admin().run(&["annotate", "vfs", "forced", "virtiofs.dev/force-delete=true"])?;
    world.until_share("forced", "gone", Value::is_null)?;
    // Owned by what is gone, exports go too.
    wait_for("the garbage collector", || Ok(world.exports("forced")?.is_empty().then_some(())))
}
