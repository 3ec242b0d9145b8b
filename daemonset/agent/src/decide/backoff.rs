//! Exponential back-off.

use std::time::Duration;

/// Delays that double from `first` to `longest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// No failure yet.
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Backoff { first, longest, failures: 0 }
    }

    /// Notes a failure. Returns how long to wait after it.
    pub(crate) fn next(&mut self) -> Duration {
        let delay = delay(self.first, self.longest, self.failures);
        self.failures = self.failures.saturating_add(1);
        delay
    }

    /// Notes a success: the next failure is the first.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// The wait after `failures` earlier failures: `first` doubled as often, at most `longest`.
pub(crate) fn delay(first: Duration, longest: Duration, failures: u32) -> Duration {
    let factor = 1u32.checked_shl(failures).unwrap_or(u32::MAX);
    first.saturating_mul(factor).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_and_reset_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        let delays: Vec<_> = (0..4).map(|_| backoff.next().as_secs()).collect();
        assert_eq!(delays, [1, 2, 4, 5]);
        backoff.reset();
        assert_eq!(backoff.next().as_secs(), 1);
    }

    #[test]
    fn many_failures_do_not_overflow() {
        assert_eq!(delay(Duration::from_secs(1), Duration::from_secs(60), u32::MAX), Duration::from_secs(60));
    }
}
