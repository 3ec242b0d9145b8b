//! What the next broker needs to know about an endpoint.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{Endpoint as Spec, LostSession, Rejection};
use virtiofs_contract::counters::Totals;
use virtiofs_contract::preflight::Preflight;

use super::release::Released;
use crate::engine::source::SourceLocation;
use crate::holder::names::Part;
use crate::holder::{Hold, Parts};
use crate::listen::BoundSocket;
use crate::state_file::{StateFile, StateFileError};

/// Most bytes of a stored endpoint. Its preflight names every file system of the source.
const MOST: usize = 4 << 20;

/// Everything about an endpoint that outlives the broker, except its sessions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoredEndpoint {
    pub(super) spec: Spec,
    pub(super) preflight: Preflight,
    /// Device and inode number of its socket; none: it does not listen.
    pub(super) socket: Option<(u64, u64)>,
    /// When its release ends, in seconds since the Unix epoch.
    pub(super) released_until: Option<u64>,
    pub(super) counts: Counts,
}

impl StoredEndpoint {
    /// What its engines serve, and how; none: the source is released.
    pub(crate) fn served(self) -> Option<(SourceLocation, EngineConfig)> {
        if self.released_until.and_then(Released::until).is_some() {
            return None;
        }
        let Spec { source, sub_path, engine, .. } = self.spec;
        Some((SourceLocation { source, sub_path }, engine))
    }
}

/// Counts of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) rejected_connections: u64,
    pub(super) rejected_exclusive: u64,
    #[serde(default)]
    pub(super) rejected_memory: u64,
    pub(super) last_rejection: Option<Rejection>,
    /// Sessions that ended, and their engines.
    pub(super) sessions_ended: u64,
    pub(super) engines_ended: u64,
    /// Sessions that were lost with a broker.
    pub(super) sessions_lost: u64,
    /// The last of them, oldest first.
    #[serde(default)]
    pub(super) lost: Vec<LostSession>,
    /// Counts of sessions that ended.
    pub(super) ended: Totals,
    /// Serial numbers of sessions that are counted above and may still be held.
    #[serde(default)]
    pub(super) accounted: BTreeSet<u64>,
}

/// The state of one endpoint at the holder.
#[derive(Debug)]
pub(super) struct State {
    file: Option<StateFile<StoredEndpoint>>,
    hold: Hold,
}

impl State {
    /// That of a new endpoint. It is created with the first write.
    pub(super) fn new(hold: Hold) -> Self {
        State { file: None, hold }
    }

    /// Reads the state of an earlier broker.
    pub(super) fn restored(parts: &mut Parts, hold: Hold) -> Result<(Self, StoredEndpoint), StateFileError> {
        let file = parts.remove(&Part::State).ok_or_else(|| crate::engine::persistent::missing(Part::State))?;
        let (file, stored) = StateFile::open(file.try_clone()?)?;
        Ok((State { file: Some(file), hold }, stored))
    }

    /// Writes the state, if descriptors outlive the broker.
    pub(super) fn write(&mut self, stored: &StoredEndpoint) {
        if self.hold.is_present()
            && let Err(error) = self.try_write(stored)
        {
            tracing::error!(endpoint = stored.spec.name, %error, "state of the endpoint not recorded");
        }
    }

    fn try_write(&mut self, stored: &StoredEndpoint) -> Result<(), StateFileError> {
        if let Some(file) = &mut self.file {
            return file.write(stored);
        }
        let mut file = StateFile::create("virtiofs-endpoint", MOST)?;
        file.write(stored)?;
        self.hold.deposit_copy(Part::State, &file)?;
        self.file = Some(file);
        Ok(())
    }

    /// Deposits the socket, in place of an earlier one, and its directory, opened for reading.
    pub(super) fn deposit(&self, socket: &BoundSocket, directory: Option<OwnedFd>) {
        self.withdraw();
        let deposited = self.hold.deposit_copy(Part::Listener, socket.listener()).and_then(|()| match directory {
            Some(directory) => self.hold.deposit_copy(Part::Directory, directory),
            None => Ok(()),
        });
        if let Err(error) = deposited {
            tracing::error!(%error, "socket does not outlive the broker");
        }
    }

    /// The endpoint does not listen any more.
    pub(super) fn withdraw(&self) {
        self.hold.remove(Part::Listener);
        self.hold.remove(Part::Directory);
    }
}

/// Takes a copy of a descriptor.
pub(super) fn copy_of(parts: &Parts, part: Part) -> Option<OwnedFd> {
    parts.get(&part).map(Arc::as_ref).and_then(|fd| fd.as_fd().try_clone_to_owned().ok())
}
