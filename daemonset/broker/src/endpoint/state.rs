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
use crate::engine::unknown_fields;
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
    /// Fields of `spec` that this broker or one before it did not know, and that no agent has applied since.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) unknown: Vec<String>,
}

impl StoredEndpoint {
    /// Reads the state that an earlier broker has written.
    fn open(file: OwnedFd) -> Result<(StateFile<Self>, Self), StateFileError> {
        let (file, mut stored, unknown) = StateFile::<Self>::open_newer(file)?;
        stored.unknown.extend(unknown_fields::of_endpoint(unknown));
        Ok((file, stored))
    }

    /// Reads the state without continuing it. Returns what its engines serve, and how; none: the source is released.
    ///
    /// # Errors
    /// It cannot be read, or engines of this broker must not serve it.
    pub(crate) fn read_served(file: OwnedFd) -> Result<Option<(SourceLocation, EngineConfig)>, String> {
        let (_, stored) =
            Self::open(file).map_err(|error| format!("this broker cannot read the state of an endpoint: {error}"))?;
        unknown_fields::check(&stored.unknown)
            .map_err(|finding| format!("endpoint {}: {finding}", stored.spec.name))?;
        Ok(stored.served())
    }

    /// What its engines serve, and how; none: the source is released.
    fn served(self) -> Option<(SourceLocation, EngineConfig)> {
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
        let (file, stored) = StoredEndpoint::open(file.try_clone()?)?;
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

#[cfg(test)]
mod tests {
    use virtiofs_client::fixtures;

    use super::*;
    use crate::state_file::{check_layout, file_of};

    #[test]
    fn endpoint_of_another_release_is_read() {
        let present = sample();
        let mut older = serde_json::to_value(&present).unwrap();
        older["counts"].as_object_mut().unwrap().remove("rejected_memory").unwrap();
        older["counts"].as_object_mut().unwrap().remove("accounted").unwrap();
        older["counts"].as_object_mut().unwrap().remove("lost").unwrap();
        older.as_object_mut().unwrap().remove("unknown").unwrap();
        let (_, read) = StoredEndpoint::open(file_of(&older)).unwrap();
        assert_eq!((&read.spec, read.counts.rejected_memory, read.unknown.len()), (&present.spec, 0, 0));

        let mut newer = serde_json::to_value(&present).unwrap();
        newer["new"] = 1.into();
        newer["counts"]["new"] = 2.into();
        newer["spec"]["engine"]["noLinks"] = true.into();
        let (_, read) = StoredEndpoint::open(file_of(&newer)).unwrap();
        assert_eq!(read.unknown, ["spec.oneGuest", "spec.engine.noLinks"], "also what the one before did not know");
        assert_eq!(StoredEndpoint { unknown: present.unknown.clone(), ..read }, present);
        let refused = StoredEndpoint::read_served(file_of(&newer)).unwrap_err();
        assert!(refused.contains("data") && refused.contains("spec.engine.noLinks"), "{refused}");
    }

    #[test]
    fn endpoints_are_stored_in_the_layout_of_their_version() {
        check_layout("endpoint", &sample());
    }

    fn sample() -> StoredEndpoint {
        let ended = Totals { bytes_read: 8, ..Totals::default() };
        StoredEndpoint {
            spec: Spec { sub_path: Some("a".into()), consumer: Some("pod ns/vm".into()), ..fixtures::endpoint("data") },
            preflight: fixtures::preflight(vec![fixtures::finding()]),
            socket: Some((1, 2)),
            released_until: Some(3),
            counts: Counts {
                rejected_connections: 4,
                rejected_exclusive: 5,
                rejected_memory: 6,
                last_rejection: Some(Rejection { at: 7, message: "reason".into() }),
                sessions_ended: 9,
                engines_ended: 10,
                sessions_lost: 11,
                lost: vec![LostSession { at: 14, session: "data-0".into() }],
                ended,
                accounted: BTreeSet::from([12, 13]),
            },
            unknown: vec!["spec.oneGuest".into()],
        }
    }
}
