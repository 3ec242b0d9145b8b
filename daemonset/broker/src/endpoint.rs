//! One endpoint: a socket, the directory it serves, and its sessions.

mod accept;
mod account;
pub(crate) mod admission;
pub(crate) mod changes;
pub(crate) mod endpoints;
pub(crate) mod host;
mod leave;
mod lines;
pub(crate) mod listening;
mod release;
mod restore;
pub(crate) mod socket_checks;
pub(crate) mod state;
pub(crate) mod supervisor;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use thiserror::Error;
use virtiofs_contract::control::{
    Endpoint as Spec, EndpointStatus, LOST_LISTED, LostSession, OldestRequest, PendingHandOver,
};
use virtiofs_contract::preflight::Preflight;

use crate::channel::{Sender, channel};
use crate::disposal::{self, Account, Foreign};
use crate::engine::mount_point::MountPoint;
use crate::engine::root::{Root, moved_to};
use crate::engine::source::{SourceLocation, Sources};
use crate::engine::unknown_fields::UnknownFields;
use crate::holder::Hold;
use crate::holder::names::Group;
use crate::interrupt::ThreadId;
use crate::listen::BoundSocket;
use crate::session::ended::EndedSession;
use crate::session::lifeline::Lifeline;
use crate::session::shared::Shared;
use crate::session::{Command, End, Service, Session};
use crate::source_watch::{self, Watched};
use crate::vhost_user::socket::VmmSocket;
use admission::{Tally, admission};
use endpoints::{Endpoints, Member};
use host::Host;
use lines::Lines;
use listening::Listening;
use release::Released;
use state::{Counts, State, StoredEndpoint};

/// Most threads of ended sessions, and most descriptors of VMMs, that system calls block. They cost little, but a VMM must not
/// make more and more of them.
const MAX_BLOCKED: usize = 64;

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
    /// Descriptors of its VMMs that are being closed.
    account: Arc<Account>,
}

#[derive(Debug)]
struct Inner {
    spec: Spec,
    preflight: Preflight,
    listening: Option<Listening>,
    sessions: BTreeMap<String, LiveSession>,
    /// Sessions that have ended and whose threads have not.
    detached: BTreeSet<String>,
    lines: Lines,
    released: Option<Released>,
    counts: Counts,
    state: State,
    /// Fields of the stored endpoint that this broker does not know.
    unknown: Arc<UnknownFields>,
}

