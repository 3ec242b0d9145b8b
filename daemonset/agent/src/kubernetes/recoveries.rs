//! How often engines were recovered lately.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use virtiofs_crds::v1alpha1::RecoveryCounts;

/// What counts as lately.
const LATELY: Duration = Duration::from_secs(600);

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
    /// Takes in a count, and says how it is now. The first count of a share says nothing of when it rose.
    pub(crate) fn count(&mut self, share: &str, total: u64, now: Instant) -> RecoveryCounts {
        let known = self.shares.contains_key(share);
        let history = self.shares.entry(share.to_owned()).or_default();
        let rise = total.saturating_sub(history.total);
        if known && rise > 0 {
            history.rises.push_back((now, rise));
        }
        history.total = total;
        while history.rises.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > LATELY) {
            history.rises.pop_front();
        }
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        RecoveryCounts { total: number(total), recent: number(history.rises.iter().map(|(_, rise)| rise).sum()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recoveries_are_forgotten_after_ten_minutes() {
        let (mut recoveries, start) = (Recoveries::default(), Instant::now());
        let mut at = |minutes: u64, total| {
            let counts = recoveries.count("a", total, start + Duration::from_secs(60 * minutes));
            (counts.total, counts.recent)
        };
        assert_eq!(at(0, 7), (7, 0), "an agent that has just started knows of no rise");
        assert_eq!(at(1, 9), (9, 2));
        assert_eq!(at(5, 10), (10, 3));
        assert_eq!(at(12, 10), (10, 1));
        assert_eq!(at(20, 10), (10, 0));
    }
}
