//! A real agent and broker on a kwok node.

use std::fs;

use anyhow::{Context, Result, ensure};
use e2e::cluster::{NodeDaemons, condition_of, until, wait_for};
use e2e::suite::World as _;
use serde_json::{Value, json};
use testkit::guest::{Guest, GuestConfig};

use crate::world::{State, World};

/// Node id of a share's root directory in FUSE.
const ROOT: u64 = 1;

fn ready(export: &Value) -> (&str, &str) {
    let ready = condition_of(export, "Ready");
    (ready["status"].as_str().unwrap_or_default(), ready["reason"].as_str().unwrap_or_default())
}

/// Waits until the Ready condition of the export has this status and reason.
fn until_ready(world: &World, daemons: &NodeDaemons, share: &str, wanted: (&str, &str)) -> Result<Value> {
    until(
        &format!("{share} to be {wanted:?}"),
        || format!("{}\n{}", world.explain(), daemons.log_tail()),
        || {
            let export = world.exports(share)?.remove("real");
            Ok(export.filter(|export| ready(export) == wanted))
        },
    )
}

pub(crate) fn a_real_agent_serves_and_releases_a_share(world: &mut World) -> Result<()> {
    world.nodes("data", &["fake", "real"])?;
    let mut daemons = NodeDaemons::start(&world.cluster, "real")?;
    let source = daemons.source("data")?;
    let spec = |content: &str| {
        json!({
            "source": {"hostPath": {"path": source}}, "content": content, "rollout": {"maxUnavailable": 1},
        })
    };
    world.declare("data", spec("Shared"))?;
    let export = until_ready(world, &daemons, "data", ("True", "Serving"))?;
    ensure!(!export["status"]["preflight"]["sandbox"].is_null(), "{:#}", export["status"]);
    ensure!(export["status"]["observedRevision"] == export["spec"]["revision"], "{export:#}");
    world.report_status("data", "fake", State::Serving)?;
    world.until_reason("data", "Ready", "AllNodesReady")?;

    // A VM connects, is served and counted.
    let guest = Guest::boot(GuestConfig::new(daemons.socket("data")).small()).context("a guest")?;
    world.until_share("data", "one session", |share| share["status"]["sessions"] == 1)?;

    // A change is applied under the guest; a node that cannot apply it halts the roll-out.
    world.declare("data", spec("Immutable"))?;
    world.until_rolled_out_to("data", &["fake"])?;
    world.report_status("data", "fake", State::Serving)?;
    let share = world.until_share("data", "updated", |share| share["status"]["nodes"]["updated"] == 2)?;
    ensure!(condition_of(&share, "Reconciling")["reason"] == "Complete", "{share:#}");

    // The source is removed and created again.
    fs::rename(&source, source.with_extension("away"))?;
    until_ready(world, &daemons, "data", ("False", "SourceMissing"))?;
    fs::rename(source.with_extension("away"), &source)?;
    until_ready(world, &daemons, "data", ("True", "Serving"))?;

    // A share in use is kept and names its users.
    world.admin().run(&["delete", "vfs", "data", "--wait=false"])?;
    wait_for("the socket to be removed", || Ok((!daemons.socket("data").exists()).then_some(())))?;
    world.until_exports("data", "the other node is removed", |exports| exports.contains_key("real"))?;
    world.report_status("data", "fake", State::Drained)?;
    let share = world.until_reason("data", "Deleting", "InUse")?;
    let message = condition_of(&share, "Deleting")["message"].as_str().unwrap_or_default().to_owned();
    ensure!(message.contains("node real: ") && message.contains("(pid "), "{message}");
    println!("{message}");
    ensure!(guest.violations().is_empty(), "{:?}", guest.violations());
    drop(guest);
    world.until_share("data", "gone", Value::is_null)?;
    daemons.stop_agent()
}

