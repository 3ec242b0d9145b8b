//! All endpoints by name, and the rules that span several of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::endpoint::admission::Tally;

/// What these rules need to know about one endpoint.
pub(crate) trait Member {
    /// A release of its source.
    type Release;

    /// True if it does not listen and has no session.
    fn is_over(&self) -> bool;

    /// Its sessions, for budgets.
    fn tally(&self) -> Tally;

    /// Number of its sessions if it is exclusive and serves this source, else 0.
    fn exclusive_sessions(&self, source: &Path) -> usize;

    /// Its release, if it serves this source.
    fn release_of(&self, source: &Path) -> Option<Self::Release>;
}

/// All endpoints of a broker.
#[derive(Debug)]
pub(crate) struct Endpoints<E> {
    by_name: Mutex<BTreeMap<String, Arc<E>>>,
    /// Held while a session is admitted: if two connect at the same time, at two exclusive endpoints of one source, one
    /// must find the other.
    admitting: Mutex<()>,
}

impl<E> Default for Endpoints<E> {
    fn default() -> Self {
        Endpoints { by_name: Mutex::default(), admitting: Mutex::default() }
    }
}

impl<E: Member> Endpoints<E> {
    /// The endpoints that listen or have sessions.
    pub(crate) fn live(&self) -> MutexGuard<'_, BTreeMap<String, Arc<E>>> {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        by_name.retain(|_, endpoint| !endpoint.is_over());
        by_name
    }

    /// Adds an endpoint, even if it does not listen yet.
    pub(crate) fn insert(&self, name: String, endpoint: Arc<E>) {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner).insert(name, endpoint);
    }

    /// The endpoint of this name, even if it does not listen yet.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<E>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Clones of the live endpoints, without the lock.
    pub(crate) fn all(&self) -> Vec<Arc<E>> {
        self.live().values().cloned().collect()
    }

    /// Locks admission. Hold it until the session is in the list, and take it before the lock of any endpoint.
    pub(crate) fn admit(&self) -> MutexGuard<'_, ()> {
        self.admitting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sessions of all endpoints.
    pub(crate) fn tallies(&self) -> Vec<Tally> {
        self.all().iter().map(|endpoint| endpoint.tally()).collect()
    }

    /// The release of this source, if any endpoint has released it.
    pub(crate) fn release_of(&self, source: &Path) -> Option<E::Release> {
        self.all().iter().find_map(|endpoint| endpoint.release_of(source))
    }

    /// Number of sessions of other exclusive endpoints of this source.
    pub(crate) fn sessions_beside(&self, endpoint: &E, source: &Path) -> usize {
        let others = self.all().into_iter().filter(|other| !std::ptr::eq(&raw const **other, endpoint));
        others.map(|other| other.exclusive_sessions(source)).sum()
    }
}
