//! When a look that failed is repeated: later after each failure in a row, and not for a thousand objects at once.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The wait after the first failure in a row, and the longest, before they are spread.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// Objects of a kind whose last look failed.
#[derive(Debug, Default)]
pub(crate) struct Retries {
    failed: Mutex<HashMap<String, Failures>>,
}

/// Failures in a row.
#[derive(Debug, Default)]
struct Failures {
    count: u32,
    last: Option<Instant>,
}

impl Retries {
    /// Notes a failure, and says how long to wait after it. What failed together is not to come back together: `spread`,
    /// from 0 to 1, says how far from half the wait to one and a half of it.
    pub(crate) fn failed(&self, name: &str, now: Instant, spread: f64) -> Duration {
        let mut failed = self.lock();
        // What is gone is not looked at any more, so nobody would say that it went well.
        failed.retain(|_, it| it.last.is_some_and(|last| now.saturating_duration_since(last) < 2 * LONGEST));
        let failures = failed.entry(name.to_owned()).or_default();
        let wait = FIRST.saturating_mul(1u32.checked_shl(failures.count).unwrap_or(u32::MAX)).min(LONGEST);
        *failures = Failures { count: failures.count.saturating_add(1), last: Some(now) };
        wait.mul_f64(0.5 + spread.clamp(0.0, 1.0))
    }

    /// A look went well: the next failure is the first.
    pub(crate) fn went_well(&self, name: &str) {
        self.lock().remove(name);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Failures>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_are_spread_and_begin_anew_after_a_success() {
        let (retries, mut now) = (Retries::default(), Instant::now());
        let mut fail = |name: &str, spread| {
            let wait = retries.failed(name, now, spread);
            now += wait;
            wait.as_secs_f64()
        };
        assert_eq!([fail("a", 0.5), fail("a", 0.5), fail("a", 0.5), fail("b", 0.5)], [1.0, 2.0, 4.0, 1.0]);
        assert_eq!([fail("a", 0.0), fail("a", 1.0)], [4.0, 24.0]);
        for _ in 0..40 {
            assert!(fail("a", 1.0) <= 90.0);
        }
        retries.went_well("a");
        assert_eq!(fail("a", 0.5), 1.0);
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let (retries, now) = (Retries::default(), Instant::now());
        retries.failed("gone", now, 0.0);
        retries.failed("here", now + 3 * LONGEST, 0.0);
        assert_eq!(retries.lock().keys().collect::<Vec<_>>(), ["here"]);
    }
}
