//! Our broker as a process, and a connection to its control socket: for what has to happen to engines at a
//! chosen moment, which the agent would do at one of its own.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use virtiofs_config::EngineConfig;
use virtiofs_contract::VERSION;
use virtiofs_contract::channel::{ChannelError, FramedStream};
use virtiofs_contract::control::{
    Endpoint, EndpointKind, EndpointStatus, Request, Response, SocketSpec, Status, StatusPosition,
};
use virtiofs_contract::preflight::Finding;

use crate::server::{Ready, Server, ServerCommand, ServerError};

/// Why the broker did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Its process could not be started.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// Nobody answers at the control socket.
    #[error("connecting to {socket}: {source}")]
    Connect {
        /// The control socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The conversation broke off.
    #[error("control socket: {0}")]
    Channel(#[from] ChannelError),
    /// It refused.
    #[error("refused: {0}")]
    Refused(Finding),
    /// It answered something else.
    #[error("the broker answers {0}")]
    Unexpected(String),
    /// There is no such endpoint.
    #[error("no endpoint {0}")]
    NoEndpoint(String),
}

/// A broker of our own; ended when dropped.
#[derive(Debug)]
pub struct Broker {
    server: Server,
    runtime: PathBuf,
}

impl Broker {
    /// Starts a broker in `runtime`, which must not be anybody else's; its engine's binary lies beside its own.
    pub fn start(binary: &Path, runtime: &Path, log: &Path) -> Result<Self, BrokerError> {
        let mut command = ServerCommand::new(binary, runtime.join("broker.sock"));
        command.ready = Ready::Appears;
        let server = Server::start(&command.arg("--runtime-dir").arg(runtime).log(log))?;
        Ok(Self { server, runtime: runtime.into() })
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.server.pid()
    }

    /// A connection to its control socket.
    pub fn control(&self) -> Result<Control, BrokerError> {
        Control::connect(self.server.socket())
    }

    /// An endpoint for its own user, with a socket in the runtime directory.
    pub fn endpoint(&self, name: &str, source: &Path, engine: EngineConfig) -> Endpoint {
        endpoint_in(&self.runtime, name, source, engine)
    }
}

/// An endpoint for the broker's own user, with a socket in its runtime directory.
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

/// A conversation with a broker.
#[derive(Debug)]
pub struct Control(FramedStream);

impl Control {
    /// Connects and says hello.
    pub fn connect(socket: &Path) -> Result<Self, BrokerError> {
        let stream =
            UnixStream::connect(socket).map_err(|source| BrokerError::Connect { socket: socket.into(), source })?;
        let mut control = Self(FramedStream::new(stream));
        match control.ask(&Request::Hello { version: VERSION })? {
            Response::Welcome { .. } => Ok(control),
            other => Err(unexpected(&other)),
        }
    }

    /// Any request.
    pub fn ask(&mut self, request: &Request) -> Result<Response, BrokerError> {
        self.0.send(request)?;
        Ok(self.0.receive()?)
    }

    /// Brings an endpoint into being, or changes it.
    pub fn apply(&mut self, endpoint: &Endpoint) -> Result<(), BrokerError> {
        match self.ask(&Request::Apply { endpoint: endpoint.clone(), reuse_preflight_of: None })? {
            Response::Applied { .. } => Ok(()),
            Response::Refused { finding } => Err(BrokerError::Refused(finding)),
            other => Err(unexpected(&other)),
        }
    }

    /// Orders new engines for all sessions of an endpoint.
    pub fn exchange(&mut self, name: &str) -> Result<(), BrokerError> {
        match self.ask(&Request::HandOver { name: name.into(), session: None })? {
            Response::HandingOver { .. } => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The whole status.
    pub fn status(&mut self) -> Result<Status, BrokerError> {
        let mut status = self.status_page(None)?;
        while let Some(after) = status.next.take() {
            status.append(self.status_page(Some(after))?);
        }
        Ok(status)
    }

    /// An endpoint as it is now.
    pub fn status_of(&mut self, name: &str) -> Result<EndpointStatus, BrokerError> {
        let found = self.status()?.endpoints.into_iter().find(|endpoint| endpoint.endpoint.name == name);
        found.ok_or_else(|| BrokerError::NoEndpoint(name.into()))
    }

    fn status_page(&mut self, after: Option<StatusPosition>) -> Result<Status, BrokerError> {
        match self.ask(&Request::Status { after })? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }
}

fn unexpected(response: &Response) -> BrokerError {
    BrokerError::Unexpected(format!("{response:?}"))
}
