//! The clock that remedies go by, and the one on the wall.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use virtiofs_remedy::Moment;

/// Both clocks, held together as they were when the agent started: what is said of a moment does not change.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// Milliseconds since the Unix epoch at the other clock's beginning.
    boot: u64,
}

impl Clock {
    pub(crate) fn new() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        Clock { boot: wall.saturating_sub(now().millis()) }
    }

    /// Now.
    pub(crate) fn now(&self) -> Moment {
        now()
    }

    /// Milliseconds since the Unix epoch.
    pub(crate) fn on_the_wall(&self, moment: Moment) -> u64 {
        self.boot.saturating_add(moment.millis())
    }
}

/// CLOCK_BOOTTIME: it goes on while the machine sleeps, and means the same to the next agent.
fn now() -> Moment {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map(std::time::Duration::from);
    Moment::from_millis(time.map_or(0, |time| time.as_millis() as u64))
}
