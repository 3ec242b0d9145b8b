//! The endpoints of this broker, and the requests of the agent.

mod restore;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use thiserror::Error;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{
    Endpoint as Spec, HolderState, LONGEST_RELEASE_MS, LONGEST_TRACE_MS, LostSession, Response, SHORTEST_RELEASE_MS,
    Status, StatusPosition, TraceReply,
};
use virtiofs_contract::preflight::{Finding, Preflight, Reason};
use virtiofs_contract::trace::MAX_RATE;

use crate::endpoint::Endpoint;
use crate::endpoint::changes::{Change, Changes};
use crate::endpoint::endpoints::{Endpoints, Member};
use crate::endpoint::host::Host;
use crate::endpoint::listening::{self, NotApplied, Prepared};
use crate::endpoint::socket_checks::SocketChecks;
use crate::engine::finding;
use crate::engine::source::SourceLocation;
use crate::holder::Held;
use crate::listen::{BoundSocket, ListenError};
use crate::poll::monotonic_ns;
use crate::session::shared::Shared;
use crate::session_list::Sessions;
use crate::status_page;
use crate::store::Store;

/// Time within which sessions must end on request.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// Time within which the file system of a socket must respond.
const SOCKET_DEADLINE: Duration = Duration::from_secs(5);

/// Time for which a removal waits for a change of the same endpoint, which takes milliseconds.
const CHANGE_DEADLINE: Duration = Duration::from_secs(1);

/// The broker's state.
#[derive(Debug)]
pub(crate) struct Broker {
    host: Arc<Host>,
    endpoints: Arc<Endpoints<Endpoint>>,
    /// What requests are changing, one request at a time.
    changes: Changes,
    /// Held while endpoints change. Only the end of the broker uses a file system meanwhile, or awaits anything.
    changing: Mutex<()>,
    socket_checks: SocketChecks,
    /// Values stored by the agent.
    pub(crate) store: Store,
    /// Sessions that were lost with an earlier broker, at endpoints that do not exist yet.
    lost: Mutex<BTreeMap<String, Vec<LostSession>>>,
    /// True once all sessions are to end.
    draining: AtomicBool,
}

/// Why an endpoint is invalid.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum InvalidEndpoint {
    #[error("name {0:?}: 1 to 253 of a-z, 0-9, '.', '-' are expected")]
    Name(String),
    #[error("source {0}: an absolute path is expected")]
    Source(String),
    #[error("subPath {0}: a relative path without `.` and `..` is expected")]
    SubPath(String),
    #[error("socket path {0}: an absolute path is expected")]
    Socket(String),
    #[error("socket mode {0:o}: permission bits up to 777 are expected")]
    Mode(u32),
    #[error(
        "descriptors: {0}; kind Volume requires the directory of the socket, kind Listener the socket, and other kinds none"
    )]
    Descriptors(usize),
    #[error("socket path {path} belongs to endpoint {owner}")]
    SocketOf { path: String, owner: String },
    #[error("endpoint {name} serves {source_now} to {sessions} sessions; its source cannot change under them")]
    SourceInUse { name: String, source_now: String, sessions: usize },
}

/// Why a request is invalid.
#[derive(Debug)]
pub(crate) struct InvalidRequest(pub(crate) String);

impl Broker {
    /// A broker that continues with what an earlier one has left at the holder. `listed`: the sessions that it had.
    pub(crate) fn new(host: Arc<Host>, store: Store, mut held: Held, listed: &Sessions) -> Arc<Self> {
        let broker = Arc::new(Broker {
            host,
            endpoints: Arc::default(),
            changes: Changes::default(),
            changing: Mutex::default(),
            socket_checks: SocketChecks::default(),
            store,
            lost: Mutex::default(),
            draining: AtomicBool::new(false),
        });
        broker.restore(&mut held, listed);
        broker
    }

