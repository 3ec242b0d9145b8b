//! The socket of an endpoint. Its directory may be on a file system that hangs, so a socket is prepared and removed in threads
//! of their own, without a lock, and put into use with one.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use virtiofs_contract::control::{Endpoint as Spec, EndpointKind, SocketSpec};
use virtiofs_contract::preflight::Preflight;

use super::changes::Change;
use super::{Endpoint, LiveSession};
use crate::blocking::Call;
use crate::channel::{Receiver, Sender, channel};
use crate::listen::{BoundSocket, Given, ListenError};
use crate::session::Command;

/// A socket that accepts connections.
#[derive(Debug)]
pub(super) struct Listening {
    pub(super) socket: Arc<BoundSocket>,
    pub(super) stop: Sender<()>,
}

impl Listening {
    /// Stops accepting. Returns the socket, which is still at its path.
    pub(super) fn stop(self) -> Arc<BoundSocket> {
        self.stop.send(());
        self.socket
    }
}

/// The socket of an endpoint, and what it was created for.
#[derive(Debug)]
pub(crate) struct Current {
    spec: SocketSpec,
    socket: Arc<BoundSocket>,
}

/// A socket that an endpoint can use.
#[derive(Debug)]
pub(crate) enum Prepared {
    /// The one that it has.
    InPlace(Arc<BoundSocket>),
    /// Another one, and its directory, if that can be read.
    New(Arc<BoundSocket>, Option<OwnedFd>),
}

impl Prepared {
    /// The socket, if it is to be removed when it is not used.
    pub(crate) fn unused(self) -> Option<Arc<BoundSocket>> {
        match self {
            Prepared::InPlace(_) => None,
            Prepared::New(socket, _) => Some(socket),
        }
    }
}

/// Prepares a socket of this specification. `given`: the descriptor of the request, by
/// the kind of the endpoint. The change is under way until
/// the file system responds. Returns it with the socket.
///
/// # Errors
/// The socket cannot be created, or its file system does not respond by the deadline.
pub(crate) fn prepare(
    spec: SocketSpec,
    current: Option<Current>,
    given: (EndpointKind, Option<OwnedFd>),
    change: Change,
    deadline: Instant,
) -> Result<(Prepared, Change), ListenError> {
    let path = spec.path.clone();
    let failed = |error| ListenError::Io { path: path.clone(), error };
    let prepare = move || (find_or_bind(&spec, current.as_ref(), given), change);
    let late = |(prepared, _change): (Result<Prepared, ListenError>, Change)| {
        prepared.ok().and_then(Prepared::unused).iter().for_each(|socket| socket.unlink());
    };
    let (prepared, change) =
        Call::start(prepare, late).map_err(failed)?.until(deadline).ok_or(ListenError::Blocked(path))?;
    Ok((prepared?, change))
}

fn find_or_bind(
    spec: &SocketSpec,
    current: Option<&Current>,
    (kind, fd): (EndpointKind, Option<OwnedFd>),
) -> Result<Prepared, ListenError> {
    let given = Given::new(kind, fd, &spec.path)?;
    let fits =
        |current: &&Current| current.spec.path == spec.path && given.is(&current.socket) && current.socket.check();
    if let Some(current) = current.filter(fits) {
        if current.spec != *spec {
            let set = current.socket.set_access(spec);
            set.map_err(|error| ListenError::Io { path: spec.path.clone(), error })?;
        }
        return Ok(Prepared::InPlace(current.socket.clone()));
    }
    let socket = BoundSocket::at(given, spec)?;
    let directory = socket.readable_directory();
    Ok(Prepared::New(Arc::new(socket), directory))
}

/// Removes sockets from their paths. Those on file systems that do not respond by the deadline are removed when these do.
pub(crate) fn unlink(sockets: Vec<Arc<BoundSocket>>, deadline: Instant) {
    let mut calls = Vec::new();
    for (_, sockets) in by_device(sockets) {
        let first = sockets.first().cloned();
        match Call::start(move || sockets.iter().for_each(|socket| socket.unlink()), drop) {
            Ok(call) => calls.push((call, first)),
            Err(error) => tracing::warn!(?first, %error, "sockets not removed"),
        }
    }
    for (call, socket) in calls {
        if call.until(deadline).is_none() {
            tracing::warn!(?socket, "socket not removed yet: the file system of its directory does not respond");
        }
    }
}

