//! One endpoint: a socket, the directory it serves, and its sessions.

mod release;
mod restore;
mod state;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use thiserror::Error;
use virtiofs_contract::control::{Endpoint as Spec, EndpointStatus, OldestRequest, PendingHandOver, Rejection};
use virtiofs_contract::preflight::Preflight;

use crate::channel::{Receiver, Sender, channel};
use crate::endpoints::{Endpoints, Member};
use crate::engine::mount_point::MountPoint;
use crate::engine::root::{Root, moved_to};
use crate::engine::source::{SourceLocation, Sources};
use crate::holder::Hold;
use crate::holder::names::Group;
use crate::host::Host;
use crate::listen::{BoundSocket, Directory, ListenError};
use crate::poll::{Interest, wait_readable};
use crate::session::shared::Shared;
use crate::session::{Command, End, Service, Session};
use crate::source_watch::{self, Watched};
use crate::vhost_user::socket::VmmSocket;
use release::Released;
use state::{Counts, State, StoredEndpoint};

/// Most sessions of one socket. Each costs an engine process.
const MAX_SESSIONS: usize = 256;

/// Most sessions of a socket for one consumer, which needs one, or two while a VM is replaced.
const MAX_SESSIONS_OF_ONE: usize = 4;

/// Most sessions of all sockets together.
const MAX_SESSIONS_OF_ALL: usize = 1024;

/// Most connections of one socket that have not sent a message yet. Each costs a thread for a few seconds.
const MAX_HALF_OPEN: usize = 16;

/// Pause if no connection can be accepted (no descriptors left).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Age in milliseconds from which the path of a request in progress is requested from the engine.
const LONG_MS: u64 = 1000;

/// An endpoint and its sessions.
#[derive(Debug)]
pub(crate) struct Endpoint {
    host: Arc<Host>,
    /// Its descriptors that outlive the broker.
    hold: Hold,
    inner: Mutex<Inner>,
    session_ended: Condvar,
    /// Held while its source is being released.
    releasing: Mutex<()>,
    /// All endpoints of the broker.
    others: Weak<Endpoints<Endpoint>>,
}

#[derive(Debug)]
struct Inner {
    spec: Spec,
    preflight: Preflight,
    listening: Option<Listening>,
    sessions: BTreeMap<String, LiveSession>,
    released: Option<Released>,
    counts: Counts,
    state: State,
}

#[derive(Debug)]
struct Listening {
    socket: BoundSocket,
    stop: Sender<()>,
}

#[derive(Debug)]
struct LiveSession {
    serial: u64,
    shared: Arc<Shared>,
    sender: Sender<Command>,
}

/// Why a connection is rejected.
#[derive(Debug, Error)]
enum RejectReason {
    #[error("the endpoint has just been removed")]
    Removed,
    #[error("the endpoint is exclusive and has a session")]
    Exclusive,
    #[error("the source is exclusive and another endpoint of it has a session")]
    ExclusiveElsewhere,
    #[error("{0} sessions is the limit of this socket")]
    TooManySessions(usize),
    #[error("{MAX_SESSIONS_OF_ALL} sessions is the limit of all sockets together")]
    TooManyInAll,
    #[error("{MAX_HALF_OPEN} connections have not sent a message yet")]
    TooManyHalfOpen,
    #[error("set-up: {0}")]
    SetUp(io::Error),
    #[error(transparent)]
    Journal(#[from] crate::record::journal::JournalError),
}

from_cause!(RejectReason::SetUp(io::Error));

impl Endpoint {
    /// Creates an endpoint that does not listen yet.
    pub(crate) fn new(
        spec: Spec,
        preflight: Preflight,
        host: Arc<Host>,
        others: &Arc<Endpoints<Endpoint>>,
        sessions_lost: u64,
    ) -> Arc<Self> {
        // A source that is released at another endpoint is not used at this one.
        let released = others.release_of(&spec.source);
        let hold = host.holder.group(Group::Endpoint(host.next_serial()));
        let (counts, state) = (Counts { sessions_lost, ..Counts::default() }, State::new(hold.clone()));
        let sessions = BTreeMap::new();
        Self::begin(Inner { spec, preflight, listening: None, sessions, released, counts, state }, hold, host, others)
    }

