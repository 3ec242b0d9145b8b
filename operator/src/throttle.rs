//! How often one object is reconciled: a thousand exports that change at once are worth one reconcile of their share.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The earliest next reconcile of each object of one kind.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    next: Mutex<HashMap<String, Instant>>,
}

impl Throttle {
    /// Admits a reconcile, and no other for `interval`; else returns the time until one is admitted.
    pub(crate) fn admit(&self, name: &str, interval: Duration, now: Instant) -> Result<(), Duration> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = next.get(name).filter(|at| **at > now) {
            return Err(*at - now);
        }
        // An expired entry has no effect, and its object may never be reconciled again.
        next.retain(|_, at| *at > now);
        next.insert(name.to_owned(), now + interval);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_throttled_one_by_one() {
        let (throttle, now) = (Throttle::default(), Instant::now());
        let second = Duration::from_secs(1);
        assert_eq!(throttle.admit("a", second * 2, now), Ok(()));
        assert_eq!(throttle.admit("a", second * 2, now + second), Err(second));
        assert_eq!(throttle.admit("b", second, now + second), Ok(()));
        assert_eq!(throttle.admit("a", second * 2, now + second * 2), Ok(()));
        assert_eq!(throttle.admit("b", second, now + second * 9), Ok(()));
        assert_eq!(throttle.next.lock().unwrap().len(), 1);
    }
}
