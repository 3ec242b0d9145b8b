//! What a share allows.

use std::num::NonZeroU32;
use std::time::Duration;

/// Over what time the budget is counted.
pub const BUDGET_SPAN: Duration = Duration::from_secs(3600);

/// What a share allows to be done about staleness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Cure it, or only say so?
    pub mode: Mode,
    /// Events of one cause within the window from which on something is done.
    pub threshold: NonZeroU32,
    /// Over what time events are counted, and within which a remedy must have helped.
    pub window: Window,
    /// How many remedies may be begun within [`BUDGET_SPAN`].
    pub budget: NonZeroU32,
}

/// Cure staleness, or only say so?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Reconfigure or exchange engines under running VMs.
    Heal,
    /// Count and tell, change nothing.
    Report,
}

/// A span of time that is at least a second: what is counted over less says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window(Duration);

impl Window {
    /// The window of this length, or the nearest that makes sense: a second at least, at most [`BUDGET_SPAN`].
    pub fn within(length: Duration) -> Self {
        Window(length.clamp(Duration::from_secs(1), BUDGET_SPAN))
    }

    /// Its length.
    pub fn length(self) -> Duration {
        self.0
    }
}
