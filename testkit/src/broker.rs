//! The broker as a process, and a client of its control socket, for tests that replace engines at a chosen moment
//! instead of at the agent's.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use virtiofs_config::EngineConfig;
use virtiofs_contract::channel::{ChannelError, FramedStream};
use virtiofs_contract::control::{
    Endpoint, EndpointKind, EndpointStatus, Request, Response, SocketSpec, Status, StatusPosition,
};
use virtiofs_contract::preflight::Finding;

use crate::server::{Ready, Server, ServerCommand, ServerError};

/// An error of the broker.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The process could not be started.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// No process listens on the control socket.
    #[error("connecting to {socket}: {source}")]
    Connect {
        /// The control socket.
        socket: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// An error on the control socket.
    #[error("control socket: {0}")]
    Channel(#[from] ChannelError),
    /// The broker rejected the request.
    #[error("rejected: {0}")]
    Rejected(Finding),
    /// An unexpected response.
    #[error("unexpected response of the broker: {0}")]
    Unexpected(String),
    /// The endpoint does not exist.
    #[error("no endpoint {0}")]
    NoEndpoint(String),
}

/// A broker. Stopped on drop.
#[derive(Debug)]
pub struct Broker {
    server: Server,
    runtime: PathBuf,
}

impl Broker {
    /// Starts a broker in `runtime`, which no other broker may use. The engine's binary is in the same directory as the
    /// broker's.
    pub fn start(binary: &Path, runtime: &Path, log: &Path) -> Result<Self, BrokerError> {
        let mut command = ServerCommand::new(binary, runtime.join("broker.sock"));
        command.ready = Ready::Appears;
        let server = Server::start(&command.arg("--runtime-dir").arg(runtime).log(log))?;
        Ok(Self { server, runtime: runtime.into() })
    }

    /// Process id of the broker.
    pub fn pid(&self) -> i32 {
        self.server.pid()
    }

    /// Connects to the control socket.
    pub fn control(&self) -> Result<Control, BrokerError> {
        Control::connect(self.server.socket())
    }

    /// An endpoint for the current user with a socket in the runtime directory.
    pub fn endpoint(&self, name: &str, source: &Path, engine: EngineConfig) -> Endpoint {
        endpoint_in(&self.runtime, name, source, engine)
    }
}

/// An endpoint for the current user with a socket in a broker's runtime directory.
pub fn endpoint_in(runtime: &Path, name: &str, source: &Path, engine: EngineConfig) -> Endpoint {
    let path = runtime.join("shares").join(format!("{name}.sock"));
    let socket = SocketSpec { path, owner: None, group: None, mode: 0o600 };
    Endpoint {
        name: name.into(),
        kind: EndpointKind::Share,
        source: source.into(),
        sub_path: None,
        socket,
        engine,
        exclusive: false,
        consumer: None,
    }
}

/// A connection to the control socket.
#[derive(Debug)]
pub struct Control(FramedStream);

impl Control {
    /// Connects and sends Hello.
    pub fn connect(socket: &Path) -> Result<Self, BrokerError> {
        let stream =
            UnixStream::connect(socket).map_err(|source| BrokerError::Connect { socket: socket.into(), source })?;
        let mut control = Self(FramedStream::new(stream));
        match control.request(&Request::hello())? {
            Response::Welcome { .. } => Ok(control),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends a request and returns the response.
    pub fn request(&mut self, request: &Request) -> Result<Response, BrokerError> {
        self.0.send(request)?;
        Ok(self.0.receive_report()?)
    }

    /// Creates or changes an endpoint.
    pub fn apply(&mut self, endpoint: &Endpoint) -> Result<(), BrokerError> {
        match self.request(&Request::Apply { endpoint: endpoint.clone(), reuse_preflight_of: None })? {
            Response::Applied { .. } => Ok(()),
            Response::Refused { finding } => Err(BrokerError::Rejected(finding)),
            other => Err(unexpected(&other)),
        }
    }

    /// Requests new engines for all sessions of an endpoint.
    pub fn replace_engines(&mut self, name: &str) -> Result<(), BrokerError> {
        match self.request(&Request::HandOver { name: name.into(), session: None })? {
            Response::HandingOver { .. } => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The status of the broker, all pages.
    pub fn status(&mut self) -> Result<Status, BrokerError> {
        let mut status = self.status_page(None)?;
        while let Some(after) = status.next.take() {
            status.append(self.status_page(Some(after))?);
        }
        Ok(status)
    }

    /// The current status of an endpoint.
    pub fn status_of(&mut self, name: &str) -> Result<EndpointStatus, BrokerError> {
        let found = self.status()?.endpoints.into_iter().find(|endpoint| endpoint.endpoint.name == name);
        found.ok_or_else(|| BrokerError::NoEndpoint(name.into()))
    }

    fn status_page(&mut self, after: Option<StatusPosition>) -> Result<Status, BrokerError> {
        match self.request(&Request::Status { after })? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(response: &Response) -> BrokerError {
    BrokerError::Unexpected(format!("{response:?}"))
}
