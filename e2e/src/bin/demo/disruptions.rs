//! Kills, reconfigures and replaces the engine, and kills or replaces broker, keeper and agent, while the guest works.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::node::Node;
use e2e::replacement::Series;

use crate::demo_share::{DemoShare, NAME};
use crate::printer::Printer;

const KILLS: usize = 5;
/// Pause between two disruptions, long enough for the guest to work with each engine.
const BETWEEN: Duration = Duration::from_millis(600);
/// Edits that a user might try. The first makes guests cache less and send more requests; with the second each inode
/// needs an open file.
const EDITS: [&str; 3] = ["{cache: Metadata}", "{inodeFileHandles: Never}", "{}"];

/// Runs all disruptions while a guest works.
pub(crate) fn run(node: &mut Node, share: &DemoShare, printer: &Printer) -> Result<()> {
    disrupt_engine(node, share, printer)?;

    printer.step("under that load: SIGKILL for the broker; a new one continues with the engine");
    keep_engine(node, printer, "broker", Node::kill_broker, |node| node.broker_id().unwrap_or_default())?;

    printer.step("under that load: a new broker stands by, and the one that serves is stopped");
    keep_engine(node, printer, "broker", Node::replace_broker, |node| node.broker_id().unwrap_or_default())?;

    printer.step("under that load: SIGKILL for the agent; a new one takes over");
    keep_engine(node, printer, "agent", Node::kill_agent, Node::agent_id)
}

fn disrupt_engine(node: &Node, share: &DemoShare, printer: &Printer) -> Result<()> {
    printer.step(&format!("under that load: SIGKILL for the engine, {KILLS} times"));
    let mut kills = Series::default();
    for _ in 0..KILLS {
        kills.add(report(node, printer, "killed", || node.kill_engine(NAME))?);
    }
    printer.step(&format!("engine killed {kills}"));

    for engine in EDITS {
        printer.step(&format!("under that load: the manifest is edited to engine: {engine}"));
        report(node, printer, "reconfigured", || node.reconfigure(&share.declaration(engine)))?;
    }

    printer.step("under that load: another engine binary is installed, and virtiofsctl handover");
    report(node, printer, "upgraded", || node.replace_binary(NAME)).map(drop)
}

/// Replaces a process that the guest's requests do not pass through. The engine must be the same afterwards.
fn keep_engine(
    node: &mut Node,
    printer: &Printer,
    what: &str,
    replace: impl FnOnce(&mut Node) -> Result<()>,
    id: impl Fn(&Node) -> u32,
) -> Result<()> {
    let (engine, before) = (node.engine(NAME)?.pid, id(node));
    replace(node)?;
    ensure!(node.engine(NAME)?.pid == engine, "the engine changed with the {what}");
    let after = id(node);
    printer.detail(&format!("{what}: process {before} -> {after}, no pause: the engine is still process {engine}"));
    thread::sleep(BETWEEN);
    Ok(())
}

fn report(node: &Node, printer: &Printer, what: &str, change: impl FnOnce() -> Result<Duration>) -> Result<Duration> {
    let before = node.engine(NAME)?.pid;
    let pause = change()?;
    let after = node.engine(NAME)?.pid;
    printer.detail(&format!("{what}: process {before} -> {after}, pause {:.2} ms", pause.as_secs_f64() * 1000.0));
    thread::sleep(BETWEEN);
    Ok(pause)
}
