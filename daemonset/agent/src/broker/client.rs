//! One conversation on the broker's control socket.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use thiserror::Error;
use virtiofs_config::EngineConfig;
use virtiofs_contract::VERSION;
use virtiofs_contract::channel::{ChannelError, FramedStream};
use virtiofs_contract::control::{Endpoint, PendingHandOver, Request, Response, Status, TraceReply};
use virtiofs_contract::preflight::{Finding, Preflight};

/// How long an answer may take that needs no engine.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// How long a trial engine may take; a source that hangs is only then given up.
const TRIAL_WITHIN: Duration = Duration::from_secs(60);

/// Why the broker did not do what it was asked to.
#[derive(Debug, Error)]
pub(crate) enum ClientError {
    /// Nobody listens on the control socket.
    #[error("no broker answers at {socket}: {error}")]
    Unreachable { socket: String, error: io::Error },
    /// The conversation broke off.
    #[error("the conversation with the broker broke off: {0}")]
    Channel(#[from] ChannelError),
    /// The broker speaks another version.
    #[error(
        "the broker speaks version {theirs} of the control messages, this agent version {VERSION}; use binaries of one release"
    )]
    Version { theirs: u32 },
    /// The broker found the request senseless.
    #[error("the broker refused the request: {0}")]
    Invalid(String),
    /// The broker will not do it, for this reason; nothing was changed.
    #[error("{}: {}\n    -> {}", .0.reason.as_str(), .0.message, .0.remedy)]
    Refused(Finding),
    /// The broker answered something else than was asked.
    #[error("the broker gave an answer that does not belong to the question")]
    Unexpected,
}

/// Sessions that have let go of their source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReleasedSessions {
    /// Their names.
    pub(crate) sessions: Vec<String>,
    /// When they go on by themselves, in seconds since the Unix epoch.
    pub(crate) until: u64,
}

/// A connection to the broker. It blocks: callers in async code put it on a blocking thread.
#[derive(Debug)]
pub(crate) struct Client {
    stream: FramedStream,
    pid: u32,
}

impl Client {
    /// Connects and agrees on the version.
    pub(crate) fn connect(socket: &Path) -> Result<Self, ClientError> {
        let unreachable = |error| ClientError::Unreachable { socket: socket.display().to_string(), error };
        let stream = UnixStream::connect(socket).map_err(unreachable)?;
        stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(unreachable)?;
        let mut client = Client { stream: FramedStream::new(stream), pid: 0 };
        match client.call(&Request::Hello { version: VERSION }, ANSWER_WITHIN)? {
            Response::Welcome { version: VERSION, pid } => {
                client.pid = pid;
                Ok(client)
            }
            Response::Welcome { version, .. } => Err(ClientError::Version { theirs: version }),
            other => Err(unexpected(other)),
        }
    }

    /// The broker's process id.
    pub(crate) fn broker_pid(&self) -> u32 {
        self.pid
    }

