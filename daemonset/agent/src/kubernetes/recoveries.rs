//! Recent recoveries of engines.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// What counts as recent.
const RECENT: Duration = Duration::from_secs(600);

/// Counts of recoveries by share, and when they rose.
#[derive(Debug, Default)]
pub(crate) struct Recoveries {
    shares: BTreeMap<String, History>,
}

#[derive(Debug, Default)]
struct History {
    total: u64,
    /// When the count rose, and by how much.
    rises: VecDeque<(Instant, u64)>,
}

impl Recoveries {
    /// Records a count of recoveries; returns how many of them are recent. It is unknown when the first count of a
    /// share rose.
    pub(crate) fn count(&mut self, share: &str, total: u64, now: Instant) -> i64 {
        let known = self.shares.contains_key(share);
        let history = self.shares.entry(share.to_owned()).or_default();
        let rise = total.saturating_sub(history.total);
        if known && rise > 0 {
            history.rises.push_back((now, rise));
        }
        history.total = total;
        while history.rises.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > RECENT) {
            history.rises.pop_front();
        }
        i64::try_from(history.rises.iter().map(|(_, rise)| rise).sum::<u64>()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recoveries_are_forgotten_after_ten_minutes() {
        let (mut recoveries, start) = (Recoveries::default(), Instant::now());
        let mut at = |minutes: u64, total| recoveries.count("a", total, start + Duration::from_secs(60 * minutes));
        assert_eq!(at(0, 7), 0, "an agent that has just started knows of no increase");
        assert_eq!(at(1, 9), 2);
        assert_eq!(at(5, 10), 3);
        assert_eq!(at(12, 10), 1);
        assert_eq!(at(20, 10), 0);
    }
}
