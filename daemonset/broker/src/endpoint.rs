//! One endpoint: a socket, what is served behind it, and the sessions that began there.

mod release;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use thiserror::Error;
use virtiofs_contract::control::{Endpoint as Spec, EndpointStatus, OldestRequest, PendingHandOver, Rejection};
use virtiofs_contract::counters::Totals;
use virtiofs_contract::preflight::Preflight;

use crate::endpoint_watch;
use crate::endpoints::Endpoints;
use crate::engine::mount_point::MountPoint;
use crate::engine::root::{Root, departed};
use crate::engine::source::{Place, Sources};
use crate::engine::start::Starter;
use crate::listen::{BoundSocket, Directory, ListenError};
use crate::mailbox::{Mailbox, Post, mailbox};
use crate::poll::{Interest, wait_readable};
use crate::session::shared::Shared;
use crate::session::{Command, End, Service, Session};
use crate::vhost_user::socket::VmmSocket;
pub(crate) use release::Released;

/// Most sessions of one socket. Each costs an engine process.
const MAX_SESSIONS: usize = 256;

/// The same of a socket that was made for one consumer, who needs one, or two while a VM is replaced.
const MAX_SESSIONS_OF_ONE: usize = 4;

/// Most sessions of all sockets: a consumer may have many.
const MAX_SESSIONS_OF_ALL: usize = 1024;

/// Most connections of one socket that have not sent a message yet. Each costs a thread for a few seconds.
const MAX_HALF_OPEN: usize = 16;

/// How long to wait when no connection can be accepted (no descriptors left).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// A request in progress for longer than this is worth a question: which file is it about?
const LONG_MS: u64 = 1000;

/// Session numbers are never used twice in one broker.
static SERIAL: AtomicU64 = AtomicU64::new(1);

/// An endpoint and its sessions.
#[derive(Debug)]
pub(crate) struct Endpoint {
    starter: Arc<Starter>,
    inner: Mutex<Inner>,
    session_ended: Condvar,
    /// Held while its source is being released.
    releasing: Mutex<()>,
    /// Those beside it.
    others: Weak<Endpoints>,
}

#[derive(Debug)]
struct Inner {
    spec: Spec,
    preflight: Preflight,
    listening: Option<Listening>,
    sessions: BTreeMap<String, Live>,
    rejected_connections: u64,
    rejected_exclusive: u64,
    last_rejection: Option<Rejection>,
    released: Option<Released>,
    sessions_started: u64,
    engines_ended: u64,
    ended: Totals,
}

#[derive(Debug)]
struct Listening {
    socket: BoundSocket,
    stop: Post<()>,
}

#[derive(Debug)]
struct Live {
    shared: Arc<Shared>,
    post: Post<Command>,
}