    /// The broker as it is now.
    pub(crate) fn status(&mut self) -> Result<Status, ClientError> {
        match self.call(&Request::Status, ANSWER_WITHIN)? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(other)),
        }
    }

    /// Has an endpoint served, or served differently; what its trial found.
    pub(crate) fn apply(&mut self, endpoint: Endpoint) -> Result<Preflight, ClientError> {
        self.applied(&Request::Apply { endpoint, reuse_preflight_of: None }, &[])
    }

    /// The same for one whose socket is to be in this directory. What was found at `reuse_preflight_of`, if that serves the same,
    /// is not tried again.
    pub(crate) fn apply_in(
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

    /// Lets no more VMMs connect to an endpoint; its sessions run on, or end with `force`.
    pub(crate) fn remove(&mut self, name: &str, force: bool) -> Result<(), ClientError> {
        let within = if force { TRIAL_WITHIN } else { ANSWER_WITHIN };
        self.done(&Request::Remove { name: name.to_owned(), force }, within)
    }

    /// Gives the sessions of an endpoint, or one of them, new engines. It is under way when this returns.
    pub(crate) fn exchange(
        &mut self,
        name: &str,
        session: Option<String>,
    ) -> Result<Vec<PendingHandOver>, ClientError> {
        match self.call(&Request::HandOver { name: name.to_owned(), session }, ANSWER_WITHIN)? {
            Response::HandingOver { sessions } => Ok(sessions),
            other => Err(unexpected(other)),
        }
    }

    /// Ends the sessions of an endpoint, or one of them; which were ended.
    pub(crate) fn close(&mut self, name: &str, session: Option<String>) -> Result<Vec<String>, ClientError> {
        match self.call(&Request::Close { name: name.to_owned(), session }, TRIAL_WITHIN)? {
            Response::Closed { sessions } => Ok(sessions),
            other => Err(unexpected(other)),
        }
    }

    /// Has all sessions of an endpoint let go of its source for a time; `force`: also if guests lose open files.
    pub(crate) fn release(
        &mut self,
        name: &str,
        during: Duration,
        force: bool,
    ) -> Result<ReleasedSessions, ClientError> {
        let request = Request::Release { name: name.to_owned(), deadline_ms: milliseconds(during), force };
        match self.call(&request, TRIAL_WITHIN)? {
            Response::Released { sessions, until } => Ok(ReleasedSessions { sessions, until }),
            other => Err(unexpected(other)),
        }
    }

    /// Has them take it up again.
    pub(crate) fn resume(&mut self, name: &str) -> Result<(), ClientError> {
        self.done(&Request::Resume { name: name.to_owned() }, TRIAL_WITHIN)
    }

    /// Has the requests of a session logged for a time, at most `rate` a second; zero: no more.
    pub(crate) fn trace(&mut self, session: &str, during: Duration, rate: u32) -> Result<(), ClientError> {
        let request = Request::Trace { session: session.to_owned(), duration_ms: milliseconds(during), rate };
        match self.call(&request, ANSWER_WITHIN)? {
            Response::Tracing { .. } => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// What was logged from there on.
    pub(crate) fn read_trace(&mut self, session: &str, after: u64) -> Result<TraceReply, ClientError> {
        match self.call(&Request::ReadTrace { session: session.to_owned(), after }, ANSWER_WITHIN)? {
            Response::TraceEntries(traced) => Ok(traced),
            other => Err(unexpected(other)),
        }
    }

    /// Has the broker keep something for this agent and those after it; none: forget it.
    pub(crate) fn put(&mut self, key: &str, value: Option<String>) -> Result<(), ClientError> {
        self.done(&Request::Put { key: key.to_owned(), value }, ANSWER_WITHIN)
    }

    /// Keys that begin like this.
    pub(crate) fn list_keys(&mut self, prefix: &str) -> Result<Vec<String>, ClientError> {
        match self.call(&Request::ListKeys { prefix: prefix.to_owned() }, ANSWER_WITHIN)? {
            Response::Keys { keys } => Ok(keys),
            other => Err(unexpected(other)),
        }
    }

    /// What it keeps under this key.
    pub(crate) fn get(&mut self, key: &str) -> Result<Option<String>, ClientError> {
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

    /// Tries a configuration on a source without serving it.
    pub(crate) fn preflight(&mut self, source: &Path, engine: EngineConfig) -> Result<Preflight, ClientError> {
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
        Ok(self.stream.receive()?)
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn unexpected(response: Response) -> ClientError {
    match response {
        Response::InvalidRequest { message } => ClientError::Invalid(message),
        Response::Refused { finding } => ClientError::Refused(finding),
        _ => ClientError::Unexpected,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn answering(answers: Vec<Response>) -> (tempfile::TempDir, std::path::PathBuf) {
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
    fn a_broker_of_another_version_is_refused_by_number() {
        let (_folder, socket) = answering(vec![Response::Welcome { version: VERSION + 1, pid: 1 }]);
        let error = Client::connect(&socket).unwrap_err();
        assert!(error.to_string().contains(&format!("version {}", VERSION + 1)), "{error}");
    }

    #[test]
    fn a_senseless_request_comes_back_with_the_brokers_words() {
        let welcome = Response::Welcome { version: VERSION, pid: 1 };
        let (_folder, socket) = answering(vec![welcome, Response::InvalidRequest { message: "name: empty".into() }]);
        let error = Client::connect(&socket).unwrap().remove("", false).unwrap_err();
        assert!(matches!(error, ClientError::Invalid(message) if message == "name: empty"));
    }

    #[test]
    fn no_broker_is_said_with_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let error = Client::connect(&folder.path().join("broker.sock")).unwrap_err();
        assert!(error.to_string().contains("broker.sock"), "{error}");
    }
}
