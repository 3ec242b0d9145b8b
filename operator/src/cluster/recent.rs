//! Objects that were written recently and that the watch may not have returned yet. Without them, each reconcile in that
//! time would repeat the write.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a write counts without confirmation by the watch.
const VALID: Duration = Duration::from_secs(5);

/// Values that were written recently, by key.
#[derive(Debug)]
pub(crate) struct Recent<K, V> {
    written: Mutex<HashMap<K, (Instant, V)>>,
}

impl<K, V> Default for Recent<K, V> {
    fn default() -> Self {
        Recent { written: Mutex::default() }
    }
}

impl<K: Eq + Hash, V: Clone> Recent<K, V> {
    /// Records a write.
    pub(crate) fn put(&self, key: K, value: V, now: Instant) {
        let mut written = self.lock();
        written.retain(|_, (at, _)| now.saturating_duration_since(*at) < VALID);
        written.insert(key, (now, value));
    }

    /// Removes a write that the watch has returned.
    pub(crate) fn remove(&self, key: &K) {
        self.lock().remove(key);
    }

    /// The value of a recent write.
    pub(crate) fn get(&self, key: &K, now: Instant) -> Option<V> {
        let written = self.lock();
        let (at, value) = written.get(key)?;
        (now.saturating_duration_since(*at) < VALID).then(|| value.clone())
    }

    /// The values of all recent writes.
    pub(crate) fn all(&self, now: Instant) -> Vec<V> {
        let valid = |at: &Instant| now.saturating_duration_since(*at) < VALID;
        self.lock().values().filter(|(at, _)| valid(at)).map(|(_, value)| value.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, (Instant, V)>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_expire() {
        let (recent, now) = (Recent::default(), Instant::now());
        recent.put("a", 1, now);
        recent.put("a", 2, now);
        assert_eq!(recent.get(&"a", now), Some(2));
        assert_eq!(recent.get(&"b", now), None);
        assert_eq!((recent.get(&"a", now + VALID), recent.all(now + VALID).len()), (None, 0));
        recent.put("c", 3, now + VALID);
        assert_eq!(recent.lock().len(), 1);
        recent.remove(&"c");
        assert_eq!(recent.get(&"c", now + VALID), None);
    }
}
