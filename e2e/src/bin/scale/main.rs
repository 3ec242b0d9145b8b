//! Measures the operator in a cluster of a thousand kwok nodes with simulated agents: duration, requests to the API
//! server, memory. The control plane runs on the same machine, so the figures include it.

mod count;

use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::cluster::{Cluster, Operator};
use serde_json::{Value, json};

use crate::count::{Requests, memory};

/// Interval between two polls of the progress.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// The cluster is idle if nothing is written for this long, which is longer than any delay before a write.
const IDLE: Duration = Duration::from_secs(20);
/// Time limit of each phase.
const TIMEOUT: Duration = Duration::from_secs(3600);

#[derive(Parser)]
struct Arguments {
    /// Number of nodes
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// Number of shares, each on every node
    #[arg(long, default_value_t = 10)]
    shares: usize,
    /// Length of the idle phase in seconds, in which writes are counted
    #[arg(long, default_value_t = 600)]
    quiet: u64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let cluster = Cluster::start_with(&[include_str!("agents.yaml")])?;
    let nodes: Vec<String> = (0..arguments.nodes).map(|n| format!("node-{n:04}")).collect();
    let shares: Vec<String> = (0..arguments.shares).map(|n| format!("share-{n}")).collect();
    let labels: Vec<(&str, &str)> = shares.iter().map(|share| (share.as_str(), "yes")).collect();
    cluster.add_nodes(&nodes, &labels)?;
    let operator = Operator::start(&cluster, "scale")?;
    operator.until_working()?;
    println!("{} nodes; operator with no share: {} MB", nodes.len(), memory(operator.id())?.now);

    let (before, began) = (Requests::of(&cluster)?, Instant::now());
    let items: Vec<Value> = shares.iter().map(|name| share(name)).collect();
    cluster.admin.apply(&json!({"apiVersion": "v1", "kind": "List", "items": items}))?;
    until_ready(&cluster, &shares, nodes.len())?;
    let took = began.elapsed();
    wait_until_idle(&cluster)?;
    let (after, exports) = (Requests::of(&cluster)?, nodes.len() * shares.len());
    let memory = memory(operator.id())?;
    let each = |count: u64| count as f64 / exports as f64;
    println!("{exports} exports ready after {:.0} s", took.as_secs_f64());
    println!(
        "writes for each export: {:.2} to the export, {:.2} to its status (by kwok, in two steps), {:.2} to shares and nodes",
        each(after.exports - before.exports),
        each(after.export_status - before.export_status),
        each(after.others - before.others),
    );
    println!("operator: {} MB, {} MB at most", memory.now, memory.most);

    let written = operator.metric("virtiofs_operator_writes_total").context("the operator does not answer")?;
    cluster.admin.run(&["label", "node", &nodes[0], &format!("{}-", shares[0])])?;
    until_ready(&cluster, &shares[..1], nodes.len() - 1)?;
    wait_until_idle(&cluster)?;
    let now = operator.metric("virtiofs_operator_writes_total").context("the operator does not answer")?;
    println!("a label of one node changed: {} writes of the operator", now - written);

    let before = Requests::of(&cluster)?;
    sleep(Duration::from_secs(arguments.quiet));
    let after = Requests::of(&cluster)?;
    println!(
        "{} idle seconds: {} writes to exports, {} to their status",
        arguments.quiet,
        after.exports - before.exports,
        after.export_status - before.export_status,
    );
    let quiet = operator.metric("virtiofs_operator_writes_total").context("the operator does not answer")?;
    println!("operator: {} writes, without its lease", quiet - now);
    Ok(())
}

fn share(name: &str) -> Value {
    json!({
        "apiVersion": "virtiofs.dev/v1alpha1",
        "kind": "VirtiofsShare",
        "metadata": {"name": name},
        "spec": {
            "source": {"hostPath": {"path": format!("/srv/{name}")}},
            "nodes": {"selector": {"matchLabels": {name: "yes"}}},
        },
    })
}

fn until_ready(cluster: &Cluster, shares: &[String], nodes: usize) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let found = cluster.admin.list("vfs", &[])?;
        let ready = |name: &String| {
            let share = found.iter().find(|share| share["metadata"]["name"] == **name);
            let counts = share.map(|share| &share["status"]["nodes"]);
            counts.is_some_and(|it| it["ready"] == nodes && it["selected"] == nodes)
        };
        if shares.iter().all(ready) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "shares are not ready after {TIMEOUT:?}");
        sleep(POLL_INTERVAL);
    }
}

/// Waits until neither the operator nor the simulated agents have written for [`IDLE`].
fn wait_until_idle(cluster: &Cluster) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    let mut last = (Requests::of(cluster)?, Instant::now());
    while last.1.elapsed() < IDLE {
        ensure!(Instant::now() < deadline, "writes continue after {TIMEOUT:?}");
        sleep(POLL_INTERVAL);
        let now = Requests::of(cluster)?;
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
    Ok(())
}
