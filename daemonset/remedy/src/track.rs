use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::escalation::Blocker;
use crate::recent::Recent;
use crate::{Cause, Content, Failure, Moment, Policy, Remedy, Window};

/// Number of windows without an event that end an episode: remedies without effect may be tried again, and a failure is
/// not reported any more.
const QUIET_WINDOWS: u32 = 5;

/// How long a violation of the declared content is reported.
const VIOLATION_LASTS: Duration = Duration::from_secs(3600);

/// What is known of one cause.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Track {
    /// The broker's count at the last observation.
    observation: u64,
    /// Events of the last window.
    recent: Recent,
    /// When the last event was observed.
    pub(crate) last: Option<Moment>,
    /// Since when the events reach the limit.
    pub(crate) stale_since: Option<Moment>,
    /// Remedies tried in this episode, and why they did not help.
    pub(crate) tried: Vec<(Remedy, Blocker)>,
    /// Set once remedies or budget are exhausted.
    pub(crate) failure: Option<Failure>,
}

impl Track {
    /// Adds the broker's count. `elapsed`: the time since the last observation; `restarted`: its counters were reset to zero
    /// meanwhile.
    pub(crate) fn count(&mut self, total: u64, restarted: bool, now: Moment, elapsed: Duration, window: Window) {
        let before = if restarted || total < self.observation { 0 } else { self.observation };
        self.observation = total;
        self.happened(total - before, now, elapsed, window);
    }

    /// Adds events of the time `elapsed`.
    pub(crate) fn happened(&mut self, events: u64, now: Moment, elapsed: Duration, window: Window) {
        self.recent.note(now, events, elapsed, window);
        if events > 0 {
            self.last = Some(now);
        }
    }

    /// Events of the last window.
    pub(crate) fn events(&self) -> u64 {
        self.recent.events()
    }

    /// Drops the events so far: a remedy was applied.
    pub(crate) fn clear_window(&mut self) {
        self.recent.clear();
    }

    /// True if no event occurred for long enough to stop reporting it.
    pub(crate) fn is_quiet(&self, cause: Cause, policy: &Policy, content: Content, now: Moment) -> bool {
        let lasts = if is_violation(cause, content) { VIOLATION_LASTS } else { policy.window.length() };
        self.quiet_for(now, lasts)
    }

    /// True if no event occurred for long enough that the next one begins a new episode.
    pub(crate) fn is_over(&self, policy: &Policy, now: Moment) -> bool {
        self.quiet_for(now, policy.window.length() * QUIET_WINDOWS)
    }

    fn quiet_for(&self, now: Moment, span: Duration) -> bool {
        self.last.is_none_or(|last| now.since(last) >= span)
    }

    /// Ends the episode.
    pub(crate) fn reset(&mut self) {
        self.tried.clear();
        self.failure = None;
    }
}

/// The number of events within the window that is too many; `None`: any number is accepted. Others may replace and remove
/// files of `Shared` content: such events are counted, and the share serves as it promises.
pub(crate) fn event_limit(cause: Cause, policy: &Policy, content: Content) -> Option<u64> {
    match cause {
        // The guest looks the path up again by itself.
        Cause::Fenced => None,
        Cause::SourceGone | Cause::SourceHung => Some(1),
        Cause::SourceReplaced | Cause::SourceRemoved if content == Content::Shared => None,
        Cause::SourceReplaced | Cause::SourceRemoved => Some(1),
        Cause::FdExhausted | Cause::HandleStale => Some(u64::from(policy.threshold.get())),
    }
}

/// True if the declared content excludes this cause.
pub(crate) fn is_violation(cause: Cause, content: Content) -> bool {
    matches!(cause, Cause::SourceReplaced | Cause::SourceRemoved) && content != Content::Shared
}
