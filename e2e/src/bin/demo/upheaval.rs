//! The engine is killed, reconfigured and replaced under the guest while that works, and the agent killed.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::node::Node;
use e2e::replacement::Series;

use crate::printer::Printer;
use crate::subject::{NAME, Subject};

const KILLS: usize = 5;
/// Long enough for the guest to work with each engine.
const BETWEEN: Duration = Duration::from_millis(600);
/// What a person might try: guests keep less then, and ask the engine more; each inode costs an open file.
const EDITS: [&str; 3] = ["{cache: Metadata}", "{inodeFileHandles: Never}", "{}"];

/// Everything that may happen to engines and to the agent while a guest works.
pub(crate) fn cause(node: &mut Node, subject: &Subject, printer: &Printer) -> Result<()> {
    printer.say(&format!("under that load: SIGKILL for the engine, {KILLS} times"));
    let mut kills = Series::default();
    for _ in 0..KILLS {
        kills.add(report(node, printer, "killed", || node.kill_engine(NAME))?);
    }
    printer.say(&format!("engine killed {kills}"));

    for engine in EDITS {
        printer.say(&format!("under that load: the manifest is edited to engine: {engine}"));
        report(node, printer, "reconfigured", || node.reconfigure(&subject.declaration(engine)))?;
    }

    printer.say("under that load: another engine binary is installed, and virtiofsctl handover");
    report(node, printer, "upgraded", || node.replace_binary(NAME))?;

    printer.say("under that load: SIGKILL for the agent; a new one takes over");
    let (engine, agent) = (node.engine(NAME)?.pid, node.agent_id());
    node.kill_agent()?;
    ensure!(node.engine(NAME)?.pid == engine, "the guest has another engine than before");
    printer.show(&format!(
        "agent: process {agent} -> {}, no pause: the engine is still process {engine}",
        node.agent_id()
    ));
    thread::sleep(BETWEEN);
    Ok(())
}

fn report(node: &Node, printer: &Printer, what: &str, change: impl FnOnce() -> Result<Duration>) -> Result<Duration> {
    let before = node.engine(NAME)?.pid;
    let pause = change()?;
    let after = node.engine(NAME)?.pid;
    printer.show(&format!("{what}: process {before} -> {after}, pause {:.2} ms", pause.as_secs_f64() * 1000.0));
    thread::sleep(BETWEEN);
    Ok(pause)
}
