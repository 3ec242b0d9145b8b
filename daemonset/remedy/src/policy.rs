//! What a share allows.

use std::num::NonZeroU32;
use std::time::Duration;

/// The time over which the budget is counted.
pub const BUDGET_SPAN: Duration = Duration::from_secs(3600);

/// What a share allows to be done about staleness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether remedies are applied.
    pub mode: Mode,
    /// Events of one cause within the window from which on a remedy is started.
    pub threshold: NonZeroU32,
    /// The time over which events are counted, and within which a remedy must help.
    pub window: Window,
    /// How many remedies may be started within [`BUDGET_SPAN`].
    pub budget: NonZeroU32,
}

/// Whether remedies are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Reconfigure or replace engines under running VMs.
    Heal,
    /// Count and report, change nothing.
    Report,
}

/// A span of time from one second to [`BUDGET_SPAN`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window(Duration);

impl Window {
    /// The window of this length, clamped to the valid range.
    pub fn within(length: Duration) -> Self {
        Window(length.clamp(Duration::from_secs(1), BUDGET_SPAN))
    }

    /// Its length.
    pub fn length(self) -> Duration {
        self.0
    }
}
