//! Staleness of the session: observes, decides with the policy that the agent has, and applies what it decides.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_client::observation::{is_served, session, stale_events};
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::EndpointStatus;
use virtiofs_remedy::{
    Blocker, Command, Content, History, Mode, Moment, Observation, Outcome, Policy, Root, Transition, Window, decide,
};

use crate::source_root::SourceRoot;

/// A share's defaults.
const THRESHOLD: NonZeroU32 = NonZeroU32::new(10).expect("not zero");
const WINDOW: Duration = Duration::from_secs(60);
const BUDGET: NonZeroU32 = NonZeroU32::new(6).expect("not zero");

/// The past of the session.
#[derive(Debug)]
pub(crate) struct Remedies {
    policy: Policy,
    declared: EngineConfig,
    history: History,
    root: SourceRoot,
}

impl Remedies {
    pub(crate) fn new(heal: bool, declared: EngineConfig, source: PathBuf) -> Self {
        let mode = if heal { Mode::Heal } else { Mode::Report };
        let policy = Policy { mode, threshold: THRESHOLD, window: Window::within(WINDOW), budget: BUDGET };
        Remedies { policy, declared, history: History::default(), root: SourceRoot::of(source) }
    }

    /// The configuration for engines.
    pub(crate) fn engine(&self) -> EngineConfig {
        self.history.amended(&self.declared)
    }

    /// Decides, and executes all but a change of the configuration: apply [`Self::engine`] if it has changed.
    pub(crate) fn pass(
        &mut self,
        instance: u64,
        endpoint: &EndpointStatus,
        client: &mut Client,
    ) -> Result<(), ClientError> {
        let gone = endpoint.sessions.iter().any(|session| is_served(session) && session.source_gone.is_some());
        let root = if gone {
            self.root.observe()
        } else {
            self.root.forget();
            Root::Present
        };
        let decision = decide(&self.policy, &self.history, &self.observation(instance, endpoint, root), now());
        self.history = decision.history;
        decision.transitions.iter().for_each(log);
        if let Some(Command::HandOver) = decision.command {
            client.hand_over(&endpoint.endpoint.name, None)?;
        }
        self.check(endpoint, client)
    }

    /// Lets a trial engine check a remedy.
    fn check(&mut self, endpoint: &EndpointStatus, client: &mut Client) -> Result<(), ClientError> {
        let Some((remedy, engine)) = self.history.pending_check(&self.declared) else { return Ok(()) };
        let found = match client.preflight(&endpoint.endpoint.source, engine) {
            Ok(found) => remedy.check(&endpoint.preflight, &found),
            Err(ClientError::Rejected(finding)) => Err(Blocker::Rejected(finding.to_string())),
            Err(error) => return Err(error),
        };
        let (history, transitions) = self.history.finish_check(remedy, found, &self.declared, now());
        self.history = history;
        transitions.iter().for_each(log);
        Ok(())
    }

    fn observation<'a>(&'a self, instance: u64, endpoint: &'a EndpointStatus, root: Root) -> Observation<'a> {
        Observation {
            broker: instance,
            counts: stale_events(&[endpoint]),
            declared: &self.declared,
            content: Content::Shared,
            preflight: &endpoint.preflight,
            sessions: endpoint.sessions.iter().filter(|session| is_served(session)).map(session).collect(),
            root,
        }
    }
}

/// The clock of remedies: it does not stop while the machine sleeps.
fn now() -> Moment {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
    Moment::from_millis(time.map_or(0, |time| time.as_millis() as u64))
}

fn log(transition: &Transition) {
    match transition {
        Transition::Stale { cause, events } => tracing::warn!(%cause, events, "stale"),
        Transition::Recovered { cause } => tracing::info!(%cause, "recovered"),
        Transition::Started { cause, remedy } => tracing::info!(%cause, remedy = remedy.as_str(), "remedy is checked"),
        Transition::Applying { cause, remedy } => {
            tracing::info!(%cause, remedy = remedy.as_str(), "remedy is being applied");
        }
        Transition::Applied { cause, remedy, took } => {
            tracing::info!(%cause, remedy = remedy.as_str(), ?took, "remedy is applied");
        }
        Transition::Ended { cause, remedy, outcome: Outcome::Verified } => {
            tracing::info!(%cause, remedy = remedy.as_str(), "remedy was effective");
        }
        Transition::Ended { cause, remedy, outcome } => {
            tracing::warn!(%cause, remedy = remedy.as_str(), outcome = outcome.as_str(), "remedy ended without effect");
        }
        Transition::Reverted { cause, remedy } => {
            tracing::info!(%cause, remedy = remedy.as_str(), "remedy is reverted")
        }
        Transition::Failed { cause, failure } => {
            tracing::error!(%cause, found = failure.message, remedy = failure.remedy, "no remedy is left");
        }
    }
}