/// Sockets by the device that they are on. Those of one device respond, or hang, together.
pub(super) fn by_device(sockets: Vec<Arc<BoundSocket>>) -> BTreeMap<u64, Vec<Arc<BoundSocket>>> {
    let mut devices: BTreeMap<u64, Vec<Arc<BoundSocket>>> = BTreeMap::new();
    for socket in sockets {
        devices.entry(socket.identity().0).or_default().push(socket);
    }
    devices
}

/// An endpoint was not changed.
#[derive(Debug)]
pub(crate) struct NotApplied {
    pub(crate) error: ListenError,
    /// The socket that was prepared for it.
    pub(crate) unused: Option<Arc<BoundSocket>>,
}

impl Endpoint {
    /// Changes the endpoint to this specification, with a socket that was prepared for it. Sessions stay; they are handed over
    /// if the configuration changes. Returns its earlier socket, if it had another one.
    pub(crate) fn apply(
        self: &Arc<Self>,
        spec: Spec,
        preflight: Preflight,
        prepared: Prepared,
    ) -> Result<Option<Arc<BoundSocket>>, NotApplied> {
        let mut inner = self.inner();
        let before = match prepared {
            Prepared::InPlace(socket) if inner.listens_at(&socket) => None,
            Prepared::InPlace(_) => {
                return Err(NotApplied { error: ListenError::Removed(spec.socket.path), unused: None });
            }
            Prepared::New(socket, directory) => match self.accept(&socket) {
                Ok(stop) => {
                    inner.state.deposit(&socket, directory);
                    tracing::info!(endpoint = spec.name, socket = %spec.socket.path.display(), "listening");
                    inner.listening.replace(Listening { socket, stop }).map(Listening::stop)
                }
                Err(error) => {
                    let error = ListenError::Io { path: spec.socket.path, error };
                    return Err(NotApplied { error, unused: Some(socket) });
                }
            },
        };
        inner.spec = spec;
        inner.preflight = preflight;
        let was_unknown = inner.unknown.clear();
        inner.save();
        let reconfigure = |live: &LiveSession| {
            live.sender.send(Command::Reconfigure(Box::new(inner.spec.engine.clone()), live.shared.next_generation()));
            // What this broker knows of the configuration may be the same.
            if was_unknown {
                live.sender.send(Command::HandOver(live.shared.next_generation()));
            }
        };
        inner.sessions.values().for_each(reconfigure);
        Ok(before)
    }

    /// The socket at which it listens.
    pub(crate) fn socket(&self) -> Option<Arc<BoundSocket>> {
        self.inner().listening.as_ref().map(|listening| listening.socket.clone())
    }

    /// Its socket, and what it was created for.
    pub(crate) fn current(&self) -> Option<Current> {
        let inner = self.inner();
        let socket = inner.listening.as_ref()?.socket.clone();
        Some(Current { spec: inner.spec.socket.clone(), socket })
    }

    /// Starts to accept connections. They end with the returned sender's message.
    fn accept(self: &Arc<Self>, socket: &BoundSocket) -> io::Result<Sender<()>> {
        let (stop, stopped) = channel()?;
        self.accept_until_stopped(socket, stopped)?;
        Ok(stop)
    }

    pub(super) fn accept_until_stopped(
        self: &Arc<Self>,
        socket: &BoundSocket,
        stopped: Receiver<()>,
    ) -> io::Result<()> {
        let listener = socket.listener().try_clone()?;
        listener.set_nonblocking(true)?;
        let endpoint = self.clone();
        let accept = move || endpoint.accept_until(&listener, &stopped);
        thread::Builder::new().name("accept".into()).spawn(accept)?;
        Ok(())
    }

    /// Stops listening. Sessions continue, unless `force` ends them. Returns the socket, which is still at its path.
    pub(crate) fn remove(&self, force: bool) -> Option<Arc<BoundSocket>> {
        let mut inner = self.inner();
        let socket = inner.listening.take().map(Listening::stop);
        if socket.is_some() {
            inner.state.withdraw();
            inner.save();
            tracing::info!(endpoint = inner.spec.name, sessions = inner.sessions.len(), force, "no longer listening");
        }
        if force {
            inner.sessions.iter().for_each(|(id, live)| self.end(id, live));
        }
        socket
    }
}
