//! Requests that change the same endpoint or socket follow one another.
//!
//! A change may be blocked by the file system of a socket. It holds its name and its path until it returns, but no lock:
//! other changes wait for it for as long as they like.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What one change at a time may touch: the name of an endpoint, and the path of a socket, which begins with `/`.
type Keys = BTreeSet<String>;

/// The changes that are under way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    held: Mutex<Keys>,
    ended: Condvar,
}

/// A change. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Change {
    keys: Keys,
    of: Changes,
}

impl Changes {
    /// Begins a change of the endpoint of this name and the socket of this path, once no other change has one of them.
    /// None: the deadline comes first.
    pub(crate) fn begin(&self, name: &str, socket: &Path, deadline: Instant) -> Option<Change> {
        let keys = Keys::from([name.to_owned(), socket.to_string_lossy().into_owned()]);
        let longest = deadline.saturating_duration_since(Instant::now());
        let busy = |held: &mut Keys| !held.is_disjoint(&keys);
        let waited = self.0.ended.wait_timeout_while(self.held(), longest, busy);
        let mut held = waited.unwrap_or_else(PoisonError::into_inner).0;
        if !held.is_disjoint(&keys) {
            return None;
        }
        held.extend(keys.iter().cloned());
        Some(Change { keys, of: self.clone() })
    }

    fn held(&self) -> MutexGuard<'_, Keys> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        self.of.held().retain(|key| !self.keys.contains(key));
        self.of.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn change_waits_for_those_with_its_name_or_socket_only() {
        let changes = Changes::default();
        let begin = |name: &str, socket: &str, longest| {
            changes.begin(name, Path::new(socket), Instant::now() + Duration::from_millis(longest))
        };
        let one = begin("a", "/a.sock", 0).unwrap();
        assert!(begin("a", "/b.sock", 1).is_none() && begin("b", "/a.sock", 1).is_none());
        let other = begin("b", "/b.sock", 0).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| begin("a", "/b.sock", 60_000).is_some());
            drop(one);
            drop(other);
            assert!(waiting.join().unwrap());
        });
        assert!(begin("a", "/b.sock", 0).is_some(), "nothing is left behind");
    }
}
