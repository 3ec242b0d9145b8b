//! The conversation with the broker: declares the endpoint, and follows its one session to its end.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use virtiofs_client::broker::{Client, ClientError};
use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::report::{ShareReport, ShareState};
use virtiofs_contract::control::{Endpoint, EndpointStatus};
use virtiofs_contract::preflight::{Finding, Preflight};

use crate::metrics::{MetricsFile, Observed};
use crate::remedies::Remedies;

/// Time between two looks at the session.
const OBSERVE_EVERY: Duration = Duration::from_millis(200);

/// Pause before the broker is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(2);

/// The same, for a broker of another version.
const TRY_OTHER_VERSION: Duration = Duration::from_secs(1);

/// What happens with the session.
#[derive(Debug)]
pub(crate) enum Event {
    /// The broker accepts VMMs.
    Ready,
    /// The broker refuses to serve this.
    Refused(Finding),
    /// The broker does not understand what is requested: it is of another version.
    Invalid(String),
    /// The VMM has left.
    Ended,
    /// The session was lost with the broker.
    Lost,
}

/// A request of a person.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Request {
    /// Replace the engine by the one that is on disk now.
    Exchange,
}

/// The session, from here.
#[derive(Debug)]
pub(crate) struct Session {
    /// The broker's socket.
    pub(crate) broker: PathBuf,
    /// What is to be served.
    pub(crate) endpoint: Endpoint,
    /// Where VMMs connect.
    pub(crate) listener: OwnedFd,
    /// Its staleness.
    pub(crate) remedies: Remedies,
    /// What readers of metrics see.
    pub(crate) observed: Observed,
    /// The file of metrics.
    pub(crate) file: Option<MetricsFile>,
}

impl Session {
    /// Follows the session to its end, over any number of brokers. Ends early if nobody sends requests any more.
    pub(crate) fn follow(mut self, requests: &Receiver<Request>, report: impl Fn(Event)) {
        let mut ready = false;
        loop {
            let was_ready = ready;
            let became_ready = |preflight: &Preflight| {
                if !std::mem::replace(&mut ready, true) {
                    preflight.findings.iter().for_each(|finding| tracing::warn!("{finding}"));
                    report(Event::Ready);
                }
            };
            match self.converse(requests, was_ready, became_ready) {
                Ok(Some(event)) => return report(event),
                Ok(None) => return,
                Err(ClientError::Rejected(finding)) if !ready => return report(Event::Refused(finding)),
                Err(error @ (ClientError::Invalid(_) | ClientError::Version { .. })) if !ready => {
                    return report(Event::Invalid(error.to_string()));
                }
                Err(error) => {
                    tracing::debug!(%error, "broker");
                    // Programs of another version were installed: each try fails until a broker of this one runs.
                    let other_version = matches!(error, ClientError::Invalid(_) | ClientError::Version { .. });
                    let pause = if other_version { TRY_OTHER_VERSION } else { TRY_AGAIN };
                    self.observed.forget();
                    // Also the end of this process: it ends the broker first. A request is repeated by whoever made it.
                    if let Err(RecvTimeoutError::Disconnected) = requests.recv_timeout(pause) {
                        return;
                    }
                }
            }
        }
    }

    fn converse(
        &mut self,
        requests: &Receiver<Request>,
        was_ready: bool,
        ready: impl FnOnce(&Preflight),
    ) -> Result<Option<Event>, ClientError> {
        let mut client = Client::connect(&self.broker)?;
        match client.apply_at(self.endpoint.clone(), self.listener.as_fd()) {
            Ok(preflight) => ready(&preflight),
            // This broker has restored the session, which continues as it is.
            Err(ClientError::Rejected(finding)) if was_ready => tracing::warn!("{finding}"),
            Err(error) => return Err(error),
        }
        loop {
            if let Some(event) = self.observe(&mut client)? {
                return Ok(Some(event));
            }
            match requests.recv_timeout(OBSERVE_EVERY) {
                Ok(Request::Exchange) => {
                    client.hand_over(&self.endpoint.name, None)?;
                    tracing::info!("the engine is replaced by the one on disk");
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }

    fn observe(&mut self, client: &mut Client) -> Result<Option<Event>, ClientError> {
        let status = client.status()?;
        let Some(endpoint) = status.endpoints.iter().find(|it| it.endpoint.name == self.endpoint.name) else {
            return Err(ClientError::Unexpected);
        };
        self.observed.update(&status, self.share(endpoint));
        self.file.iter_mut().for_each(|file| file.update(&self.observed));
        if let Some(end) = end_of(endpoint) {
            return Ok(Some(end));
        }
        self.remedies.pass(status.instance, endpoint, client)?;
        let engine = self.remedies.engine();
        if engine != self.endpoint.engine {
            self.endpoint.engine = engine;
            client.apply_at(self.endpoint.clone(), self.listener.as_fd())?;
        }
        Ok(None)
    }

    fn share(&self, endpoint: &EndpointStatus) -> ShareReport {
        let notices: Vec<_> = endpoint.preflight.findings.iter().map(notice).collect();
        ShareReport {
            name: self.endpoint.name.clone(),
            state: if notices.is_empty() { ShareState::Ready } else { ShareState::Degraded },
            notices,
            source: self.endpoint.source.clone(),
            socket: self.endpoint.socket.path.clone(),
        }
    }
}

fn notice(finding: &Finding) -> Notice {
    Notice::new(NoticeReason::Finding(finding.reason), finding.message.clone(), finding.remedy.clone())
}

/// Whether the session is over: as for stock virtiofsd, the first connection that ends is the end.
fn end_of(endpoint: &EndpointStatus) -> Option<Event> {
    if endpoint.sessions_lost > 0 {
        return Some(Event::Lost);
    }
    let quiet = endpoint.rejected_connections > endpoint.rejected_exclusive;
    (endpoint.sessions.is_empty() && (endpoint.sessions_started > 0 || quiet)).then_some(Event::Ended)
}

#[cfg(test)]
mod tests {
    use virtiofs_client::fixtures;

    use super::*;

    #[test]
    fn first_connection_that_ends_is_the_end() {
        let fresh = fixtures::listening(fixtures::endpoint("data"));
        assert!(end_of(&fresh).is_none(), "nobody has connected");
        let connected =
            EndpointStatus { sessions: vec![fixtures::session("data-1")], sessions_started: 1, ..fresh.clone() };
        let second = EndpointStatus { rejected_connections: 1, rejected_exclusive: 1, ..connected.clone() };
        assert!(end_of(&connected).is_none() && end_of(&second).is_none(), "it is still there");
        let left = EndpointStatus { sessions: vec![], ..second };
        assert!(matches!(end_of(&left), Some(Event::Ended)));
        let probed = EndpointStatus { rejected_connections: 1, ..fresh.clone() };
        assert!(matches!(end_of(&probed), Some(Event::Ended)), "a connection without a message");
        let lost = EndpointStatus { sessions_lost: 1, ..fresh };
        assert!(matches!(end_of(&lost), Some(Event::Lost)));
    }
}