    fn endpoints(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Endpoint>>> {
        self.endpoints.live()
    }

    fn all(&self) -> Vec<Arc<Endpoint>> {
        self.endpoints.all()
    }

    /// `fds`: the descriptors of the request, see [`EndpointKind::descriptors`].
    pub(crate) fn apply(&self, spec: Spec, reuse_preflight_of: Option<&str>, fds: Vec<OwnedFd>) -> Response {
        if let Err(invalid) = check(&spec, fds.len()) {
            return Response::InvalidRequest { message: invalid.to_string() };
        }
        if self.draining.load(SeqCst) {
            return Response::Refused { finding: drained() };
        }
        // What is slow, and may hang with a file system, runs before anything is locked.
        let location = SourceLocation { source: spec.source.clone(), sub_path: spec.sub_path.clone() };
        let preflight = match self.found_at(reuse_preflight_of, &spec) {
            Some(preflight) => preflight,
            None => match self.host.starter.preflight(&location, &spec.engine) {
                Ok(preflight) => preflight,
                Err(finding) => return Response::Refused { finding },
            },
        };
        let deadline = Instant::now() + SOCKET_DEADLINE;
        let (prepared, _change) = match self.prepare(&spec, fds.into_iter().next(), deadline) {
            Ok(prepared) => prepared,
            Err(response) => return *response,
        };
        let (response, unused) = self.commit(spec, preflight, prepared);
        listening::unlink(unused.into_iter().collect(), deadline);
        response
    }

    /// Prepares the socket of an endpoint. No other request changes the endpoint while the returned change is under way.
    fn prepare(
        &self,
        spec: &Spec,
        given: Option<OwnedFd>,
        deadline: Instant,
    ) -> Result<(Prepared, Change), Box<Response>> {
        let refused = |error: ListenError| Box::new(Response::Refused { finding: no_socket(&error) });
        let change = self.changes.begin(&spec.name, &spec.socket.path, deadline);
        let change = change.ok_or_else(|| refused(ListenError::Blocked(spec.socket.path.clone())))?;
        let known =
            self.known(spec).map_err(|error| Box::new(Response::InvalidRequest { message: error.to_string() }))?;
        let current = known.and_then(|endpoint| endpoint.current());
        listening::prepare(spec.socket.clone(), current, (spec.kind, given), change, deadline).map_err(refused)
    }

    /// Puts a prepared socket into use. Returns the response, and the socket that is not used any more.
    fn commit(&self, spec: Spec, preflight: Preflight, prepared: Prepared) -> (Response, Option<Arc<BoundSocket>>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.draining.load(SeqCst) {
            return (Response::Refused { finding: drained() }, prepared.unused());
        }
        let known = match self.known(&spec) {
            Ok(known) => known,
            Err(invalid) => return (Response::InvalidRequest { message: invalid.to_string() }, prepared.unused()),
        };
        let name = spec.name.clone();
        let create = || {
            let lost = self.lost().get(&spec.name).cloned().unwrap_or_default();
            Endpoint::new(spec.clone(), preflight.clone(), self.host.clone(), &self.endpoints, lost)
        };
        let endpoint = known.unwrap_or_else(create);
        // No session is admitted before the other endpoints know this one.
        let _admitting = self.endpoints.admit();
        match endpoint.apply(spec, preflight.clone(), prepared) {
            Ok(before) => {
                // The endpoint is recorded, with its lost sessions.
                if self.lost().remove(&name).is_some() {
                    self.host.list.counted(&name);
                }
                self.endpoints().insert(name, endpoint);
                (Response::Applied { preflight }, before)
            }
            Err(NotApplied { error, unused }) => (Response::Refused { finding: no_socket(&error) }, unused),
        }
    }

    /// The preflight result of another endpoint with the same directory and configuration.
    fn found_at(&self, name: Option<&str>, spec: &Spec) -> Option<Preflight> {
        let other = self.endpoints().get(name?).cloned()?;
        let of = |spec: &Spec| (spec.source.clone(), spec.sub_path.clone(), spec.engine.clone());
        (other.is_listening() && of(&other.spec()) == of(spec)).then(|| other.preflight())
    }

    /// The endpoint of this name, if it may change to the new one.
    fn known(&self, spec: &Spec) -> Result<Option<Arc<Endpoint>>, InvalidEndpoint> {
        for endpoint in self.all() {
            let other = endpoint.spec();
            let sessions = endpoint.tally().sessions;
            if other.name == spec.name {
                let same = (&other.source, &other.sub_path) == (&spec.source, &spec.sub_path);
                if !same && sessions > 0 {
                    let source_now = endpoint.location().path().display().to_string();
                    return Err(InvalidEndpoint::SourceInUse { name: other.name, source_now, sessions });
                }
            } else if other.socket.path == spec.socket.path && endpoint.is_listening() {
                let path = spec.socket.path.display().to_string();
                return Err(InvalidEndpoint::SocketOf { path, owner: other.name });
            }
        }
        Ok(self.endpoints().get(&spec.name).cloned())
    }

    pub(crate) fn preflight(&self, source: PathBuf, sub_path: Option<PathBuf>, config: &EngineConfig) -> Response {
        if let Err(invalid) = check_location(&source, sub_path.as_deref()) {
            return Response::InvalidRequest { message: invalid.to_string() };
        }
        match self.host.starter.preflight(&SourceLocation { source, sub_path }, config) {
            Ok(preflight) => Response::PreflightPassed { preflight },
            Err(finding) => Response::Refused { finding },
        }
    }

    pub(crate) fn remove(&self, name: &str, force: bool) -> Response {
        let Some(endpoint) = self.endpoints().get(name).cloned() else { return Response::Done };
        let now = Instant::now();
        // Without it, a hung file system blocks a change, and the endpoint goes nevertheless.
        let change = self.changes.begin(name, &endpoint.spec().socket.path, now + CHANGE_DEADLINE);
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = endpoint.remove(force);
        drop(changing);
        listening::unlink(socket.into_iter().collect(), now + SOCKET_DEADLINE);
        drop(change);
        if force && !endpoint.wait_until_empty(END_DEADLINE) {
            tracing::warn!(endpoint = name, "sessions are still ending");
        }
        Response::Done
    }

    fn endpoint(&self, name: &str) -> Result<Arc<Endpoint>, InvalidRequest> {
        let endpoint = self.endpoints().get(name).cloned();
        endpoint.ok_or_else(|| InvalidRequest(format!("there is no endpoint {name}")))
    }

    /// An endpoint, which has this session if one is named.
    fn endpoint_with(&self, name: &str, session: Option<&str>) -> Result<Arc<Endpoint>, InvalidRequest> {
        let endpoint = self.endpoint(name)?;
        match session.filter(|session| endpoint.session(session).is_none()) {
            Some(session) => Err(InvalidRequest(format!("endpoint {name} has no session {session}"))),
            None => Ok(endpoint),
        }
    }

    fn session(&self, id: &str) -> Result<Arc<Shared>, InvalidRequest> {
        let found = self.all().iter().find_map(|endpoint| endpoint.session(id));
        found.ok_or_else(|| InvalidRequest(format!("there is no session {id}")))
    }

    pub(crate) fn hand_over(&self, name: &str, session: Option<&str>) -> Result<Response, InvalidRequest> {
        let sessions = self.endpoint_with(name, session)?.hand_over(session);
        Ok(Response::HandingOver { sessions })
    }

    pub(crate) fn close(&self, name: &str, session: Option<&str>) -> Result<Response, InvalidRequest> {
        let sessions = self.endpoint_with(name, session)?.close(session, END_DEADLINE);
        Ok(Response::Closed { sessions })
    }

    pub(crate) fn release(&self, name: &str, deadline_ms: u64, force: bool) -> Result<Response, InvalidRequest> {
        let endpoint = self.endpoint(name)?;
        let longest = duration("deadlineMs", deadline_ms, SHORTEST_RELEASE_MS, LONGEST_RELEASE_MS)?;
        match endpoint.release(longest, force, &self.host.engines) {
            Ok((sessions, until)) => Ok(Response::Released { sessions, until }),
            Err(finding) => Ok(Response::Refused { finding }),
        }
    }

    pub(crate) fn resume(&self, name: &str) -> Result<Response, InvalidRequest> {
        let endpoint = self.endpoint(name)?;
        if let Err(finding) = self.host.starter.check_source(&endpoint.location(), endpoint.mounted_at()) {
            return Ok(Response::Refused { finding });
        }
        endpoint.resume();
        Ok(Response::Done)
    }

    pub(crate) fn trace(&self, session: &str, duration_ms: u64, rate: u32) -> Result<Response, InvalidRequest> {
        let session = self.session(session)?;
        let longest = duration("durationMs", duration_ms, 0, LONGEST_TRACE_MS)?;
        if rate > MAX_RATE {
            return Err(InvalidRequest(format!("rate {rate}: at most {MAX_RATE} a second are logged")));
        }
        let now = monotonic_ns();
        let until_ns = if duration_ms == 0 { now } else { now + longest.as_nanos() as u64 };
        session.persistent.trace.enable(until_ns, rate);
        let until = (SystemTime::now() + longest).duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Response::Tracing { until })
    }