/// Why a connection is turned away.
#[derive(Debug, Error)]
enum Refusal {
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
    SetUp(#[from] io::Error),
    #[error("{0}")]
    Journal(#[from] crate::session::journal::JournalError),
}

impl Endpoint {
    /// An endpoint that does not listen yet.
    pub(crate) fn new(spec: Spec, preflight: Preflight, starter: Arc<Starter>, others: &Arc<Endpoints>) -> Arc<Self> {
        // What was let go of at another socket is not taken up at this one.
        let released = others.release_of(&spec.source);
        let endpoint = Arc::new(Endpoint {
            starter,
            inner: Mutex::new(Inner {
                spec,
                preflight,
                listening: None,
                sessions: BTreeMap::new(),
                rejected_connections: 0,
                rejected_exclusive: 0,
                last_rejection: None,
                released,
                sessions_started: 0,
                engines_ended: 0,
                ended: Totals::default(),
            }),
            session_ended: Condvar::new(),
            releasing: Mutex::default(),
            others: Arc::downgrade(others),
        });
        if let Err(error) = endpoint_watch::begin(Arc::downgrade(&endpoint)) {
            tracing::warn!(endpoint = endpoint.spec().name, %error, "nobody watches its source");
        }
        endpoint
    }

    /// The directories that sessions are served from.
    pub(crate) fn served(&self) -> Vec<(String, Root)> {
        let inner = self.inner();
        inner.sessions.iter().filter_map(|(id, live)| Some((id.clone(), live.shared.view().root?))).collect()
    }

    /// The path of the source leads to this, and did while these directories were served.
    pub(crate) fn path_leads_to(&self, found: Result<Root, Errno>, served: &[(String, Root)]) {
        let inner = self.inner();
        for (id, root) in served {
            if let Some(live) = inner.sessions.get(id) {
                live.shared.departed(*root, departed(*root, found));
            }
        }
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

    /// Nothing listens and nobody is connected.
    pub(crate) fn is_over(&self) -> bool {
        let inner = self.inner();
        inner.listening.is_none() && inner.sessions.is_empty()
    }

    pub(crate) fn sessions(&self) -> usize {
        self.inner().sessions.len()
    }

    /// How many sessions it has, if it is exclusive and serves this source.
    pub(crate) fn exclusive_sessions(&self, source: &Path) -> usize {
        let inner = self.inner();
        let counts = inner.spec.exclusive && inner.spec.source == source;
        if counts { inner.sessions.len() } else { 0 }
    }

    /// The release that holds for it, if it serves this source.
    pub(crate) fn release_of(&self, source: &Path) -> Option<Released> {
        let inner = self.inner();
        inner.released().filter(|_| inner.spec.source == source)
    }

    /// Makes the endpoint what is asked for. A socket that is in place stays, and so do sessions; where the
    /// configuration is another one, they are handed over to engines of it. `directory`: where the socket is to be, if
    /// not where its path leads.
    pub(crate) fn apply(
        self: &Arc<Self>,
        spec: Spec,
        preflight: Preflight,
        directory: Option<Directory>,
    ) -> Result<(), ListenError> {
        let mut inner = self.inner();
        let stays = inner.listening.as_ref().is_some_and(|listening| {
            let same_directory = directory.as_ref().is_none_or(|directory| listening.socket.is_in(directory));
            inner.spec.socket.path == spec.socket.path && same_directory && listening.socket.in_place()
        });
        if stays {
            inner.set_access(&spec)?;
        } else {
            let listening = self.listen(&spec, directory)?;
            if let Some(before) = inner.listening.replace(listening) {
                before.stop();
            }
            tracing::info!(endpoint = spec.name, socket = %spec.socket.path.display(), "listening");
        }
        inner.spec = spec;
        inner.preflight = preflight;
        for live in inner.sessions.values() {
            live.post.send(Command::Reconfigure(Box::new(inner.spec.engine.clone()), live.shared.next_order()));
        }
        Ok(())
    }

    /// Gives every session, or only one, a new engine; says which, and by which number they know it.
    pub(crate) fn exchange(&self, session: Option<&str>) -> Vec<PendingHandOver> {
        let inner = self.inner();
        let order = |(id, live): (&String, &Live)| {
            let generation = live.shared.next_order();
            live.post.send(Command::HandOver(generation));
            PendingHandOver { session: id.clone(), generation }
        };
        inner.chosen(session).map(order).collect()
    }

    /// Ends every session, or only one; says which.
    pub(crate) fn close(&self, session: Option<&str>, longest: Duration) -> Vec<String> {
        let inner = self.inner();
        let ended: Vec<String> = inner.chosen(session).map(|(id, _)| id.clone()).collect();
        inner.chosen(session).for_each(|(_, live)| live.post.send(Command::End));
        let waiting = |inner: &mut Inner| ended.iter().any(|id| inner.sessions.contains_key(id));
        drop(self.session_ended.wait_timeout_while(inner, longest, waiting));
        ended
    }

    /// The public side of a session.
    pub(crate) fn session(&self, id: &str) -> Option<Arc<Shared>> {
        let inner = self.inner();
        inner.chosen(Some(id)).next().map(|(_, live)| live.shared.clone())
    }

    /// Where the file system of its source was mounted when a session took it up last.
    pub(crate) fn mounted_at(&self) -> Option<MountPoint> {
        self.inner().sessions.values().find_map(|live| live.shared.estate.mounted_at())
    }

    /// Where sources are.
    pub(crate) fn sources(&self) -> Sources {
        self.starter.sources.clone()
    }

    pub(crate) fn place(&self) -> Place {
        self.inner().place()
    }

    fn listen(self: &Arc<Self>, spec: &Spec, directory: Option<Directory>) -> Result<Listening, ListenError> {
        let failed = |error| ListenError::Io { path: spec.socket.path.clone(), error };
        let socket = match directory {
            Some(directory) => BoundSocket::bind_in(directory, &spec.socket)?,
            None => BoundSocket::bind(&spec.socket)?,
        };
        let accepting = mailbox().and_then(|(stop, stopped)| {
            let listener = socket.listener().try_clone()?;
            listener.set_nonblocking(true)?;
            let endpoint = self.clone();
            let accept = move || endpoint.accept_until(&listener, &stopped);
            thread::Builder::new().name("accept".into()).spawn(accept)?;
            Ok(stop)
        });
        match accepting {
            Ok(stop) => Ok(Listening { socket, stop }),
            Err(error) => {
                socket.unlink();
                Err(failed(error))
            }
        }
    }

    /// Stops listening. Sessions go on, unless `force` ends them.
    pub(crate) fn remove(&self, force: bool) {
        let mut inner = self.inner();
        if let Some(listening) = inner.listening.take() {
            listening.stop();
            tracing::info!(endpoint = inner.spec.name, sessions = inner.sessions.len(), force, "no longer listening");
        }
        if force {
            for live in inner.sessions.values() {
                live.post.send(Command::End);
            }
        }
    }

    /// Waits until no session is left, at most this long; says whether that is so.
    pub(crate) fn wait_until_empty(&self, longest: Duration) -> bool {
        let waiting = |inner: &mut Inner| !inner.sessions.is_empty();
        let waited = self.session_ended.wait_timeout_while(self.inner(), longest, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.sessions.is_empty()
    }

    pub(crate) fn status(&self) -> EndpointStatus {
        let inner = self.inner();
        let mut totals = inner.ended.clone();
        let mut engines_started = inner.engines_ended;
        let mut sessions = Vec::new();
        for live in inner.sessions.values() {
            let status = live.shared.status();
            totals.add(&status.totals);
            live.ask_for_path(status.oldest_request.as_ref());
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
            sessions_started: inner.sessions_started + sessions.len() as u64,
            sessions,
            rejected_connections: inner.rejected_connections,
            rejected_exclusive: inner.rejected_exclusive,
            last_rejection: inner.last_rejection.clone(),
            released: inner.released().map(|released| released.status()),
            engines_started,
            totals,
        }
    }

    fn accept_until(self: &Arc<Self>, listener: &UnixListener, stopped: &Mailbox<()>) {
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
            Ok((stream, _)) => self.take_in(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(endpoint = self.inner().spec.name, %error, "connection not accepted");
                thread::sleep(ACCEPT_AGAIN);
            }
        }
    }

    fn take_in(self: &Arc<Self>, stream: UnixStream) {
        // Whoever is turned away sees it only when it has been counted.
        let _open = stream.try_clone();
        if let Err(refusal) = self.open_session(stream) {
            let mut inner = self.inner();
            inner.rejected_connections += 1;
            inner.rejected_exclusive += u64::from(matches!(refusal, Refusal::Exclusive | Refusal::ExclusiveElsewhere));
            let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            inner.last_rejection = Some(Rejection { at, message: refusal.to_string() });
            tracing::warn!(endpoint = inner.spec.name, %refusal, "connection refused");
        }
    }

    fn open_session(self: &Arc<Self>, stream: UnixStream) -> Result<(), Refusal> {
        let others = self.others.upgrade().ok_or(Refusal::Removed)?;
        let admitting = others.admit();
        // Asked with nothing of this endpoint held: others may be asking for this one.
        let Spec { exclusive, source, .. } = self.spec();
        if exclusive && others.sessions_beside(self, &source) > 0 {
            return Err(Refusal::ExclusiveElsewhere);
        }
        if others.sessions() >= MAX_SESSIONS_OF_ALL {
            return Err(Refusal::TooManyInAll);
        }
        let mut inner = self.inner();
        inner.admit_one_more()?;
        let id = format!("{}-{}", inner.spec.name, SERIAL.fetch_add(1, Relaxed));
        let shared = Arc::new(Shared::new(id.clone(), &stream, inner.spec.engine.clone())?);
        let (post, mail) = mailbox()?;
        let service = Service {
            starter: self.starter.clone(),
            endpoint: inner.spec.name.clone(),
            place: inner.place(),
            config: inner.spec.engine.clone(),
            released_until: inner.released().map(|released| released.until),
        };
        let session = Session::new(VmmSocket::new(stream)?, service, shared.clone(), (post.clone(), mail))?;
        let endpoint = self.clone();
        let run = move || {
            let id = session.id().to_owned();
            endpoint.close_session(&id, &session.run());
        };
        thread::Builder::new().name("session".into()).spawn(run)?;
        inner.sessions.insert(id, Live { shared, post });
        drop(inner);
        drop(admitting);
        Ok(())
    }

    /// From the list of the living to the sums of the dead in one step, so that no sum ever goes backwards.
    fn close_session(&self, id: &str, end: &End) {
        let mut inner = self.inner();
        let Some(live) = inner.sessions.remove(id) else { return };
        let view = live.shared.view().clone();
        inner.ended.add(&live.shared.totals());
        inner.engines_ended += view.engines_started;
        if view.begun {
            inner.sessions_started += 1;
        } else {
            inner.rejected_connections += 1;
        }
        tracing::info!(session = id, reason = %end, "session ended");
        self.session_ended.notify_all();
        // What the session kept goes with it, parked files too: to close one in a hung file system may take for ever.
        drop(inner);
        drop(live);
    }
}

impl Inner {
    fn place(&self) -> Place {
        Place { source: self.spec.source.clone(), sub_path: self.spec.sub_path.clone() }
    }

    /// Sessions that have begun: all, or the one of this name.
    fn chosen(&self, session: Option<&str>) -> impl Iterator<Item = (&String, &Live)> {
        let chosen = move |id: &str| session.is_none_or(|session| session == id);
        self.sessions.iter().filter(move |(id, live)| chosen(id) && live.shared.view().begun)
    }

    /// Is the source released, and until when?
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

    fn admit_one_more(&self) -> Result<(), Refusal> {
        let half_open = self.sessions.values().filter(|live| !live.shared.view().begun).count();
        let most = if self.spec.consumer.is_some() { MAX_SESSIONS_OF_ONE } else { MAX_SESSIONS };
        admission(self.listening.is_some(), self.spec.exclusive, (self.sessions.len(), most), half_open)
    }
}

/// May there be one session more? A connection may have been accepted just before its endpoint was removed: nobody would
/// ever find that session again.
fn admission(
    listening: bool,
    exclusive: bool,
    (sessions, most): (usize, usize),
    half_open: usize,
) -> Result<(), Refusal> {
    match sessions {
        _ if !listening => Err(Refusal::Removed),
        0 => Ok(()),
        _ if exclusive => Err(Refusal::Exclusive),
        _ if half_open >= MAX_HALF_OPEN => Err(Refusal::TooManyHalfOpen),
        _ if sessions >= most => Err(Refusal::TooManySessions(most)),
        _ => Ok(()),
    }
}

impl Live {
    /// Has the engine asked which file a request is about that takes long. The answer is there the next time.
    fn ask_for_path(&self, oldest: Option<&OldestRequest>) {
        if let Some(oldest) = oldest.filter(|oldest| oldest.age_ms > LONG_MS && oldest.path.is_none()) {
            self.post.send(Command::Describe(oldest.node));
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
    fn who_connects_is_admitted_or_told_why_not() {
        for (listening, exclusive, sessions, half_open, refusal) in [
            (true, true, (0, MAX_SESSIONS), 0, None),
            (true, false, (MAX_SESSIONS - 1, MAX_SESSIONS), MAX_HALF_OPEN - 1, None),
            (true, true, (1, MAX_SESSIONS), 0, Some("exclusive")),
            (true, false, (MAX_HALF_OPEN, MAX_SESSIONS), MAX_HALF_OPEN, Some("16 connections")),
            (true, false, (MAX_SESSIONS, MAX_SESSIONS), 0, Some("256 sessions")),
            (true, false, (MAX_SESSIONS_OF_ONE, MAX_SESSIONS_OF_ONE), 0, Some("4 sessions")),
            (false, false, (0, MAX_SESSIONS), 0, Some("removed")),
        ] {
            let refused = admission(listening, exclusive, sessions, half_open).err().map(|refusal| refusal.to_string());
            let as_expected = match (&refused, refusal) {
                (Some(refused), Some(refusal)) => refused.contains(refusal),
                (refused, refusal) => refused.is_none() && refusal.is_none(),
            };
            assert!(as_expected, "{refused:?} instead of {refusal:?}");
        }
    }
}