    fn begin(inner: Inner, hold: Hold, host: Arc<Host>, others: &Arc<Endpoints<Endpoint>>) -> Arc<Self> {
        let endpoint = Arc::new(Endpoint {
            host,
            hold,
            inner: Mutex::new(inner),
            session_ended: Condvar::new(),
            releasing: Mutex::default(),
            others: Arc::downgrade(others),
        });
        if let Err(error) = source_watch::begin(Arc::downgrade(&endpoint)) {
            tracing::warn!(endpoint = endpoint.spec().name, %error, "source not watched");
        }
        endpoint
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn spec(&self) -> Spec {
        self.inner().spec.clone()
    }

    pub(crate) fn preflight(&self) -> Preflight {
        self.inner().preflight.clone()
    }

    pub(crate) fn is_listening(&self) -> bool {
        self.inner().listening.is_some()
    }

    /// Changes the endpoint to this specification. A socket that is in place stays, and so do sessions; they are handed
    /// over if the configuration changes. `directory`: the directory of the socket, if not that of its path.
    pub(crate) fn apply(
        self: &Arc<Self>,
        spec: Spec,
        preflight: Preflight,
        directory: Option<Directory>,
    ) -> Result<(), ListenError> {
        let mut inner = self.inner();
        let in_place = inner.listening.as_ref().is_some_and(|listening| {
            let same_directory = directory.as_ref().is_none_or(|directory| listening.socket.is_in(directory));
            inner.spec.socket.path == spec.socket.path && same_directory && listening.socket.in_place()
        });
        if in_place {
            inner.set_access(&spec)?;
        } else {
            let listening = self.listen(&spec, directory)?;
            inner.state.deposit(&listening.socket);
            if let Some(before) = inner.listening.replace(listening) {
                before.stop();
            }
            tracing::info!(endpoint = spec.name, socket = %spec.socket.path.display(), "listening");
        }
        inner.spec = spec;
        inner.preflight = preflight;
        inner.save();
        for live in inner.sessions.values() {
            live.sender.send(Command::Reconfigure(Box::new(inner.spec.engine.clone()), live.shared.next_generation()));
        }
        Ok(())
    }

    /// Hands every session, or only one, over to a new engine. Returns the sessions with their new generations.
    pub(crate) fn hand_over(&self, session: Option<&str>) -> Vec<PendingHandOver> {
        let inner = self.inner();
        let request = |(id, live): (&String, &LiveSession)| {
            let generation = live.shared.next_generation();
            live.sender.send(Command::HandOver(generation));
            PendingHandOver { session: id.clone(), generation }
        };
        inner.chosen(session).map(request).collect()
    }

    /// Ends every session, or only one. Returns those that ended in time.
    pub(crate) fn close(&self, session: Option<&str>, longest: Duration) -> Vec<String> {
        let inner = self.inner();
        let mut ended: Vec<String> = inner.chosen(session).map(|(id, _)| id.clone()).collect();
        inner.chosen(session).for_each(|(_, live)| live.sender.send(Command::End));
        let waiting = |inner: &mut Inner| ended.iter().any(|id| inner.sessions.contains_key(id));
        let waited = self.session_ended.wait_timeout_while(inner, longest, waiting);
        let inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        ended.retain(|id| !inner.sessions.contains_key(id));
        ended
    }

    /// The shared part of a session.
    pub(crate) fn session(&self, id: &str) -> Option<Arc<Shared>> {
        let inner = self.inner();
        inner.chosen(Some(id)).next().map(|(_, live)| live.shared.clone())
    }

    /// Mount point of its source when an engine was last started.
    pub(crate) fn mounted_at(&self) -> Option<MountPoint> {
        self.inner().sessions.values().find_map(|live| live.shared.persistent.mounted_at())
    }

    pub(crate) fn location(&self) -> SourceLocation {
        self.inner().location()
    }

    fn listen(self: &Arc<Self>, spec: &Spec, directory: Option<Directory>) -> Result<Listening, ListenError> {
        let failed = |error| ListenError::Io { path: spec.socket.path.clone(), error };
        let socket = match directory {
            Some(directory) => BoundSocket::bind_in(directory, &spec.socket)?,
            None => BoundSocket::bind(&spec.socket)?,
        };
        match self.accept(&socket) {
            Ok(stop) => Ok(Listening { socket, stop }),
            Err(error) => {
                socket.unlink();
                Err(failed(error))
            }
        }
    }

    /// Starts to accept connections. They end with the returned sender's message.
    fn accept(self: &Arc<Self>, socket: &BoundSocket) -> io::Result<Sender<()>> {
        let (stop, stopped) = channel()?;
        let listener = socket.listener().try_clone()?;
        listener.set_nonblocking(true)?;
        let endpoint = self.clone();
        let accept = move || endpoint.accept_until(&listener, &stopped);
        thread::Builder::new().name("accept".into()).spawn(accept)?;
        Ok(stop)
    }

    /// Stops listening. Sessions continue, unless `force` ends them.
    pub(crate) fn remove(&self, force: bool) {
        let mut inner = self.inner();
        if let Some(listening) = inner.listening.take() {
            listening.stop();
            inner.state.withdraw();
            inner.save();
            tracing::info!(endpoint = inner.spec.name, sessions = inner.sessions.len(), force, "no longer listening");
        }
        if force {
            for live in inner.sessions.values() {
                live.sender.send(Command::End);
            }
        }
    }

    /// Waits until no session is left, at most this long. Returns true if none is.
    pub(crate) fn wait_until_empty(&self, longest: Duration) -> bool {
        let waiting = |inner: &mut Inner| !inner.sessions.is_empty();
        let waited = self.session_ended.wait_timeout_while(self.inner(), longest, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.sessions.is_empty()
    }

    pub(crate) fn status(&self) -> EndpointStatus {
        let inner = self.inner();
        let counts = &inner.counts;
        let mut totals = counts.ended.clone();
        let mut engines_started = counts.engines_ended;
        let mut sessions = Vec::new();
        for live in inner.sessions.values() {
            let status = live.shared.status();
            totals.add(&status.totals);
            live.request_path(status.oldest_request.as_ref());
            let view = live.shared.view();
            engines_started += view.engines_started;
            if view.begun {
                sessions.push(status);
            }
        }
        EndpointStatus {
            endpoint: inner.spec.clone(),
            listening: inner.listening.as_ref().is_some_and(|listening| listening.socket.in_place()),
            preflight: inner.preflight.clone(),
            sessions_started: counts.sessions_ended + sessions.len() as u64,
            sessions_lost: counts.sessions_lost,
            sessions,
            rejected_connections: counts.rejected_connections,
            rejected_exclusive: counts.rejected_exclusive,
            last_rejection: counts.last_rejection.clone(),
            released: inner.released().map(|released| released.status()),
            engines_started,
            totals,
        }
    }

    fn accept_until(self: &Arc<Self>, listener: &UnixListener, stopped: &Receiver<()>) {
        loop {
            let interests = [Interest::of(stopped), Interest::of(listener)];
            match wait_readable(&interests, None) {
                Ok([false, _]) => self.accept_one(listener),
                Ok([true, _]) => return,
                Err(error) => tracing::error!(%error, "poll"),
            }
        }
    }

    fn accept_one(self: &Arc<Self>, listener: &UnixListener) {
        match listener.accept() {
            Ok((stream, _)) => self.handle_connection(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(endpoint = self.inner().spec.name, %error, "connection not accepted");
                thread::sleep(ACCEPT_AGAIN);
            }
        }
    }

    fn handle_connection(self: &Arc<Self>, stream: UnixStream) {
        // Keep the connection open until the rejection is counted, so that the VMM sees it only afterwards.
        let _open = stream.try_clone();
        if let Err(reason) = self.open_session(stream) {
            let mut inner = self.inner();
            inner.counts.rejected_connections += 1;
            inner.counts.rejected_exclusive +=
                u64::from(matches!(reason, RejectReason::Exclusive | RejectReason::ExclusiveElsewhere));
            let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            inner.counts.last_rejection = Some(Rejection { at, message: reason.to_string() });
            inner.save();
            tracing::warn!(endpoint = inner.spec.name, %reason, "connection rejected");
        }
    }

    fn open_session(self: &Arc<Self>, stream: UnixStream) -> Result<(), RejectReason> {
        let others = self.others.upgrade().ok_or(RejectReason::Removed)?;
        let admitting = others.admit();
        // Do not hold the lock of this endpoint here: other endpoints may be counting its sessions.
        let Spec { exclusive, source, .. } = self.spec();
        if exclusive && others.sessions_beside(self, &source) > 0 {
            return Err(RejectReason::ExclusiveElsewhere);
        }
        if others.sessions() >= MAX_SESSIONS_OF_ALL {
            return Err(RejectReason::TooManyInAll);
        }
        let mut inner = self.inner();
        inner.admit_one_more()?;
        let serial = self.host.next_serial();
        let id = format!("{}-{serial}", inner.spec.name);
        let service = self.service(&inner, serial);
        let hold = service.hold.clone();
        // A connection that does not become a session leaves nothing.
        let began = self.begin_session(&mut inner, id, stream, service);
        if began.is_err() {
            hold.end();
        }
        drop(inner);
        drop(admitting);
        began
    }

    fn begin_session(
        self: &Arc<Self>,
        inner: &mut Inner,
        id: String,
        stream: UnixStream,
        service: Service,
    ) -> Result<(), RejectReason> {
        let shared = Arc::new(Shared::new(id, &stream, service.config.clone(), service.hold.clone())?);
        let (sender, commands) = channel()?;
        let serial = service.hold.serial();
        let session = Session::new(VmmSocket::new(stream)?, service, shared.clone(), (sender.clone(), commands))?;
        Ok(self.run_session(inner, session, LiveSession { serial, shared, sender })?)
    }

    fn service(&self, inner: &Inner, serial: u64) -> Service {
        Service {
            starter: self.host.starter.clone(),
            endpoint: inner.spec.name.clone(),
            location: inner.location(),
            config: inner.spec.engine.clone(),
            released_until: inner.released().map(|released| released.until),
            hold: self.host.holder.group(Group::Session(serial)),
            list: self.host.list.clone(),
        }
    }

    /// Starts the thread of a session and lists it.
    fn run_session(self: &Arc<Self>, inner: &mut Inner, session: Session, live: LiveSession) -> io::Result<()> {
        let endpoint = self.clone();
        let id = live.shared.id.clone();
        let run = move || {
            let id = session.id().to_owned();
            match session.run() {
                End::Left => endpoint.session_left(&id),
                end => endpoint.close_session(&id, &end),
            }
        };
        thread::Builder::new().name("session".into()).spawn(run)?;
        inner.sessions.insert(id, live);
        Ok(())
    }

    /// Stops accepting, and leaves the sessions to the next broker. Returns true if all were left in time.
    pub(crate) fn leave(&self, longest: Duration) -> bool {
        let inner = self.inner();
        if let Some(listening) = &inner.listening {
            listening.stop.send(());
        }
        inner.sessions.values().for_each(|live| live.sender.send(Command::Leave));
        let waiting = |inner: &mut Inner| !inner.sessions.is_empty();
        let waited = self.session_ended.wait_timeout_while(inner, longest, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.sessions.is_empty()
    }

    fn session_left(&self, id: &str) {
        if let Some(live) = self.inner().sessions.remove(id) {
            // The next broker has what it shares.
            std::mem::forget(live);
        }
        self.session_ended.notify_all();
    }

    /// Moves a session from the list to the sums of ended sessions in one step, so that no sum ever decreases.
    fn close_session(&self, id: &str, end: &End) {
        let mut inner = self.inner();
        let Some(live) = inner.sessions.remove(id) else { return };
        let view = live.shared.view().clone();
        inner.counts.ended.add(&live.shared.totals());
        inner.counts.engines_ended += view.engines_started;
        if view.begun {
            inner.counts.sessions_ended += 1;
        } else {
            inner.counts.rejected_connections += 1;
        }
        inner.save();
        self.host.list.remove(live.serial);
        tracing::info!(session = id, reason = %end, "session ended");
        self.session_ended.notify_all();
        // Dropped after the lock: closing a stashed file in a hung file system may block for ever.
        drop(inner);
        drop(live);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.hold.end();
    }
}

impl Member for Endpoint {
    type Release = Released;

    fn is_over(&self) -> bool {
        let inner = self.inner();
        inner.listening.is_none() && inner.sessions.is_empty()
    }

    fn sessions(&self) -> usize {
        self.inner().sessions.len()
    }

    fn exclusive_sessions(&self, source: &Path) -> usize {
        let inner = self.inner();
        let counts = inner.spec.exclusive && inner.spec.source == source;
        if counts { inner.sessions.len() } else { 0 }
    }

    fn release_of(&self, source: &Path) -> Option<Released> {
        let inner = self.inner();
        inner.released().filter(|_| inner.spec.source == source)
    }
}

impl Watched for Endpoint {
    fn path(&self) -> PathBuf {
        self.location().path()
    }

    fn sources(&self) -> Sources {
        self.host.starter.sources.clone()
    }

    fn served(&self) -> Vec<(String, Root)> {
        let inner = self.inner();
        inner.sessions.iter().filter_map(|(id, live)| Some((id.clone(), live.shared.view().root?))).collect()
    }

    fn path_leads_to(&self, found: Result<Root, Errno>, served: &[(String, Root)]) {
        let inner = self.inner();
        for (id, root) in served {
            if let Some(live) = inner.sessions.get(id) {
                live.shared.source_moved(*root, moved_to(*root, found));
            }
        }
    }
}

impl Inner {
    /// Records the endpoint for the next broker.
    fn save(&mut self) {
        let stored = StoredEndpoint {
            spec: self.spec.clone(),
            preflight: self.preflight.clone(),
            socket: self.listening.as_ref().map(|listening| listening.socket.identity()),
            released_until: self.released().map(|released| released.unix),
            counts: self.counts.clone(),
        };
        self.state.write(&stored);
    }

    fn location(&self) -> SourceLocation {
        SourceLocation { source: self.spec.source.clone(), sub_path: self.spec.sub_path.clone() }
    }

    /// Sessions that have begun: all of them, or the one of this name.
    fn chosen(&self, session: Option<&str>) -> impl Iterator<Item = (&String, &LiveSession)> {
        let chosen = move |id: &str| session.is_none_or(|session| session == id);
        self.sessions.iter().filter(move |(id, live)| chosen(id) && live.shared.view().begun)
    }

    /// The release of the source, if it has not ended.
    fn released(&self) -> Option<Released> {
        self.released.filter(|released| released.until > Instant::now())
    }

    fn set_access(&self, spec: &Spec) -> Result<(), ListenError> {
        let Some(listening) = self.listening.as_ref().filter(|_| self.spec.socket != spec.socket) else {
            return Ok(());
        };
        let set = listening.socket.set_access(&spec.socket);
        set.map_err(|error| ListenError::Io { path: spec.socket.path.clone(), error })
    }

    fn admit_one_more(&self) -> Result<(), RejectReason> {
        let half_open = self.sessions.values().filter(|live| !live.shared.view().begun).count();
        let most = if self.spec.consumer.is_some() { MAX_SESSIONS_OF_ONE } else { MAX_SESSIONS };
        admission(self.listening.is_some(), self.spec.exclusive, (self.sessions.len(), most), half_open)
    }
}

/// Checks whether one more session is admitted. A connection may have been accepted just before its endpoint was removed;
/// its session would not be listed anywhere.
fn admission(
    listening: bool,
    exclusive: bool,
    (sessions, most): (usize, usize),
    half_open: usize,
) -> Result<(), RejectReason> {
    match sessions {
        _ if !listening => Err(RejectReason::Removed),
        0 => Ok(()),
        _ if exclusive => Err(RejectReason::Exclusive),
        _ if half_open >= MAX_HALF_OPEN => Err(RejectReason::TooManyHalfOpen),
        _ if sessions >= most => Err(RejectReason::TooManySessions(most)),
        _ => Ok(()),
    }
}

impl LiveSession {
    /// Requests the path of a long request from the engine. The next status contains it.
    fn request_path(&self, oldest: Option<&OldestRequest>) {
        if let Some(oldest) = oldest.filter(|oldest| oldest.age_ms > LONG_MS && oldest.path.is_none()) {
            self.sender.send(Command::Describe(oldest.node));
        }
    }
}

impl Listening {
    fn stop(self) {
        self.socket.unlink();
        self.stop.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_is_admitted_or_rejected_with_a_reason() {
        for (listening, exclusive, sessions, half_open, refusal) in [
            (true, true, (0, MAX_SESSIONS), 0, None),
            (true, false, (MAX_SESSIONS - 1, MAX_SESSIONS), MAX_HALF_OPEN - 1, None),
            (true, true, (1, MAX_SESSIONS), 0, Some("exclusive")),
            (true, false, (MAX_HALF_OPEN, MAX_SESSIONS), MAX_HALF_OPEN, Some("16 connections")),
            (true, false, (MAX_SESSIONS, MAX_SESSIONS), 0, Some("256 sessions")),
            (true, false, (MAX_SESSIONS_OF_ONE, MAX_SESSIONS_OF_ONE), 0, Some("4 sessions")),
            (false, false, (0, MAX_SESSIONS), 0, Some("removed")),
        ] {
            let refused = admission(listening, exclusive, sessions, half_open).err().map(|reason| reason.to_string());
            let as_expected = match (&refused, refusal) {
                (Some(refused), Some(refusal)) => refused.contains(refusal),
                (refused, refusal) => refused.is_none() && refusal.is_none(),
            };
            assert!(as_expected, "{refused:?} instead of {refusal:?}");
        }
    }
}
