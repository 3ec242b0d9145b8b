//! One conversation on the broker's control socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use thiserror::Error;
use virtiofs_contract::VERSION;
use virtiofs_contract::channel::{ChannelError, FramedStream};
use virtiofs_contract::control::{Endpoint, Request, Response, Status};
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
    /// The broker answered something else than was asked.
    #[error("the broker gave an answer that does not belong to the question")]
    Unexpected,
}

/// What came of an attempt to serve a share.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Applied {
    /// It is served.
    Yes(Box<Preflight>),
    /// It is not, and nothing was changed.
    No(Finding),
}

/// A connection to the broker. It blocks: callers in async code put it on a blocking thread.
#[derive(Debug)]
pub(crate) struct Client {
    stream: FramedStream,
}

impl Client {
    /// Connects and agrees on the version.
    pub(crate) fn connect(socket: &Path) -> Result<Self, ClientError> {
        let unreachable = |error| ClientError::Unreachable { socket: socket.display().to_string(), error };
        let stream = UnixStream::connect(socket).map_err(unreachable)?;
        stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(unreachable)?;
        let mut client = Client { stream: FramedStream::new(stream) };
        match client.call(&Request::Hello { version: VERSION }, ANSWER_WITHIN)? {
            Response::Welcome { version: VERSION, .. } => Ok(client),
            Response::Welcome { version, .. } => Err(ClientError::Version { theirs: version }),
            other => Err(unexpected(other)),
        }
    }

    /// The broker as it is now.
    pub(crate) fn status(&mut self) -> Result<Status, ClientError> {
        match self.call(&Request::Status, ANSWER_WITHIN)? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(other)),
        }
    }

    /// Has a share served, or served differently.
    pub(crate) fn apply(&mut self, endpoint: Endpoint) -> Result<Applied, ClientError> {
        match self.call(&Request::Apply { endpoint }, TRIAL_WITHIN)? {
            Response::Applied { preflight } => Ok(Applied::Yes(Box::new(preflight))),
            Response::Refused { finding } => Ok(Applied::No(finding)),
            other => Err(unexpected(other)),
        }
    }

    /// Lets no more VMMs connect to a share; its sessions run on.
    pub(crate) fn remove(&mut self, name: &str) -> Result<(), ClientError> {
        match self.call(&Request::Remove { name: name.to_owned(), force: false }, ANSWER_WITHIN)? {
            Response::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    fn call(&mut self, request: &Request, within: Duration) -> Result<Response, ClientError> {
        self.stream.stream().set_read_timeout(Some(within)).map_err(ChannelError::Io)?;
        self.stream.send(request)?;
        Ok(self.stream.receive()?)
    }
}

fn unexpected(response: Response) -> ClientError {
    match response {
        Response::Invalid { message } => ClientError::Invalid(message),
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
        let (_folder, socket) = answering(vec![welcome, Response::Invalid { message: "name: empty".into() }]);
        let error = Client::connect(&socket).unwrap().remove("").unwrap_err();
        assert!(matches!(error, ClientError::Invalid(message) if message == "name: empty"));
    }

    #[test]
    fn no_broker_is_said_with_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let error = Client::connect(&folder.path().join("broker.sock")).unwrap_err();
        assert!(error.to_string().contains("broker.sock"), "{error}");
    }
}