#[derive(Debug)]
struct LiveSession {
    serial: u64,
    shared: Arc<Shared>,
    sender: Sender<Command>,
    lifeline: Lifeline,
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
    #[error("{limit} sessions is the limit of {of}")]
    TooManySessions { of: String, limit: usize },
    #[error("{limit} connections of {of} have not sent a message yet")]
    TooManyHalfOpen { of: String, limit: usize },
    #[error("{0} threads and descriptors of earlier sessions are blocked by what their VMMs sent")]
    TooManyBlocked(usize),
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
        lost: Vec<LostSession>,
    ) -> Arc<Self> {
        // A source that is released at another endpoint is not used at this one.
        let released = others.release_of(&spec.source);
        let hold = host.holder.group(Group::Endpoint(host.next_serial()));
        let (mut counts, state) = (Counts::default(), State::new(hold.clone()));
        counts.add_lost(lost);
        Self::begin(Inner::new(spec, preflight, released, counts, state), hold, host, others)
    }

    fn begin(inner: Inner, hold: Hold, host: Arc<Host>, others: &Arc<Endpoints<Endpoint>>) -> Arc<Self> {
        let endpoint = Arc::new(Endpoint {
            host,
            hold,
            inner: Mutex::new(inner),
            session_ended: Condvar::new(),
            releasing: Mutex::default(),
            others: Arc::downgrade(others),
            account: Arc::default(),
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

    /// Ends every session, and connections that are not sessions yet, or only one session. Returns the sessions that have
    /// ended.
    pub(crate) fn close(&self, session: Option<&str>, longest: Duration) -> Vec<String> {
        let inner = self.inner();
        let mut ended: Vec<String> = inner.chosen(session).map(|(id, _)| id.clone()).collect();
        let every = inner.sessions.iter().filter(|(id, _)| session.is_none_or(|session| session == *id));
        every.for_each(|(id, live)| self.end(id, live));
        let waiting = |inner: &mut Inner| ended.iter().any(|id| inner.sessions.contains_key(id));
        let waited = self.session_ended.wait_timeout_while(inner, longest, waiting);
        let inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        ended.retain(|id| !inner.sessions.contains_key(id));
        ended
    }

    fn end(&self, id: &str, live: &LiveSession) {
        live.sender.send(Command::End);
        self.host.supervisor.ending(id);
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
            serial: self.hold.serial(),
            listening: inner.listening.as_ref().is_some_and(|listening| listening.socket.in_place()),
            preflight: inner.preflight.clone(),
            sessions_started: counts.sessions_ended + sessions.len() as u64,
            sessions_lost: counts.sessions_lost,
            lost: counts.lost[counts.lost.len().saturating_sub(LOST_LISTED)..].to_vec(),
            sessions,
            rejected_connections: counts.rejected_connections,
            rejected_exclusive: counts.rejected_exclusive,
            rejected_memory: counts.rejected_memory,
            last_rejection: counts.last_rejection.clone(),
            released: inner.released().map(|released| released.status()),
            engines_started,
            totals,
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
        let all = others.tallies();
        let mut inner = self.inner();
        let blocked = inner.detached.len() + disposal::interrupt_overdue(&self.account);
        if blocked > MAX_BLOCKED {
            return Err(RejectReason::TooManyBlocked(blocked));
        }
        admission(&inner.tally(), inner.listening.is_some(), inner.spec.exclusive, &all)?;
        let serial = self.host.next_serial();
        let id = format!("{}-{serial}", inner.spec.name);
        let quiet = inner.lines.session();
        let service = self.service(&inner, serial, quiet);
        let hold = service.hold.clone();
        // A connection that does not become a session leaves nothing.
        let began = self.begin_session(&mut inner, id, stream, service);
        if began.is_err() {
            hold.end();
            hold.account().end();
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
        let account = Account::below(&self.account);
        let vmm = Arc::new(Foreign::new(stream.into(), account.clone()));
        let (config, quiet) = (service.config.clone(), service.quiet.clone());
        let shared = Arc::new(Shared::new(id, &*vmm, config, quiet, service.hold.clone())?);
        let (sender, commands) = channel()?;
        let serial = service.hold.serial();
        let socket = VmmSocket::new(vmm, account)?;
        let session = Session::new(socket, service, shared.clone(), (sender.clone(), commands))?;
        Ok(self.run_session(inner, session, serial, shared, sender)?)
    }

    fn service(&self, inner: &Inner, serial: u64, quiet: bool) -> Service {
        Service {
            starter: self.host.starter.clone(),
            endpoint: inner.spec.name.clone(),
            payer: inner.tally().payer().to_owned(),
            location: inner.location(),
            config: inner.spec.engine.clone(),
            unknown: inner.unknown.clone(),
            quiet: Arc::new(AtomicBool::new(quiet)),
            released_until: inner.released().map(|released| released.until),
            hold: self.host.holder.group(Group::Session(serial)),
            list: self.host.list.clone(),
        }
    }

    /// Starts the thread of a session and lists it.
    fn run_session(
        self: &Arc<Self>,
        inner: &mut Inner,
        mut session: Session,
        serial: u64,
        shared: Arc<Shared>,
        sender: Sender<Command>,
    ) -> io::Result<()> {
        let (endpoint, lifeline) = (self.clone(), session.lifeline());
        let (id, own) = (shared.id.clone(), lifeline.thread.clone());
        let run = move || {
            own.get_or_init(ThreadId::current);
            let id = session.id().to_owned();
            let end = session.run();
            if matches!(end, End::Left) {
                // The next broker has what it holds.
                std::mem::forget(session);
                return endpoint.session_left(&id);
            }
            // Dropping it closes what its VMM and its engines sent, which may block.
            endpoint.host.supervisor.ending(&id);
            drop(session);
            endpoint.close_session(&id, &end);
            endpoint.inner().detached.remove(&id);
        };
        thread::Builder::new().name("session".into()).spawn(run)?;
        self.host.supervisor.watch(&id, self, lifeline.vmm.clone());
        inner.sessions.insert(id, LiveSession { serial, shared, sender, lifeline });
        Ok(())
    }

    /// True if the VMM of this session has sent a valid message.
    fn has_begun(&self, id: &str) -> bool {
        self.inner().sessions.get(id).is_some_and(|live| live.shared.view().begun)
    }

    /// The VMM of this session has hung up.
    fn hung_up(&self, id: &str) {
        self.inner().sessions.get(id).iter().for_each(|live| live.sender.send(Command::HungUp));
    }

    /// Takes engines and connection from a session that does not end.
    fn cut(&self, id: &str) {
        let lifeline = self.inner().sessions.get(id).map(|live| live.lifeline.clone());
        lifeline.iter().for_each(Lifeline::cut);
    }

    /// Ends a session whose thread does not: releases what it holds, in a thread of its own, because that may block.
    fn detach(&self, id: &str) {
        let Some(lifeline) = self.inner().sessions.get(id).map(|live| live.lifeline.clone()) else { return };
        let revoke = move || lifeline.revoke();
        if let Err(error) = thread::Builder::new().name("revoke".into()).spawn(revoke) {
            tracing::error!(session = id, %error, "no thread to release what the session holds");
        }
        self.close_session(id, &End::Detached);
    }

    /// Moves a session from the list to the sums of ended sessions in one step, so that no sum ever decreases.
    fn close_session(&self, id: &str, end: &End) {
        let mut inner = self.inner();
        let Some(live) = inner.sessions.remove(id) else { return };
        if matches!(end, End::Detached) {
            inner.detached.insert(id.into());
        }
        inner.add_ended(&EndedSession::of(&live.shared), &self.host.holder.group(Group::Session(live.serial)));
        self.host.list.remove(live.serial);
        if end.rejects_memory() {
            inner.reject_memory(id, &end.to_string());
        } else if !live.shared.is_quiet() {
            tracing::info!(session = id, reason = %end, "session ended");
        }
        self.session_ended.notify_all();
        drop(inner);
        // The supervisor holds the connection open until then.
        live.lifeline.cut();
        self.host.supervisor.forget(id);
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

    fn tally(&self) -> Tally {
        self.inner().tally()
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
    fn new(spec: Spec, preflight: Preflight, released: Option<Released>, counts: Counts, state: State) -> Self {
        let (sessions, detached, lines) = (BTreeMap::new(), BTreeSet::new(), Lines::new(&spec.name));
        let unknown = Arc::default();
        Inner { spec, preflight, listening: None, sessions, detached, lines, released, counts, state, unknown }
    }

    /// Records the endpoint for the next broker.
    fn save(&mut self) {
        let stored = StoredEndpoint {
            spec: self.spec.clone(),
            preflight: self.preflight.clone(),
            socket: self.listening.as_ref().map(|listening| listening.socket.identity()),
            released_until: self.released().map(|released| released.unix),
            counts: self.counts.clone(),
            unknown: self.unknown.names(),
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

    fn listens_at(&self, socket: &Arc<BoundSocket>) -> bool {
        self.listening.as_ref().is_some_and(|listening| Arc::ptr_eq(&listening.socket, socket))
    }

    fn tally(&self) -> Tally {
        Tally {
            endpoint: self.spec.name.clone(),
            consumer: self.spec.consumer.clone(),
            source: self.spec.source.clone(),
            sessions: self.sessions.len(),
            half_open: self.sessions.values().filter(|live| !live.shared.view().begun).count(),
        }
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