    pub(crate) fn read_trace(&self, session: &str, after: u64) -> Result<Response, InvalidRequest> {
        let session = self.session(session)?;
        let trace = &session.persistent.trace;
        // Read before the entries: all requests logged until then are in the segment.
        let ended = !trace.is_enabled(monotonic_ns());
        let segment = trace.read(after);
        let (entries, next, lost) = (segment.entries, segment.next, segment.lost);
        Ok(Response::TraceEntries(TraceReply { entries, next, lost, rate_limited: trace.rate_limited(), ended }))
    }

    pub(crate) fn put(&self, key: String, value: Option<String>) -> Response {
        match self.store.put(key, value) {
            Ok(()) => Response::Done,
            Err(error) => Response::InvalidRequest { message: error.to_string() },
        }
    }

    pub(crate) fn status(&self, after: Option<&StatusPosition>) -> Status {
        if after.is_none() {
            self.socket_checks.check(self.all().iter().filter_map(|endpoint| endpoint.socket()).collect());
        }
        let mut endpoints = Vec::new();
        let next = status_page::fill(self.all().iter().map(|endpoint| endpoint.status()), after, &mut endpoints);
        let holder = match (self.host.holder.is_present(), self.host.holder.is_missing()) {
            (false, _) => HolderState::None,
            (true, false) => HolderState::Connected,
            (true, true) => HolderState::Missing,
        };
        Status { pid: std::process::id(), instance: self.host.instance(), holder, endpoints, next }
    }

