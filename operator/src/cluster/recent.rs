//! What was written a moment ago and may not have come back through the watch yet. Without it, each look in that
//! moment would write the same once more.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long something written is believed without having been seen. A watch that is later than that has other troubles.
const BELIEVED: Duration = Duration::from_secs(5);

/// Values written a moment ago, by name.
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
    /// Remembers what was written.
    pub(crate) fn put(&self, key: K, value: V, now: Instant) {
        let mut written = self.lock();
        written.retain(|_, (at, _)| now.saturating_duration_since(*at) < BELIEVED);
        written.insert(key, (now, value));
    }

    /// Forgets what was written: a watch has brought it back.
    pub(crate) fn forget(&self, key: &K) {
        self.lock().remove(key);
    }

    /// What was written, unless that is long ago.
    pub(crate) fn get(&self, key: &K, now: Instant) -> Option<V> {
        let written = self.lock();
        let (at, value) = written.get(key)?;
        (now.saturating_duration_since(*at) < BELIEVED).then(|| value.clone())
    }

    /// Everything that was written and is not long ago.
    pub(crate) fn all(&self, now: Instant) -> Vec<V> {
        let young = |at: &Instant| now.saturating_duration_since(*at) < BELIEVED;
        self.lock().values().filter(|(at, _)| young(at)).map(|(_, value)| value.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, (Instant, V)>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_believed_for_a_while() {
        let (recent, now) = (Recent::default(), Instant::now());
        recent.put("a", 1, now);
        recent.put("a", 2, now);
        assert_eq!(recent.get(&"a", now), Some(2));
        assert_eq!(recent.get(&"b", now), None);
        assert_eq!((recent.get(&"a", now + BELIEVED), recent.all(now + BELIEVED).len()), (None, 0));
        recent.put("c", 3, now + BELIEVED);
        assert_eq!(recent.lock().len(), 1);
        recent.forget(&"c");
        assert_eq!(recent.get(&"c", now + BELIEVED), None);
    }
}
