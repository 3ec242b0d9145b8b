//! How often the same object is looked at: what happens to a thousand exports at once is worth one look, not a
//! thousand.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The last look at each object of a kind.
#[derive(Debug)]
pub(crate) struct Pace {
    rest: Duration,
    last: Mutex<HashMap<String, Instant>>,
}

impl Pace {
    /// Looks at one object are `rest` apart at least.
    pub(crate) fn new(rest: Duration) -> Self {
        Pace { rest, last: Mutex::default() }
    }

    /// Takes the turn of an object, or says how long it has to wait for it.
    pub(crate) fn take(&self, name: &str, now: Instant) -> Result<(), Duration> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let next = last.get(name).map(|at| *at + self.rest).filter(|next| *next > now);
        match next {
            Some(next) => Err(next - now),
            None => {
                // What has rested for long is as good as new, and its name may never come again.
                last.retain(|_, at| now.saturating_duration_since(*at) < self.rest);
                last.insert(name.to_owned(), now);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_object_has_its_own_turn() {
        let (pace, now) = (Pace::new(Duration::from_secs(2)), Instant::now());
        assert_eq!(pace.take("a", now), Ok(()));
        assert_eq!(pace.take("a", now + Duration::from_secs(1)), Err(Duration::from_secs(1)));
        assert_eq!(pace.take("b", now + Duration::from_secs(1)), Ok(()));
        assert_eq!(pace.take("a", now + Duration::from_secs(2)), Ok(()));
        assert_eq!(pace.take("b", now + Duration::from_secs(9)), Ok(()));
        assert_eq!(pace.last.lock().unwrap().len(), 1);
    }
}