    fn lost(&self) -> MutexGuard<'_, BTreeMap<String, Vec<LostSession>>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all sessions for good. No endpoint is applied afterwards.
    pub(crate) fn drain(&self) -> Response {
        self.draining.store(true, SeqCst);
        let sessions = self.endpoints.tallies().iter().map(|it| it.sessions).sum::<usize>() as u64;
        tracing::info!(sessions, "draining: all sessions end");
        self.shut_down();
        Response::Drained { sessions }
    }

    /// Leaves everything to the next broker: engines serve, sockets listen.
    pub(crate) fn leave(&self) {
        // Not released before the process ends: nothing is changed and no session begins any more.
        std::mem::forget(self.changing.lock().unwrap_or_else(PoisonError::into_inner));
        std::mem::forget(self.endpoints.admit());
        let end = Instant::now() + END_DEADLINE;
        let endpoints = self.all();
        // All stop accepting before any is awaited: a connection that is accepted and not yet held would be lost.
        endpoints.iter().for_each(|endpoint| endpoint.begin_to_leave());
        for endpoint in endpoints {
            if !endpoint.wait_until_left(end.saturating_duration_since(Instant::now())) {
                tracing::warn!(
                    endpoint = endpoint.spec().name,
                    "a session is busy; its engine is replaced by the next broker"
                );
            }
        }
    }

    /// Stops listening, ends all sessions and waits until no engine is left.
    pub(crate) fn shut_down(&self) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let endpoints = self.all();
        let sockets = endpoints.iter().filter_map(|endpoint| endpoint.remove(true)).collect();
        // One deadline for all, so that the process ends.
        let end = Instant::now() + END_DEADLINE;
        listening::unlink(sockets, end);
        let left = || end.saturating_duration_since(Instant::now());
        for endpoint in &endpoints {
            endpoint.wait_until_empty(left());
        }
        match self.host.engines.wait_until_all_are_gone(left()) {
            0 => {}
            left => tracing::warn!(engines = left, "engines are still ending: a hung source keeps them"),
        }
    }
}

fn check(spec: &Spec, descriptors: usize) -> Result<(), InvalidEndpoint> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' || c == '-';
    if spec.name.is_empty() || spec.name.len() > 253 || !spec.name.chars().all(allowed) {
        return Err(InvalidEndpoint::Name(spec.name.clone()));
    }
    check_location(&spec.source, spec.sub_path.as_deref())?;
    if !spec.socket.path.is_absolute() {
        return Err(InvalidEndpoint::Socket(spec.socket.path.display().to_string()));
    }
    if spec.socket.mode & !0o777 != 0 {
        return Err(InvalidEndpoint::Mode(spec.socket.mode));
    }
    if descriptors != spec.kind.descriptors() {
        return Err(InvalidEndpoint::Descriptors(descriptors));
    }
    Ok(())
}

