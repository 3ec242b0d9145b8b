//! Client of the broker's control socket.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use thiserror::Error;
use virtiofs_config::EngineConfig;
use virtiofs_contract::Versions;
use virtiofs_contract::channel::{ChannelError, FramedStream};
use virtiofs_contract::control::{Endpoint, PendingHandOver, Request, Response, Status, StatusPosition, TraceReply};
use virtiofs_contract::preflight::{Finding, Preflight};

/// Longest time to wait for a response that needs no engine.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Longest time to wait for a trial engine, whose source may hang.
const TRIAL_WITHIN: Duration = Duration::from_secs(60);

/// Why a request to the broker failed. Each message includes its cause.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens on the control socket.
    #[error("no broker answers at {socket}: {error}")]
    Unreachable {
        /// Path of the control socket.
        socket: String,
        /// Why it cannot be connected to.
        error: io::Error,
    },
    /// The connection failed.
    #[error("connection to the broker failed: {0}")]
    Channel(ChannelError),
    /// The broker speaks another version.
    #[error(
        "the broker speaks version {theirs} of the control messages, this program {}; use programs of one release, or of two \
         neighbouring ones",
        Versions::OURS
    )]
    Version {
        /// The broker's version.
        theirs: u32,
    },
    /// The request is invalid.
    #[error("the broker refused the request: {0}")]
    Invalid(String),
    /// The broker rejected the request for this reason; nothing was changed.
    #[error("{}: {}\n    -> {}", .0.reason.as_str(), .0.message, .0.remedy)]
    Rejected(Finding),
    /// The response does not belong to the request.
    #[error("unexpected response from the broker")]
    Unexpected,
}

impl From<ChannelError> for ClientError {
    fn from(error: ChannelError) -> Self {
        ClientError::Channel(error)
    }
}

/// Sessions that have released their source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReleasedSessions {
    /// Their names.
    pub sessions: Vec<String>,
    /// When they resume by themselves, in seconds since the Unix epoch.
    pub until: u64,
}

/// A connection to the broker. Calls block: async code makes them on a blocking thread.
#[derive(Debug)]
pub struct Client {
    stream: FramedStream,
    pid: u32,
}

impl Client {
    /// Connects and agrees on a version.
    ///
    /// # Errors
    /// Nobody listens, or the broker speaks no version that this program speaks.
    pub fn connect(socket: &Path) -> Result<Self, ClientError> {
        let unreachable = |error| ClientError::Unreachable { socket: socket.display().to_string(), error };
        let stream = UnixStream::connect(socket).map_err(unreachable)?;
        stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(unreachable)?;
        let mut client = Client { stream: FramedStream::new(stream), pid: 0 };
        match client.call(&Request::hello(), ANSWER_WITHIN)? {
            Response::Welcome { version, pid } if Versions::OURS.include(version) => {
                client.pid = pid;
                Ok(client)
            }
            Response::Welcome { version, .. } => Err(ClientError::Version { theirs: version }),
            other => Err(unexpected(other)),
        }
    }

    /// The broker's process id.
    pub fn broker_pid(&self) -> u32 {
        self.pid
    }

