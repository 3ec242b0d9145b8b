use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Moment, Window};

/// Number of parts of a window; events leave it a part at a time.
const PARTS: u64 = 16;

/// Events of the last window, in bounded space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recent {
    /// Length of a part in milliseconds; another window resets the counts.
    part: u64,
    /// Events by part, numbered since the clock's beginning.
    parts: VecDeque<(u64, u64)>,
}

impl Recent {
    /// Adds events that occurred within `span` before `now`, assumed to be evenly spread.
    pub(crate) fn note(&mut self, now: Moment, events: u64, span: Duration, window: Window) {
        self.advance(now, window);
        let events = within(events, span, window.length());
        if events == 0 {
            return;
        }
        let number = now.millis() / self.part;
        match self.parts.back_mut().filter(|(last, _)| *last >= number) {
            Some((_, count)) => *count = count.saturating_add(events),
            None => self.parts.push_back((number, events)),
        }
    }

    /// Drops events that have left the window.
    pub(crate) fn advance(&mut self, now: Moment, window: Window) {
        let part = (window.length().as_millis() as u64 / PARTS).max(1);
        if part != self.part {
            *self = Recent { part, parts: VecDeque::new() };
        }
        let oldest = (now.millis() / part + 1).saturating_sub(PARTS);
        self.parts.retain(|(number, _)| *number >= oldest);
    }

    /// Events that are still in the window.
    pub(crate) fn events(&self) -> u64 {
        self.parts.iter().fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    pub(crate) fn clear(&mut self) {
        self.parts.clear();
    }
}

/// How many of `events`, spread over `span`, fall into the last `window` of it; a part counts as one.
fn within(events: u64, span: Duration, window: Duration) -> u64 {
    if span <= window {
        return events;
    }
    let share = u128::from(events) * window.as_millis();
    u64::try_from(share.div_ceil(span.as_millis())).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn window() -> Window {
        Window::within(MINUTE)
    }

    fn at(seconds: u64) -> Moment {
        Moment::from_millis(1_000_000 + seconds * 1000)
    }

    #[test]
    fn events_count_for_one_window() {
        let mut recent = Recent::default();
        for second in 0..30 {
            recent.note(at(second), 1, Duration::from_secs(1), window());
        }
        assert_eq!(recent.events(), 30);
        recent.advance(at(50), window());
        assert_eq!(recent.events(), 30);
        recent.advance(at(75), window());
        assert!((10..=20).contains(&recent.events()), "{}", recent.events());
        recent.advance(at(95), window());
        assert_eq!(recent.events(), 0);
    }

    #[test]
    fn events_of_a_long_gap_are_spread_over_it() {
        let mut recent = Recent::default();
        recent.note(at(7200), 120, Duration::from_secs(7200), window());
        assert_eq!(recent.events(), 1);
        recent.note(at(7201), 1, Duration::from_secs(7200), window());
        assert_eq!(recent.events(), 2);
    }

    #[test]
    fn space_is_bounded_and_counts_saturate() {
        let mut recent = Recent::default();
        for millis in (0..600_000).step_by(7) {
            recent.note(Moment::from_millis(millis), u64::MAX, Duration::ZERO, window());
        }
        assert!(recent.parts.len() <= PARTS as usize);
        assert_eq!(recent.events(), u64::MAX);
    }
}
