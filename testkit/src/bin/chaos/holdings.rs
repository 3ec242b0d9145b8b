//! What all processes hold once the guests have released everything.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use testkit::broker::Control;
use testkit::processes::Holdings;
use virtiofs_contract::counters::Held;

use crate::daemons::{Daemons, until};

/// How long engines that were replaced may take to end.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);

/// What the guests of a share hold by the engines' own count.
pub(crate) fn held(control: &mut Control, share: &str) -> anyhow::Result<Held> {
    let mut sum = Held::default();
    for session in control.status_of(share)?.sessions {
        sum.inodes += session.held.inodes;
        sum.handles += session.held.handles;
    }
    Ok(sum)
}

/// What all processes hold when no engine runs.
pub(crate) fn without_engines(daemons: &Daemons) -> anyhow::Result<Holdings> {
    const PROCESSES: usize = 3;
    until("no engine runs", || of_all(daemons).is_ok_and(|holdings| holdings.processes <= PROCESSES))?;
    of_all(daemons)
}

/// What this process, broker, keeper and engines hold.
fn of_all(daemons: &Daemons) -> anyhow::Result<Holdings> {
    daemons.reap()?;
    Ok(Holdings::of_tree(std::process::id().cast_signed())?)
}

/// What is held beyond `before` although it was waited for.
pub(crate) fn leaked(daemons: &Daemons, before: &Holdings) -> anyhow::Result<BTreeMap<String, usize>> {
    let begin = Instant::now();
    loop {
        let leaked = of_all(daemons)?.leaked_since(before);
        if leaked.is_empty() || begin.elapsed() > PATIENCE {
            return Ok(leaked);
        }
        std::thread::sleep(LOOK);
    }
}
