//! The engine is killed, reconfigured and replaced under the guest while that works, and the agent killed.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use e2e::exchange::Series;
use e2e::node::Node;

use crate::subject::{NAME, Subject};
use crate::teller::Teller;

const KILLS: usize = 5;
/// Long enough for the guest to work with each engine.
const BETWEEN: Duration = Duration::from_millis(600);
/// What a person might try: guests keep less then, and ask the engine more; each inode costs an open file.
const EDITS: [&str; 3] = ["{cache: Metadata}", "{inodeFileHandles: Never}", "{}"];

/// Everything that may happen to engines and to the agent while a guest works.
pub(crate) fn cause(node: &mut Node, subject: &Subject, teller: &Teller) -> Result<()> {
    teller.say(&format!("under that load: SIGKILL for the engine, {KILLS} times"));
    let mut kills = Series::default();
    for _ in 0..KILLS {
        kills.add(tell(node, teller, "killed", || node.kill_engine(NAME))?);
    }
    teller.say(&format!("engine killed {kills}"));

    for engine in EDITS {
        teller.say(&format!("under that load: the manifest is edited to engine: {engine}"));
        tell(node, teller, "reconfigured", || node.reconfigure(&subject.declaration(engine)))?;
    }

    teller.say("under that load: another engine binary is installed, and virtiofs-agent handover");
    tell(node, teller, "upgraded", || node.exchange_binary(NAME))?;

    teller.say("under that load: SIGKILL for the agent; a new one goes on");
    let (engine, agent) = (node.engine(NAME)?.pid, node.agent_id());
    node.kill_agent()?;
    ensure!(node.engine(NAME)?.pid == engine, "the guest has another engine than before");
    teller.show(&format!(
        "agent: process {agent} -> {}, no pause: the engine is still process {engine}",
        node.agent_id()
    ));
    thread::sleep(BETWEEN);
    Ok(())
}

fn tell(node: &Node, teller: &Teller, what: &str, change: impl FnOnce() -> Result<Duration>) -> Result<Duration> {
    let before = node.engine(NAME)?.pid;
    let pause = change()?;
    let after = node.engine(NAME)?.pid;
    teller.show(&format!("{what}: process {before} -> {after}, pause {:.2} ms", pause.as_secs_f64() * 1000.0));
    thread::sleep(BETWEEN);
    Ok(pause)
}
