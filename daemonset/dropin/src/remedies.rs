//! Staleness of the session: observes, decides with the policy that the agent has, and applies what it decides.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{EndpointStatus, SessionState, SessionStatus};
use virtiofs_contract::staleness::CAUSES;
use virtiofs_remedy::{
    Blocker, Command, Content, History, Mode, Moment, Observation, Outcome, Policy, Root, Session, Transition, Window,
    decide,
};

/// A share's defaults.
const THRESHOLD: NonZeroU32 = NonZeroU32::new(10).expect("not zero");
const WINDOW: Duration = Duration::from_secs(60);
const BUDGET: NonZeroU32 = NonZeroU32::new(6).expect("not zero");

/// A request that has been in progress for this long hangs.
const HUNG_AFTER_MS: u64 = 10_000;

/// A guest this close to its inode limit counts as full.
const NEARLY: u64 = 64;

/// The past of the session.
#[derive(Debug)]
pub(crate) struct Remedies {
    policy: Policy,
    declared: EngineConfig,
    history: History,
}

impl Remedies {
    pub(crate) fn new(heal: bool, declared: EngineConfig) -> Self {
        let mode = if heal { Mode::Heal } else { Mode::Report };
        let policy = Policy { mode, threshold: THRESHOLD, window: Window::within(WINDOW), budget: BUDGET };
        Remedies { policy, declared, history: History::default() }
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
        let decision = decide(&self.policy, &self.history, &self.observation(instance, endpoint), now());
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

    fn observation<'a>(&'a self, instance: u64, endpoint: &'a EndpointStatus) -> Observation<'a> {
        let sessions: Vec<_> = endpoint.sessions.iter().filter(|session| is_served(session)).map(session).collect();
        let gone = sessions.iter().any(|session| session.gone);
        Observation {
            broker: instance,
            counts: CAUSES.into_iter().map(|cause| (cause, endpoint.totals.stale(cause))).collect::<BTreeMap<_, _>>(),
            declared: &self.declared,
            content: Content::Shared,
            preflight: &endpoint.preflight,
            sessions,
            // Looked up only if it matters: a source that hangs would hang this, too.
            root: if gone { root(&endpoint.endpoint.source) } else { Root::Present },
        }
    }
}

fn is_served(session: &SessionStatus) -> bool {
    use SessionState::{Recovering, Serving, Stopped};
    session.engine_pid.is_some() && matches!(session.state, Serving | Stopped | Recovering)
}

fn session(session: &SessionStatus) -> Session<'_> {
    Session {
        id: &session.id,
        generation: session.active_generation,
        engine: &session.engine,
        preflight: session.preflight.as_ref(),
        full: session.held.inodes.saturating_add(NEARLY) >= session.inodes_limit,
        gone: session.source_gone.is_some(),
        hung: session.oldest_request.as_ref().is_some_and(|oldest| oldest.age_ms >= HUNG_AFTER_MS),
    }
}

fn root(source: &Path) -> Root {
    let Ok(mut entries) = std::fs::read_dir(source) else { return Root::Missing };
    let device = |path: &Path| std::fs::metadata(path).map(|it| std::os::unix::fs::MetadataExt::dev(&it)).ok();
    let is_mount = source.parent().is_none_or(|parent| device(parent) != device(source));
    if is_mount || entries.next().is_some() { Root::Present } else { Root::Bare }
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
