//! Limits a rate: a burst, and then one more each interval.

use std::time::{Duration, Instant};

/// A token bucket.
#[derive(Clone, Debug)]
pub(crate) struct Allowance {
    burst: u32,
    interval: Duration,
    left: u32,
    since: Instant,
}

impl Allowance {
    /// A full bucket.
    pub(crate) fn new(burst: u32, interval: Duration, now: Instant) -> Self {
        Allowance { burst, interval, left: burst, since: now }
    }

    /// Takes one, if one is left.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.since).as_nanos() / self.interval.as_nanos().max(1);
        if earned > 0 {
            self.left = self.burst.min(self.left.saturating_add(u32::try_from(earned).unwrap_or(self.burst)));
            self.since = now;
        }
        let some = self.left > 0;
        self.left = self.left.saturating_sub(1);
        some
    }

    /// When there is one again after [`Allowance::take`] failed.
    pub(crate) fn next_at(&self) -> Instant {
        self.since + self.interval
    }
}

/// Log lines of one kind: those over the rate are counted, and the next line has the count.
#[derive(Debug)]
pub(crate) struct LineRate {
    allowance: Allowance,
    dropped: u64,
}

impl LineRate {
    /// A burst of lines, and then one each interval.
    pub(crate) fn new(burst: u32, interval: Duration) -> Self {
        LineRate { allowance: Allowance::new(burst, interval, Instant::now()), dropped: 0 }
    }

    /// The number of lines that were dropped before this one; none: drop this one too.
    pub(crate) fn pass(&mut self, now: Instant) -> Option<u64> {
        if self.allowance.take(now) {
            return Some(std::mem::take(&mut self.dropped));
        }
        self.dropped += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(100);

    #[test]
    fn burst_is_followed_by_one_each_interval() {
        let start = Instant::now();
        let mut allowance = Allowance::new(50, INTERVAL, start);
        assert_eq!((0..1000).filter(|_| allowance.take(start)).count(), 50);
        assert_eq!(allowance.next_at(), start + INTERVAL);
        assert!(allowance.take(start + INTERVAL) && !allowance.take(start + INTERVAL));
        let later = start + 1000 * INTERVAL;
        assert_eq!((0..1000).filter(|_| allowance.take(later)).count(), 50);
    }

    #[test]
    fn dropped_lines_are_counted() {
        let mut lines = LineRate::new(3, INTERVAL);
        let start = Instant::now();
        let passed: Vec<_> = (0..10).filter_map(|_| lines.pass(start)).collect();
        assert_eq!(passed, [0, 0, 0]);
        assert_eq!(lines.pass(start + INTERVAL), Some(7));
        assert_eq!(lines.pass(start + INTERVAL), None);
    }
}
