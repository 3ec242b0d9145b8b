//! Endpoints and sessions of an earlier broker.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use virtiofs_contract::control::{EndpointKind, LostSession};

use super::listening::Listening;
use super::release::Released;
use super::state::{State, StoredEndpoint, copy_of};
use super::{Endpoint, Inner};
use crate::blocking::Call;
use crate::channel::{Receiver, channel};
use crate::disposal::Account;
use crate::endpoint::endpoints::Endpoints;
use crate::endpoint::host::Host;
use crate::holder::Parts;
use crate::holder::names::{Group, Part};
use crate::listen::{BoundSocket, Directory, ListenError};
use crate::session::Command;
use crate::session::restore::{RestoreError, Restoring};
use crate::state_file::StateFileError;

/// Time limit of a restart for opening the directory of a socket that is not held.
const RESTORING: Duration = Duration::from_secs(1);

impl Endpoint {
    /// The endpoint of an earlier broker. It does not accept connections before [`Endpoint::accept_again`].
    pub(crate) fn restored(
        serial: u64,
        mut parts: Parts,
        host: Arc<Host>,
        others: &Arc<Endpoints<Endpoint>>,
    ) -> Result<(Arc<Self>, Option<Receiver<()>>), StateFileError> {
        let hold = host.holder.group(Group::Endpoint(serial));
        let (state, stored) = State::restored(&mut parts, hold.clone())?;
        let socket = restored_socket(&stored, &parts).unwrap_or_else(|error| {
            tracing::warn!(endpoint = stored.spec.name, %error, "socket not restored; the agent creates it again");
            None
        });
        let StoredEndpoint { spec, preflight, released_until, counts, unknown, .. } = stored;
        let released = released_until.and_then(Released::until);
        let mut inner = Inner::new(spec, preflight, released, counts, state);
        inner.unknown.add(unknown);
        let mut stopped = None;
        if let Some(socket) = socket {
            // It listens from now on: an endpoint that does not, and has no session, is removed.
            let (stop, receiver) = channel()?;
            inner.listening = Some(Listening { socket: Arc::new(socket), stop });
            stopped = Some(receiver);
        }
        if let Some(released) = released {
            host.starter.bar_preflights(&inner.location(), released.until);
        }
        Ok((Self::begin(inner, hold, host, others), stopped))
    }

    /// Accepts connections at the socket of an earlier broker, until it is stopped.
    pub(crate) fn accept_again(self: &Arc<Self>, stopped: Receiver<()>) -> io::Result<()> {
        let mut inner = self.inner();
        let Some(listening) = &inner.listening else { return Ok(()) };
        // An endpoint that does not listen is created again by the agent.
        self.accept_until_stopped(&listening.socket.clone(), stopped).inspect_err(|_| inner.listening = None)
    }

    /// Continues a session of an earlier broker.
    pub(crate) fn restore_session(self: &Arc<Self>, serial: u64, restoring: Restoring) -> Result<(), RestoreError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.unknown.add(restoring.unknown.clone());
        let service = self.service(&inner, serial, false);
        let account = Account::below(&self.account);
        let (sender, commands) = channel()?;
        let (session, shared) = restoring.restore(service, &self.host.engines, &account, (sender.clone(), commands))?;
        // The configuration may have changed just before the broker ended.
        sender.send(Command::Reconfigure(Box::new(inner.spec.engine.clone()), shared.next_generation()));
        if session.has_foreign_engine() {
            sender.send(Command::HandOver(shared.next_generation()));
        }
        if shared.view().begun {
            self.host.list.add(serial, &inner.spec.name);
        }
        Ok(self.run_session(&mut inner, session, serial, shared, sender)?)
    }

    /// Counts sessions of an earlier broker that could not be continued.
    pub(crate) fn count_lost(&self, sessions: Vec<LostSession>) {
        let mut inner = self.inner();
        inner.counts.add_lost(sessions);
        inner.save();
    }
}

fn restored_socket(stored: &StoredEndpoint, parts: &Parts) -> Result<Option<BoundSocket>, ListenError> {
    let (Some(identity), Some(listener)) = (stored.socket, copy_of(parts, Part::Listener)) else { return Ok(None) };
    let path = stored.spec.socket.path.clone();
    if stored.spec.kind == EndpointKind::Listener {
        return BoundSocket::of_requester(listener.into(), &path).map(Some);
    }
    let directory = match copy_of(parts, Part::Directory) {
        Some(directory) => Directory::held(directory),
        None => directory_of(path.clone())?,
    };
    BoundSocket::restored(listener, directory, &path, identity).map(Some)
}

/// Opens the directory of a socket. One that hangs delays the other endpoints by [`RESTORING`] only.
fn directory_of(path: PathBuf) -> Result<Directory, ListenError> {
    let named = path.clone();
    let open = Call::start(move || Directory::of_path(&path), drop);
    let opened =
        open.map_err(|error| ListenError::Io { path: named.clone(), error })?.until(Instant::now() + RESTORING);
    opened.ok_or(ListenError::Blocked(named))?
}
