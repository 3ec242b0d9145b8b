//! Endpoints by name, and what holds across several of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::endpoint::{Endpoint, Released};

/// All endpoints of a broker.
#[derive(Debug, Default)]
pub(crate) struct Endpoints {
    by_name: Mutex<BTreeMap<String, Arc<Endpoint>>>,
    /// Held while a session is admitted to an exclusive endpoint: of two that come at once, at two endpoints of one
    /// source, one must find the other.
    admitting: Mutex<()>,
}

impl Endpoints {
    /// Those that listen or have sessions.
    pub(crate) fn living(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Endpoint>>> {
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        by_name.retain(|_, endpoint| !endpoint.is_over());
        by_name
    }

    /// The same, none of them held.
    pub(crate) fn all(&self) -> Vec<Arc<Endpoint>> {
        self.living().values().cloned().collect()
    }

    /// From here on nobody else is admitted to an exclusive endpoint. To be held until the session is entered, and to be
    /// taken before any lock of an endpoint.
    pub(crate) fn admit(&self) -> MutexGuard<'_, ()> {
        self.admitting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many sessions there are at all of them.
    pub(crate) fn sessions(&self) -> usize {
        self.all().iter().map(|endpoint| endpoint.sessions()).sum()
    }

    /// The release of this source, if any of them has let go of it.
    pub(crate) fn release_of(&self, source: &Path) -> Option<Released> {
        self.all().iter().find_map(|endpoint| endpoint.release_of(source))
    }

    /// How many sessions other exclusive endpoints of this source have.
    pub(crate) fn sessions_beside(&self, endpoint: &Endpoint, source: &Path) -> usize {
        let others = self.all().into_iter().filter(|other| !std::ptr::eq(&raw const **other, endpoint));
        others.map(|other| other.exclusive_sessions(source)).sum()
    }
}
