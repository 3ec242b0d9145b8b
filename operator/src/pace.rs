//! How often the same object is looked at: what happens to a thousand exports at once is worth one look, not a
//! thousand.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// When each object of a kind may be looked at next.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    next: Mutex<HashMap<String, Instant>>,
}

impl Pace {
    /// Takes the turn of an object, which then rests for `rest`; or says how long it has to wait for it.
    pub(crate) fn take(&self, name: &str, rest: Duration, now: Instant) -> Result<(), Duration> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = next.get(name).filter(|at| **at > now) {
            return Err(*at - now);
        }
        // What has rested is as good as new, and its name may never come again.
        next.retain(|_, at| *at > now);
        next.insert(name.to_owned(), now + rest);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_object_has_its_own_turn() {
        let (pace, now) = (Pace::default(), Instant::now());
        let second = Duration::from_secs(1);
        assert_eq!(pace.take("a", second * 2, now), Ok(()));
        assert_eq!(pace.take("a", second * 2, now + second), Err(second));
        assert_eq!(pace.take("b", second, now + second), Ok(()));
        assert_eq!(pace.take("a", second * 2, now + second * 2), Ok(()));
        assert_eq!(pace.take("b", second, now + second * 9), Ok(()));
        assert_eq!(pace.next.lock().unwrap().len(), 1);
    }
}