/// An engine runs out of descriptors and recovers. The share reports the remedy and stays ready.
pub(crate) fn a_remedy_is_reported_and_the_share_stays_ready(world: &mut World) -> Result<()> {
    const FILES: usize = 1200;
    world.nodes("cured", &["real"])?;
    let daemons = NodeDaemons::start(&world.cluster, "real")?;
    let source = daemons.source("cured")?;
    for number in 0..FILES {
        fs::write(source.join(format!("file-{number}")), "here\n")?;
    }
    // An engine that needs a descriptor for each inode and has fewer than inodes.
    let scarce = json!({"inodeFileHandles": "Never", "openFiles": 1024});
    let staleness = json!({"policy": "Heal", "threshold": 10, "window": "10s"});
    world.declare(
        "cured",
        json!({"source": {"hostPath": {"path": source}}, "engine": scarce, "staleness": staleness}),
    )?;
    until_ready(world, &daemons, "cured", ("True", "Serving"))?;
    let guest = Guest::boot(GuestConfig::new(daemons.socket("cured")).small()).context("a guest")?;
    let missed = || (0..FILES).filter(|number| guest.fuse().lookup(ROOT, format!("file-{number}")).is_err()).count();
    ensure!(missed() > 0, "the engine has descriptors for all inodes");
    let export = until(
        "the remedy to be verified",
        || format!("{}\n{}", world.explain(), daemons.log_tail()),
        || {
            let export = world.exports("cured")?.remove("real");
            Ok(export.filter(|export| export["status"]["lastRemedy"]["outcome"] == "Verified"))
        },
    )?;
    let last = &export["status"]["lastRemedy"];
    ensure!(last["cause"] == "FdExhausted" && last["action"] == "FileHandles", "{last:#}");
    ensure!(ready(&export) == ("True", "Serving"), "{:#}", export["status"]);
    ensure!(condition_of(&export, "Degraded")["reason"] == "RemedyActive", "{:#}", export["status"]);
    let found = missed();
    ensure!(found == 0, "{found} files still cannot be opened");
    println!("{}", world.admin().run(&["get", "vfs,vfe"])?);
    ensure!(guest.violations().is_empty(), "{:?}", guest.violations());
    Ok(())
}

pub(crate) fn an_agent_serves_without_an_api_server(world: &mut World) -> Result<()> {
    if !world.cluster.is_own() {
        println!("skipped: this test did not start the API server");
        return Ok(());
    }
    world.nodes("kept", &["real"])?;
    let mut daemons = NodeDaemons::start(&world.cluster, "real")?;
    let source = daemons.source("kept")?;
    world.declare("kept", json!({"source": {"hostPath": {"path": source}}}))?;
    until_ready(world, &daemons, "kept", ("True", "Serving"))?;
    let guest = Guest::boot(GuestConfig::new(daemons.socket("kept")).small()).context("a guest")?;
    world.until_share("kept", "one session", |share| share["status"]["sessions"] == 1)?;
    world.cluster.without_api_server(|| {
        // A new agent also continues with the last known exports, and serves new VMs.
        daemons.stop_agent()?;
        daemons.start_agent()?;
        until(
            "the agent to continue",
            || daemons.log_tail(),
            || Ok(daemons.log_tail().contains("continuing with the last known exports").then_some(())),
        )?;
        let another = Guest::boot(GuestConfig::new(daemons.socket("kept")).small()).context("another guest")?;
        ensure!(another.violations().is_empty(), "{:?}", another.violations());
        drop(another);
        Ok(())
    })?;
    ensure!(guest.violations().is_empty(), "{:?}", guest.violations());
    drop(guest);
    let status = world.operator()?.ended()?;
    if status.is_some() {
        world.ready()?;
    }
    // The status is updated.
    world.until_share("kept", "no session", |share| share["status"]["sessions"] == 0)?;
    until_ready(world, &daemons, "kept", ("True", "Serving"))?;
    Ok(())
}
