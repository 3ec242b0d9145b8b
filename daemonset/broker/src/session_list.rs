//! The sessions that exist, in a file of the runtime directory: what is listed there and not restored was lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Names of endpoints by the serial number of the session.
pub(crate) type Sessions = BTreeMap<u64, String>;

/// The list of sessions.
#[derive(Debug)]
pub(crate) struct SessionList {
    path: PathBuf,
    sessions: Mutex<Sessions>,
}

impl SessionList {
    /// Starts an empty list, and returns the sessions that an earlier broker listed.
    pub(crate) fn open(path: PathBuf) -> (Self, Sessions) {
        let before = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "list of sessions not read");
                Sessions::new()
            }),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(path = %path.display(), %error, "list of sessions not read");
                }
                Sessions::new()
            }
        };
        (SessionList { path, sessions: Mutex::default() }, before)
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a session that has begun.
    pub(crate) fn add(&self, serial: u64, endpoint: &str) {
        let mut sessions = self.sessions();
        sessions.insert(serial, endpoint.to_owned());
        self.write(&sessions);
    }

    /// Removes a session that has ended.
    pub(crate) fn remove(&self, serial: u64) {
        let mut sessions = self.sessions();
        if sessions.remove(&serial).is_some() {
            self.write(&sessions);
        }
    }

    /// Writes the list even if it is empty, once the sessions of an earlier broker are accounted for.
    pub(crate) fn begin(&self) {
        self.write(&self.sessions());
    }

    fn write(&self, sessions: &Sessions) {
        let next = self.path.with_extension("next");
        let written = serde_json::to_vec(sessions)
            .map_err(io::Error::other)
            .and_then(|text| fs::write(&next, text))
            .and_then(|()| fs::rename(&next, &self.path));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "list of sessions not written");
        }
    }
}

/// Numbers of lost sessions by endpoint. `found`: those that were restored, or whose VMM hung up.
pub(crate) fn lost(before: &Sessions, found: &BTreeSet<u64>) -> BTreeMap<String, u64> {
    let mut lost = BTreeMap::new();
    for (_, endpoint) in before.iter().filter(|(serial, _)| !found.contains(serial)) {
        *lost.entry(endpoint.clone()).or_default() += 1;
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_is_read_by_the_next_broker() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("sessions");
        let (list, before) = SessionList::open(path.clone());
        assert_eq!(before, Sessions::new());
        list.add(1, "a");
        list.add(2, "b");
        list.remove(1);
        list.remove(7);
        assert_eq!(SessionList::open(path.clone()).1, Sessions::from([(2, "b".into())]));
        let (list, _) = SessionList::open(path.clone());
        list.begin();
        assert_eq!(SessionList::open(path.clone()).1, Sessions::new());
        fs::write(&path, "{").unwrap();
        assert_eq!(SessionList::open(path).1, Sessions::new());
    }

    #[test]
    fn sessions_without_trace_are_lost() {
        let before = Sessions::from([(1, "a".into()), (2, "a".into()), (3, "b".into()), (4, "c".into())]);
        let lost = lost(&before, &BTreeSet::from([3, 9]));
        assert_eq!(lost, BTreeMap::from([("a".into(), 2), ("c".into(), 1)]));
    }
}
