//! When a reconcile that failed is repeated: later after each failure in a row, and not for all objects at once.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Wait after the first failure in a row, before jitter.
const FIRST: Duration = Duration::from_secs(1);
/// Longest wait, before jitter.
const LONGEST: Duration = Duration::from_secs(60);

/// Objects of one kind whose last reconcile failed.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failed: Mutex<HashMap<String, Failures>>,
}

/// Failures in a row.
#[derive(Debug, Default)]
struct Failures {
    count: u32,
    last: Option<Instant>,
}

impl Backoff {
    /// Records a failure; returns the wait before the next attempt. `jitter`, from 0 to 1, spreads it from half to one
    /// and a half of its length, so that objects that failed together are not retried together.
    pub(crate) fn failed(&self, name: &str, now: Instant, jitter: f64) -> Duration {
        let mut failed = self.lock();
        // Nobody reports a success for an object that was deleted.
        failed.retain(|_, it| it.last.is_some_and(|last| now.saturating_duration_since(last) < 2 * LONGEST));
        let failures = failed.entry(name.to_owned()).or_default();
        let wait = FIRST.saturating_mul(1u32.checked_shl(failures.count).unwrap_or(u32::MAX)).min(LONGEST);
        *failures = Failures { count: failures.count.saturating_add(1), last: Some(now) };
        wait.mul_f64(0.5 + jitter.clamp(0.0, 1.0))
    }

    /// Records a success: the next failure is the first in a row.
    pub(crate) fn succeeded(&self, name: &str) {
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
    fn waits_double_have_jitter_and_restart_after_a_success() {
        let (backoff, mut now) = (Backoff::default(), Instant::now());
        let mut fail = |name: &str, jitter| {
            let wait = backoff.failed(name, now, jitter);
            now += wait;
            wait.as_secs_f64()
        };
        assert_eq!([fail("a", 0.5), fail("a", 0.5), fail("a", 0.5), fail("b", 0.5)], [1.0, 2.0, 4.0, 1.0]);
        assert_eq!([fail("a", 0.0), fail("a", 1.0)], [4.0, 24.0]);
        for _ in 0..40 {
            assert!(fail("a", 1.0) <= 90.0);
        }
        backoff.succeeded("a");
        assert_eq!(fail("a", 0.5), 1.0);
    }

    #[test]
    fn objects_that_are_gone_are_dropped() {
        let (backoff, now) = (Backoff::default(), Instant::now());
        backoff.failed("gone", now, 0.0);
        backoff.failed("here", now + 3 * LONGEST, 0.0);
        assert_eq!(backoff.lock().keys().collect::<Vec<_>>(), ["here"]);
    }
}
