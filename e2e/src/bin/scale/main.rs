//! Figures of the operator in a cluster of a thousand nodes, which are kwok's, as are their agents: how long it takes, what
//! it asks of the API server, what it needs itself. A control plane of its own on the same machine: the figures are of
//! both.

mod count;

use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use e2e::cluster::{Cluster, Operator};
use serde_json::{Value, json};

use crate::count::{Requests, memory};

/// How often progress is looked at.
const GLANCE: Duration = Duration::from_secs(1);
/// How long nothing is written once all is done: longer than anything here waits before it writes.
const REST: Duration = Duration::from_secs(20);
/// The longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(3600);

#[derive(Parser)]
struct Arguments {
    /// How many nodes.
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    /// How many shares, each on every node.
    #[arg(long, default_value_t = 10)]
    shares: usize,
    /// How many seconds nothing happens, to see whether anything is written then.
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
    settle(&cluster)?;
    let (after, exports) = (Requests::of(&cluster)?, nodes.len() * shares.len());
    let memory = memory(operator.id())?;
    let each = |count: u64| count as f64 / exports as f64;
    println!("{exports} exports ready after {:.0} s", took.as_secs_f64());
    println!(
        "writes for each export: {:.2} to the export, {:.2} to its status (kwok's, in two), {:.2} to shares and nodes",
        each(after.exports - before.exports),
        each(after.export_status - before.export_status),
        each(after.others - before.others),
    );
    println!("operator: {} MB, {} MB at most", memory.now, memory.most);

    let written = operator.metric("virtiofs_operator_writes_total").context("no answer from the operator")?;
    cluster.admin.run(&["label", "node", &nodes[0], &format!("{}-", shares[0])])?;
    until_ready(&cluster, &shares[..1], nodes.len() - 1)?;
    settle(&cluster)?;
    let now = operator.metric("virtiofs_operator_writes_total").context("no answer from the operator")?;
    println!("a label of one node changed: {} writes of the operator", now - written);

    let before = Requests::of(&cluster)?;
    sleep(Duration::from_secs(arguments.quiet));
    let after = Requests::of(&cluster)?;
    println!(
        "{} quiet seconds: {} writes to exports, {} to their status",
        arguments.quiet,
        after.exports - before.exports,
        after.export_status - before.export_status,
    );
    let quiet = operator.metric("virtiofs_operator_writes_total").context("no answer from the operator")?;
    println!("and {} of the operator, its lease aside", quiet - now);
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
    let deadline = Instant::now() + PATIENCE;
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
        ensure!(Instant::now() < deadline, "shares are not ready within {PATIENCE:?}");
        sleep(GLANCE);
    }
}

/// Waits until nothing has been written for a while, by the operator or by what plays the agents.
fn settle(cluster: &Cluster) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = (Requests::of(cluster)?, Instant::now());
    while last.1.elapsed() < REST {
        ensure!(Instant::now() < deadline, "writes do not end within {PATIENCE:?}");
        sleep(GLANCE);
        let now = Requests::of(cluster)?;
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
    Ok(())
}
