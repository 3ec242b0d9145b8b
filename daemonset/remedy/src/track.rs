use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ladder::Obstacle;
use crate::recent::Recent;
use crate::{Cause, Content, Failure, Moment, Policy, Rung, Window};

/// How many windows without an event end an episode: what was tried in vain may be tried again, and a failure is
/// not spoken of any more.
const QUIET_WINDOWS: u32 = 5;

/// How long content that was not to change, and did, is spoken of.
const VIOLATION_LASTS: Duration = Duration::from_secs(3600);

/// What is known of one cause.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Track {
    /// What the broker had counted when it was looked at last.
    seen: u64,
    /// Events of the last window.
    recent: Recent,
    /// When the last event was seen.
    pub(crate) last: Option<Moment>,
    /// Since when there have been too many.
    pub(crate) ill_since: Option<Moment>,
    /// What was tried in this episode, and why it did not do.
    pub(crate) spent: Vec<(Rung, Obstacle)>,
    /// The end of the ladder, or of the budget.
    pub(crate) failure: Option<Failure>,
}

impl Track {
    /// Takes in what the broker has counted. `elapsed`: the time since it was looked at last; `anew`: it has begun
    /// from nought meanwhile.
    pub(crate) fn count(&mut self, total: u64, anew: bool, now: Moment, elapsed: Duration, window: Window) {
        let before = if anew || total < self.seen { 0 } else { self.seen };
        self.seen = total;
        self.happened(total - before, now, elapsed, window);
    }

    /// Takes in that so much has happened within `elapsed`.
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

    /// What has been counted so far is answered by a remedy.
    pub(crate) fn answered(&mut self) {
        self.recent.clear();
    }

    /// Has it been quiet for so long that nothing needs to be said of it?
    pub(crate) fn is_calm(&self, cause: Cause, policy: &Policy, content: Content, now: Moment) -> bool {
        let lasts = if is_violation(cause, content) { VIOLATION_LASTS } else { policy.window.length() };
        self.quiet_for(now, lasts)
    }

    /// Has it been quiet for so long that the next event begins another episode?
    pub(crate) fn is_over(&self, policy: &Policy, now: Moment) -> bool {
        self.quiet_for(now, policy.window.length() * QUIET_WINDOWS)
    }

    fn quiet_for(&self, now: Moment, span: Duration) -> bool {
        self.last.is_none_or(|last| now.since(last) >= span)
    }

    /// The episode has ended.
    pub(crate) fn forget_attempts(&mut self) {
        self.spent.clear();
        self.failure = None;
    }
}

/// How many events within the window are too many; none: any number is all right.
pub(crate) fn needed(cause: Cause, policy: &Policy, content: Content) -> Option<u64> {
    match cause {
        // The guest walks again by itself.
        Cause::Fenced => None,
        Cause::SourceGone | Cause::SourceHung => Some(1),
        _ if is_violation(cause, content) => Some(1),
        _ => Some(u64::from(policy.threshold.get())),
    }
}

/// Was this not to happen, by what the share says of its content?
pub(crate) fn is_violation(cause: Cause, content: Content) -> bool {
    matches!(cause, Cause::SourceReplaced | Cause::SourceRemoved) && content != Content::Shared
}
