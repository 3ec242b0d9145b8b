//! The engine is killed, reconfigured and replaced under the guest while that works.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use e2e::exchange::Series;
use e2e::node::Node;

use crate::subject::{NAME, Subject};
use crate::teller::Teller;

const KILLS: usize = 5;
/// Long enough for the guest to work with each engine.
const BETWEEN: Duration = Duration::from_millis(600);
/// Guests keep less then, and ask the engine more.
const OTHER_CACHING: &str = "{cache: Metadata}";

/// Everything that may happen to an engine while it serves.
pub(crate) fn cause(node: &Node, subject: &Subject, teller: &Teller) -> Result<()> {
    teller.say(&format!("under that load: SIGKILL for the engine, {KILLS} times"));
    let mut kills = Series::default();
    for _ in 0..KILLS {
        kills.add(tell(node, teller, "killed", || node.kill_engine(NAME))?);
    }
    teller.say(&format!("engine killed {kills}"));

    let other = subject.declaration(OTHER_CACHING);
    teller.say(&format!("under that load: the manifest is edited to engine: {OTHER_CACHING}, then back"));
    tell(node, teller, "reconfigured", || node.reconfigure(&other))?;
    tell(node, teller, "reconfigured", || node.reconfigure(&subject.declaration("{}")))?;

    teller.say("under that load: another engine binary is installed, and takes over");
    tell(node, teller, "upgraded", || node.exchange_binary(NAME))?;
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
