//! Operators that are killed, several operators, and an API server that is unavailable.

use std::os::unix::process::ExitStatusExt;

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Operator, until};
use e2e::suite::World as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::world::{State, World};

/// Upper bound of the scenario's writes.
const WRITES_MAX: usize = 60;

/// Declares, serves, changes and deletes a share while each operator dies before one write; the next one continues.
pub(crate) fn an_operator_killed_before_any_write_is_replaced(world: &mut World) -> Result<()> {
    world.end_operator()?;
    world.nodes("mortal", &["m1", "m2"])?;
    let mut deaths = 0;
    // Each operator does one write and dies before the next.
    let mut operator = Operator::start_dying_at_write(&world.cluster, "mortal", 2)?;
    let mut survive = |world: &World, what: &str, done: &dyn Fn(&World) -> Result<bool>| -> Result<()> {
        let explain = || world.explain();
        until(what, explain, || {
            if let Some(status) = operator.ended()? {
                ensure!(status.signal() == Some(6), "it ended with {status}\n{}", operator.log_tail());
                deaths += 1;
                ensure!(
                    deaths < WRITES_MAX,
                    "{deaths} operators died before the scenario ended\n{}",
                    operator.log_tail()
                );
                operator = Operator::start_dying_at_write(&world.cluster, "mortal", 2)?;
            }
            Ok(done(world)?.then_some(()))
        })
    };
    world.declare("mortal", json!({}))?;
    survive(world, "both exports exist", &|world| Ok(world.exports("mortal")?.len() == 2))?;
    world.report_all("mortal")?;
    survive(world, "all nodes ready", &|world| Ok(world.share("mortal")?["status"]["nodes"]["ready"] == 2))?;
    world.declare("mortal", json!({"content": "Immutable", "rollout": {"maxUnavailable": "100%"}}))?;
    survive(world, "rolled out to both", &|world| Ok(world.rolled_out_to("mortal").unwrap_or_default().len() == 2))?;
    world.report_all("mortal")?;
    survive(world, "both updated", &|world| {
        let share = world.share("mortal")?;
        let labelled = world.admin().list("nodes", &["-l", "share.virtiofs.dev/mortal=true"])?;
        Ok(share["status"]["nodes"]["updated"] == 2 && labelled.len() == 2)
    })?;
    world.admin().run(&["delete", "vfs", "mortal", "--wait=false"])?;
    survive(world, "both draining", &|world| {
        Ok(world.exports("mortal")?.values().all(|export| export["spec"]["mode"] == "Drain"))
    })?;
    for node in ["m1", "m2"] {
        world.report_status("mortal", node, State::Drained)?;
    }
    survive(world, "the share gone", &|world| Ok(world.share("mortal")?.is_null()))?;
    ensure!(deaths >= 8, "only {deaths} operators died");
    println!("{deaths} operators died");
    Ok(())
}

pub(crate) fn one_of_two_operators_leads(world: &mut World) -> Result<()> {
    let second = Operator::start(&world.cluster, "two")?;
    world.served("pair", &["t1"], json!({}))?;
    ensure!(second.metric("virtiofs_operator_leader") == Some(0), "both operators lead\n{}", second.log_tail());
    ensure!(second.metric("virtiofs_operator_writes_total").unwrap_or(0) == 0, "{}", second.log_tail());
    // The leader is killed and cannot release its lease.
    let first = world.operator()?.id();
    kill(Pid::from_raw(first.cast_signed()), Signal::SIGKILL)?;
    second.until_working()?;
    world.declare("pair", json!({"content": "Immutable"}))?;
    world.until_rolled_out_to("pair", &["t1"])?;
    // A third operator takes over immediately from one that is stopped with SIGTERM.
    let third = Operator::start(&world.cluster, "three")?;
    second.stop()?;
    third.until_working()?;
    world.operator = Some(third);
    Ok(())
}

/// Watches break and writes fail. Afterwards everything continues, with the same operator or, if it lost its lease,
/// with the next one.
pub(crate) fn the_api_server_goes_away_and_comes_back(world: &mut World) -> Result<()> {
    if !world.cluster.is_own() {
        println!("skipped: this test did not start the API server");
        return Ok(());
    }
    world.served("away", &["a1"], json!({}))?;
    let World { cluster, operator, .. } = world;
    let operator = operator.as_ref().context("no operator")?;
    cluster.without_api_server(|| {
        until(
            "the operator to log failed watches",
            || operator.log_tail(),
            || Ok(operator.log_tail().contains("watch failed").then_some(())),
        )
    })?;
    world.declare("away", json!({"content": "Immutable"}))?;
    let ended = world.operator()?.ended()?;
    if let Some(status) = ended {
        ensure!(status.code() == Some(1), "the operator ended with {status}\n{}", world.operator()?.log_tail());
        world.ready()?;
    }
    world.until_rolled_out_to("away", &["a1"])
}
