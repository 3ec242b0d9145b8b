//! What broker and engines hold once their guests have released everything.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use testkit::broker::Control;
use testkit::processes::Holdings;
use virtiofs_contract::counters::Held;

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

/// What is held beyond `before` although it was waited for.
pub(crate) fn leaked(pid: i32, before: &Holdings) -> anyhow::Result<BTreeMap<String, usize>> {
    let begin = Instant::now();
    loop {
        let leaked = Holdings::of_tree(pid)?.leaked_since(before);
        if leaked.is_empty() || begin.elapsed() > PATIENCE {
            return Ok(leaked);
        }
        std::thread::sleep(LOOK);
    }
}
