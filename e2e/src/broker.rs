//! Client of the broker's control socket. It reads exact values of a session; `virtiofsctl status` rounds them for
//! people.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use virtiofs_contract::channel::FramedStream;
use virtiofs_contract::control::{EndpointStatus, HolderState, Request, Response, Status, StatusPosition};

/// Read timeout of a response.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);

/// A connection to the broker.
pub(crate) struct Broker {
    stream: FramedStream,
}

impl Broker {
    pub(crate) fn connect(runtime_dir: &Path) -> Result<Self> {
        let stream = UnixStream::connect(runtime_dir.join("broker.sock")).context("connecting to the broker")?;
        stream.set_read_timeout(Some(RESPONSE_TIMEOUT)).context("setting a time limit")?;
        let mut broker = Self { stream: FramedStream::new(stream) };
        match broker.request(&Request::hello())? {
            Response::Welcome { .. } => Ok(broker),
            other => bail!("unexpected response of the broker to Hello: {other:?}"),
        }
    }

    /// Status of all endpoints.
    pub(crate) fn endpoints(&mut self) -> Result<Vec<EndpointStatus>> {
        let mut status = self.status_page(None)?;
        while let Some(after) = status.next.take() {
            status.append(self.status_page(Some(after))?);
        }
        Ok(status.endpoints)
    }

    /// State of the holder of descriptors.
    pub(crate) fn holder(&mut self) -> Result<HolderState> {
        Ok(self.status_page(None)?.holder)
    }

    fn status_page(&mut self, after: Option<StatusPosition>) -> Result<Status> {
        match self.request(&Request::Status { after })? {
            Response::Status(status) => Ok(*status),
            other => bail!("unexpected response of the broker to Status: {other:?}"),
        }
    }

    /// Status of the endpoint `name`.
    pub(crate) fn endpoint(&mut self, name: &str) -> Result<EndpointStatus> {
        let found = self.endpoints()?.into_iter().find(|it| it.endpoint.name == name);
        found.with_context(|| format!("the broker has no endpoint {name}"))
    }

    fn request(&mut self, request: &Request) -> Result<Response> {
        self.stream.send(request).context("sending a request to the broker")?;
        self.stream.receive_report().context("waiting for the broker's response")
    }
}