fn check_location(source: &Path, sub_path: Option<&Path>) -> Result<(), InvalidEndpoint> {
    if !source.is_absolute() {
        return Err(InvalidEndpoint::Source(source.display().to_string()));
    }
    let is_plain = |path: &Path| {
        let normal = path.components().all(|component| matches!(component, Component::Normal(_)));
        normal && !path.as_os_str().is_empty()
    };
    match sub_path.filter(|sub_path| !is_plain(sub_path)) {
        Some(sub_path) => Err(InvalidEndpoint::SubPath(sub_path.display().to_string())),
        None => Ok(()),
    }
}

fn duration(field: &str, milliseconds: u64, least: u64, most: u64) -> Result<Duration, InvalidRequest> {
    if (least..=most).contains(&milliseconds) {
        return Ok(Duration::from_millis(milliseconds));
    }
    Err(InvalidRequest(format!("{field} {milliseconds}: {least} to {most} are expected")))
}

/// The finding for an endpoint that is applied while all sessions end.
fn drained() -> Finding {
    finding(Reason::SocketUnavailable, "the broker was drained: it serves nothing more", "start the broker again")
}

fn no_socket(error: &ListenError) -> Finding {
    let remedy = match error {
        ListenError::Foreign(_) => "move that file away, or choose another path for the socket",
        ListenError::Taken(_) => "end the process that listens there, or choose another path for the socket",
        ListenError::NotAPath(_) => "name a file in an existing directory",
        ListenError::NotADirectory(_) => "send the descriptor of a directory",
        ListenError::NotListening(_) => "send a Unix stream socket on which listen(2) was called",
        ListenError::Directory { .. } => "create the directory, and let the broker's user enter it",
        ListenError::Blocked(_) => "restore the file system of that directory, or choose another path for the socket",
        ListenError::Removed(_) => "none needed: it is created again",
        ListenError::Io { .. } => {
            "let the broker's user write in the directory; setting an owner needs CAP_CHOWN and CAP_FOWNER"
        }
    };
    finding(Reason::SocketUnavailable, error.to_string(), remedy)
}

#[cfg(test)]
mod tests {
    use virtiofs_config::Access;
    use virtiofs_contract::control::{EndpointKind, SocketSpec};

    use super::*;

    fn spec() -> Spec {
        Spec {
            name: "share".into(),
            kind: EndpointKind::Share,
            source: "/srv".into(),
            sub_path: None,
            socket: SocketSpec { path: "/run/s.sock".into(), owner: None, group: None, mode: 0o660 },
            engine: EngineConfig::stock(Access::ReadOnly),
            exclusive: false,
            consumer: None,
        }
    }

    #[test]
    fn invalid_endpoint_is_refused_by_field() {
        assert_eq!(check(&spec(), 0), Ok(()));
        assert_eq!(check(&spec(), 1), Err(InvalidEndpoint::Descriptors(1)));
        let given = Spec { kind: EndpointKind::Volume, ..spec() };
        assert_eq!(check(&given, 1), Ok(()));
        assert_eq!(check(&given, 0), Err(InvalidEndpoint::Descriptors(0)));
        let mut table = Vec::new();
        for name in ["", "Share", "a/b", "a b", &"x".repeat(254)] {
            table.push((Spec { name: name.into(), ..spec() }, InvalidEndpoint::Name(name.into())));
        }
        table.push((Spec { source: "srv".into(), ..spec() }, InvalidEndpoint::Source("srv".into())));
        for sub_path in ["", "/abs", "../up", "a/../b", "."] {
            let spec = Spec { sub_path: Some(sub_path.into()), ..spec() };
            table.push((spec, InvalidEndpoint::SubPath(sub_path.into())));
        }
        let socket = |path: &str, mode| SocketSpec { path: path.into(), mode, ..spec().socket };
        table.push((Spec { socket: socket("s", 0o600), ..spec() }, InvalidEndpoint::Socket("s".into())));
        table.push((Spec { socket: socket("/s", 0o4755), ..spec() }, InvalidEndpoint::Mode(0o4755)));
        for (wrong, expected) in table {
            assert_eq!(check(&wrong, 0), Err(expected));
        }
    }
}
