//! Resources of all processes after the guests have released everything.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use testkit::broker::Control;
use testkit::processes::Holdings;
use virtiofs_contract::counters::Held;

use crate::daemons::{Daemons, until};

/// Time limit for replaced engines to end.
const TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What the guests of a share hold, as counted by the engines.
pub(crate) fn held(control: &mut Control, share: &str) -> anyhow::Result<Held> {
    let mut sum = Held::default();
    for session in control.status_of(share)?.sessions {
        sum.inodes += session.held.inodes;
        sum.handles += session.held.handles;
    }
    Ok(sum)
}

/// Resources of all processes when no engine runs.
pub(crate) fn without_engines(daemons: &Daemons) -> anyhow::Result<Holdings> {
    const PROCESSES: usize = 3;
    until("no engine runs", || of_all(daemons).is_ok_and(|holdings| holdings.processes <= PROCESSES))?;
    of_all(daemons)
}

/// Resources of this process, broker, keeper and engines.
fn of_all(daemons: &Daemons) -> anyhow::Result<Holdings> {
    daemons.reap()?;
    Ok(Holdings::of_tree(std::process::id().cast_signed())?)
}

/// Resources beyond `before` that are not released in time.
pub(crate) fn leaked(daemons: &Daemons, before: &Holdings) -> anyhow::Result<BTreeMap<String, usize>> {
    let begin = Instant::now();
    loop {
        let leaked = of_all(daemons)?.leaked_since(before);
        if leaked.is_empty() || begin.elapsed() > TIMEOUT {
            return Ok(leaked);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