    /// The broker's status, all pages of it.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        let mut status = self.status_page(None)?;
        while let Some(after) = status.next.take() {
            let page = self.status_page(Some(after.clone()))?;
            if page.next.as_ref() == Some(&after) {
                return Err(ClientError::Unexpected);
            }
            status.append(page);
        }
        Ok(status)
    }

    fn status_page(&mut self, after: Option<StatusPosition>) -> Result<Status, ClientError> {
        match self.call(&Request::Status { after }, ANSWER_WITHIN)? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(other)),
        }
    }

    /// Serves an endpoint, or changes how it is served. Returns what its trial engine found.
    pub fn apply(&mut self, endpoint: Endpoint) -> Result<Preflight, ClientError> {
        self.applied(&Request::Apply { endpoint, reuse_preflight_of: None }, &[])
    }

    /// Like [`apply`](Self::apply), with the socket that the caller listens on.
    pub fn apply_at(&mut self, endpoint: Endpoint, listener: BorrowedFd<'_>) -> Result<Preflight, ClientError> {
        self.applied(&Request::Apply { endpoint, reuse_preflight_of: None }, &[listener])
    }

    /// Like [`apply`](Self::apply), with the socket in this directory. If the endpoint `reuse_preflight_of` serves the same source
    /// and configuration, its trial's result is used.
    pub fn apply_in(
        &mut self,
        endpoint: Endpoint,
        directory: BorrowedFd<'_>,
        reuse_preflight_of: Option<String>,
    ) -> Result<Preflight, ClientError> {
        self.applied(&Request::Apply { endpoint, reuse_preflight_of }, &[directory])
    }

    fn applied(&mut self, request: &Request, beside: &[BorrowedFd<'_>]) -> Result<Preflight, ClientError> {
        match self.call_with(request, beside, TRIAL_WITHIN)? {
            Response::Applied { preflight } => Ok(preflight),
            other => Err(unexpected(other)),
        }
    }

    /// Closes an endpoint's socket. Its sessions continue; with `force` they end.
    pub fn remove(&mut self, name: &str, force: bool) -> Result<(), ClientError> {
        let within = if force { TRIAL_WITHIN } else { ANSWER_WITHIN };
        self.done(&Request::Remove { name: name.to_owned(), force }, within)
    }

    /// Starts the replacement of the engines of an endpoint's sessions, or of one session.
    pub fn hand_over(&mut self, name: &str, session: Option<String>) -> Result<Vec<PendingHandOver>, ClientError> {
        match self.call(&Request::HandOver { name: name.to_owned(), session }, ANSWER_WITHIN)? {
            Response::HandingOver { sessions } => Ok(sessions),
            other => Err(unexpected(other)),
        }
    }

    /// Ends the sessions of an endpoint, or one of them. Returns the ids of those ended.
    pub fn close(&mut self, name: &str, session: Option<String>) -> Result<Vec<String>, ClientError> {
        match self.call(&Request::Close { name: name.to_owned(), session }, TRIAL_WITHIN)? {
            Response::Closed { sessions } => Ok(sessions),
            other => Err(unexpected(other)),
        }
    }

    /// Releases the source in all sessions of an endpoint for a time; with `force` also if guests lose open files.
    pub fn release(&mut self, name: &str, during: Duration, force: bool) -> Result<ReleasedSessions, ClientError> {
        let request = Request::Release { name: name.to_owned(), deadline_ms: milliseconds(during), force };
        match self.call(&request, TRIAL_WITHIN)? {
            Response::Released { sessions, until } => Ok(ReleasedSessions { sessions, until }),
            other => Err(unexpected(other)),
        }
    }

    /// Ends a release: the sessions open the source again.
    pub fn resume(&mut self, name: &str) -> Result<(), ClientError> {
        self.done(&Request::Resume { name: name.to_owned() }, TRIAL_WITHIN)
    }

    /// Ends all sessions for good; the broker serves nothing more. Returns how many were ended.
    pub fn drain(&mut self) -> Result<u64, ClientError> {
        match self.call(&Request::Drain, TRIAL_WITHIN)? {
            Response::Drained { sessions } => Ok(sessions),
            other => Err(unexpected(other)),
        }
    }

    /// Traces the requests of a session for a time, at most `rate` a second. Zero time ends the trace.
    pub fn trace(&mut self, session: &str, during: Duration, rate: u32) -> Result<(), ClientError> {
        let request = Request::Trace { session: session.to_owned(), duration_ms: milliseconds(during), rate };
        match self.call(&request, ANSWER_WITHIN)? {
            Response::Tracing { .. } => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Reads the trace from position `after` on.
    pub fn read_trace(&mut self, session: &str, after: u64) -> Result<TraceReply, ClientError> {
        match self.call(&Request::ReadTrace { session: session.to_owned(), after }, ANSWER_WITHIN)? {
            Response::TraceEntries(traced) => Ok(traced),
            other => Err(unexpected(other)),
        }
    }

    /// Stores a value with the broker, for this agent and its successors; `None` removes the key.
    pub fn put(&mut self, key: &str, value: Option<String>) -> Result<(), ClientError> {
        self.done(&Request::Put { key: key.to_owned(), value }, ANSWER_WITHIN)
    }

    /// Stored keys that begin with `prefix`.
    pub fn list_keys(&mut self, prefix: &str) -> Result<Vec<String>, ClientError> {
        match self.call(&Request::ListKeys { prefix: prefix.to_owned() }, ANSWER_WITHIN)? {
            Response::Keys { keys } => Ok(keys),
            other => Err(unexpected(other)),
        }
    }

    /// The value stored under a key.
    pub fn get(&mut self, key: &str) -> Result<Option<String>, ClientError> {
        match self.call(&Request::Get { key: key.to_owned() }, ANSWER_WITHIN)? {
            Response::Value { value } => Ok(value),
            other => Err(unexpected(other)),
        }
    }

    fn done(&mut self, request: &Request, within: Duration) -> Result<(), ClientError> {
        match self.call(request, within)? {
            Response::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Tries a configuration on a source with a trial engine, without serving it.
    pub fn preflight(&mut self, source: &Path, engine: EngineConfig) -> Result<Preflight, ClientError> {
        let request = Request::Preflight { source: source.to_path_buf(), sub_path: None, engine };
        match self.call(&request, TRIAL_WITHIN)? {
            Response::PreflightPassed { preflight } => Ok(preflight),
            other => Err(unexpected(other)),
        }
    }

    fn call(&mut self, request: &Request, within: Duration) -> Result<Response, ClientError> {
        self.call_with(request, &[], within)
    }

    fn call_with(
        &mut self,
        request: &Request,
        beside: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<Response, ClientError> {
        self.stream.stream().set_read_timeout(Some(within)).map_err(ChannelError::Io)?;
        self.stream.send_with(request, beside)?;
        // A status that a newer broker sends has fields that this program does not know.
        Ok(self.stream.receive_report()?)
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn unexpected(response: Response) -> ClientError {
    match response {
        Response::InvalidRequest { message } => ClientError::Invalid(message),
        Response::Refused { finding } => ClientError::Rejected(finding),
        _ => ClientError::Unexpected,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use virtiofs_contract::{OLDEST, VERSION};

    use super::*;
    use crate::fixtures;

    fn answering<A: serde::Serialize + Send + 'static>(answers: Vec<A>) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("broker.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || {
            let mut stream = FramedStream::new(listener.accept().unwrap().0);
            for answer in answers {
                stream.receive::<Request>().unwrap();
                stream.send(&answer).unwrap();
            }
        });
        (folder, socket)
    }

    #[test]
    fn another_version_is_refused_by_number() {
        for version in [OLDEST - 1, VERSION + 1] {
            let (_folder, socket) = answering(vec![Response::Welcome { version, pid: 1 }]);
            let error = Client::connect(&socket).unwrap_err();
            assert!(error.to_string().contains(&format!("version {version}")), "{error}");
        }
    }

    #[test]
    fn broker_of_the_previous_version_is_understood() {
        // It requires its own version, and does not know the other field.
        let hello = serde_json::to_value(Request::hello()).unwrap();
        assert_eq!(hello, serde_json::json!({"Hello": {"version": OLDEST, "newest": VERSION}}));
        let (_folder, socket) = answering(vec![Response::Welcome { version: OLDEST, pid: 7 }]);
        assert_eq!(Client::connect(&socket).unwrap().broker_pid(), 7);
    }

    #[test]
    fn unknown_fields_of_a_status_are_ignored() {
        let mut status = serde_json::to_value(fixtures::status(7, vec![fixtures::listening(fixtures::endpoint("a"))]));
        let newer = status.as_mut().unwrap();
        newer["endpoints"][0]["new"] = 1.into();
        newer["endpoints"][0]["endpoint"]["new"] = 2.into();
        newer["endpoints"][0]["endpoint"]["engine"]["confined"] = true.into();
        let newer = serde_json::json!({"Status": newer});
        let welcome = serde_json::to_value(Response::Welcome { version: VERSION, pid: 1 }).unwrap();
        let (_folder, socket) = answering(vec![welcome, newer]);
        let status = Client::connect(&socket).unwrap().status().unwrap();
        assert_eq!(status.endpoints[0].endpoint, fixtures::endpoint("a"));
    }

    #[test]
    fn an_invalid_request_returns_the_brokers_message() {
        let welcome = Response::Welcome { version: VERSION, pid: 1 };
        let (_folder, socket) = answering(vec![welcome, Response::InvalidRequest { message: "name: empty".into() }]);
        let error = Client::connect(&socket).unwrap().remove("", false).unwrap_err();
        assert!(matches!(error, ClientError::Invalid(message) if message == "name: empty"));
    }

    #[test]
    fn a_missing_broker_is_reported_with_its_socket() {
        let folder = tempfile::tempdir().unwrap();
        let error = Client::connect(&folder.path().join("broker.sock")).unwrap_err();
        assert!(error.to_string().contains("broker.sock"), "{error}");
    }
}
