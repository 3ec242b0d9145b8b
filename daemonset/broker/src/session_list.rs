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
    listed: Mutex<Listed>,
}

/// What the list contains.
#[derive(Debug, Default)]
struct Listed {
    /// Sessions that exist.
    sessions: Sessions,
    /// Lost sessions that no endpoint has counted yet.
    uncounted: Sessions,
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
        (SessionList { path, listed: Mutex::default() }, before)
    }

    fn listed(&self) -> MutexGuard<'_, Listed> {
        self.listed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a session that has begun.
    pub(crate) fn add(&self, serial: u64, endpoint: &str) {
        let mut listed = self.listed();
        listed.sessions.insert(serial, endpoint.to_owned());
        self.write(&listed);
    }

    /// Removes a session that has ended.
    pub(crate) fn remove(&self, serial: u64) {
        let mut listed = self.listed();
        if listed.sessions.remove(&serial).is_some() {
            self.write(&listed);
        }
    }

    /// Writes the list even if it is empty, once the sessions of an earlier broker are accounted for. `uncounted`: lost
    /// sessions whose endpoints do not exist yet; if this broker ends before they do, the next one finds them again.
    pub(crate) fn begin(&self, uncounted: Sessions) {
        let mut listed = self.listed();
        listed.uncounted = uncounted;
        self.write(&listed);
    }

    /// Removes the lost sessions of an endpoint that has counted them.
    pub(crate) fn counted(&self, endpoint: &str) {
        let mut listed = self.listed();
        listed.uncounted.retain(|_, name| name != endpoint);
        self.write(&listed);
    }

    fn write(&self, listed: &Listed) {
        let next = self.path.with_extension("next");
        let all: BTreeMap<_, _> = listed.uncounted.iter().chain(&listed.sessions).collect();
        let written = serde_json::to_vec(&all)
            .map_err(io::Error::other)
            .and_then(|text| fs::write(&next, text))
            .and_then(|()| fs::rename(&next, &self.path));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "list of sessions not written");
        }
    }
}

/// Serial numbers of lost sessions by endpoint. `found`: those that were restored, or whose VMM hung up.
pub(crate) fn lost(before: &Sessions, found: &BTreeSet<u64>) -> BTreeMap<String, Vec<u64>> {
    let mut lost: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (serial, endpoint) in before.iter().filter(|(serial, _)| !found.contains(serial)) {
        lost.entry(endpoint.clone()).or_default().push(*serial);
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
        list.begin(Sessions::new());
        assert_eq!(SessionList::open(path.clone()).1, Sessions::new());
        fs::write(&path, "{").unwrap();
        assert_eq!(SessionList::open(path).1, Sessions::new());
    }

    #[test]
    fn sessions_without_trace_are_lost() {
        let before = Sessions::from([(1, "a".into()), (2, "a".into()), (3, "b".into()), (4, "c".into())]);
        let lost = lost(&before, &BTreeSet::from([3, 9]));
        assert_eq!(lost, BTreeMap::from([("a".into(), vec![1, 2]), ("c".into(), vec![4])]));
    }

    #[test]
    fn lost_sessions_stay_listed_until_they_are_counted() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("sessions");
        let listed = || SessionList::open(path.clone()).1;
        let (list, _) = SessionList::open(path.clone());
        list.begin(Sessions::from([(1, "a".into()), (2, "b".into())]));
        list.add(3, "a");
        assert_eq!(listed(), Sessions::from([(1, "a".into()), (2, "b".into()), (3, "a".into())]));
        list.counted("a");
        assert_eq!(listed(), Sessions::from([(2, "b".into()), (3, "a".into())]));
    }
}
