//! The broker's control socket, which the agent otherwise has for itself: what it says of a session is exact where
//! `virtiofsctl status` rounds for people.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use virtiofs_contract::VERSION;
use virtiofs_contract::channel::FramedStream;
use virtiofs_contract::control::{EndpointStatus, Request, Response, Status, StatusPosition};

const ANSWER: Duration = Duration::from_secs(20);

/// A connection to the broker.
pub(crate) struct Broker {
    stream: FramedStream,
}

impl Broker {
    pub(crate) fn connect(runtime_dir: &Path) -> Result<Self> {
        let stream = UnixStream::connect(runtime_dir.join("broker.sock")).context("connecting to the broker")?;
        stream.set_read_timeout(Some(ANSWER)).context("setting a time limit")?;
        let mut broker = Self { stream: FramedStream::new(stream) };
        match broker.ask(&Request::Hello { version: VERSION })? {
            Response::Welcome { version: VERSION, .. } => Ok(broker),
            other => bail!("the broker answered a greeting with {other:?}"),
        }
    }

    /// Everywhere that VMs connect, as it is now.
    pub(crate) fn endpoints(&mut self) -> Result<Vec<EndpointStatus>> {
        let mut status = self.status_page(None)?;
        while let Some(after) = status.next.take() {
            status.append(self.status_page(Some(after))?);
        }
        Ok(status.endpoints)
    }

    fn status_page(&mut self, after: Option<StatusPosition>) -> Result<Status> {
        match self.ask(&Request::Status { after })? {
            Response::Status(status) => Ok(*status),
            other => bail!("the broker answered a request for its status with {other:?}"),
        }
    }

    /// One share as it is now.
    pub(crate) fn endpoint(&mut self, name: &str) -> Result<EndpointStatus> {
        let found = self.endpoints()?.into_iter().find(|it| it.endpoint.name == name);
        found.with_context(|| format!("the broker knows no endpoint {name}"))
    }

    fn ask(&mut self, request: &Request) -> Result<Response> {
        self.stream.send(request).context("asking the broker")?;
        self.stream.receive().context("waiting for the broker's answer")
    }
}
