//! The clock of remedies, and wall-clock time.

use std::time::{SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use virtiofs_remedy::Moment;

/// CLOCK_BOOTTIME and the wall clock. Their offset is read once, so the wall-clock time of a moment never changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    /// Milliseconds since the Unix epoch at the start of CLOCK_BOOTTIME.
    boot: u64,
}

impl Clock {
    /// Reads the offset.
    pub(crate) fn new() -> Self {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        Clock { boot: wall.saturating_sub(now().millis()) }
    }

    /// Now.
    pub(crate) fn now(&self) -> Moment {
        now()
    }

    /// Milliseconds since the Unix epoch.
    pub(crate) fn unix_millis(&self, moment: Moment) -> u64 {
        self.boot.saturating_add(moment.millis())
    }
}

/// CLOCK_BOOTTIME continues while the machine sleeps, and is the same for the next agent.
fn now() -> Moment {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map(std::time::Duration::from);
    Moment::from_millis(time.map_or(0, |time| time.as_millis() as u64))
}
