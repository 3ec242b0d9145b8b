//! From the broker's status to the observation that a decision is made from.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use virtiofs_client::endpoint::share_of;
use virtiofs_contract::control::{EndpointStatus, SessionState, SessionStatus, Status};
use virtiofs_contract::preflight::Preflight;
use virtiofs_contract::staleness::CAUSES;
use virtiofs_crds::v1alpha1::{Content, Remedy};
use virtiofs_crds::{Share, StalenessPolicy};
use virtiofs_remedy::{self as remedy, Mode, Observation, Policy, Root, Session, Window};

use crate::model::observed::Observed;
use crate::model::source::Probe;

/// A request that has been in progress for this long hangs: no disk takes that long.
const HUNG_AFTER: Duration = Duration::from_secs(10);

/// A guest this close to its inode limit counts as full.
const NEARLY: u64 = 64;

/// All that is known of one share.
pub(super) struct ShareStatus<'a> {
    share: &'a Share,
    broker: u64,
    own: &'a EndpointStatus,
    endpoints: Vec<&'a EndpointStatus>,
    probe: Option<&'a Probe>,
}

impl<'a> ShareStatus<'a> {
    /// `None` if the share is not served.
    pub(super) fn of(share: &'a Share, observed: &'a Observed, status: &'a Status) -> Option<Self> {
        let name = share.name.as_str();
        let endpoints: Vec<_> = status.endpoints.iter().filter(|it| share_of(&it.endpoint.name) == name).collect();
        let own = endpoints.iter().find(|it| it.endpoint.name == name)?;
        let probe = observed.sources.get(name).and_then(|state| state.probe.as_ref());
        Some(ShareStatus { share, broker: status.instance, own, endpoints: endpoints.clone(), probe })
    }

    /// Names of all its endpoints.
    pub(super) fn endpoints(&self) -> Vec<String> {
        self.endpoints.iter().map(|it| it.endpoint.name.clone()).collect()
    }

    /// The directory that is served.
    pub(super) fn source(&self) -> &Path {
        &self.own.endpoint.source
    }

    /// What was found with the active configuration: by an engine that serves, else by the last trial.
    pub(super) fn preflight(&self) -> &Preflight {
        self.served().find_map(|session| session.preflight.as_ref()).unwrap_or(&self.own.preflight)
    }

    /// Sessions that an engine serves, or is about to.
    pub(super) fn served(&self) -> impl Iterator<Item = &'a SessionStatus> {
        let working = |session: &&SessionStatus| {
            use SessionState::{Recovering, Serving, Stopped};
            session.engine_pid.is_some() && matches!(session.state, Serving | Stopped | Recovering)
        };
        self.endpoints.clone().into_iter().flat_map(|it| &it.sessions).filter(working)
    }

    /// The observation.
    pub(super) fn observation(&self) -> Observation<'a> {
        let count = |cause| self.endpoints.iter().map(|it| it.totals.stale(cause)).sum::<u64>();
        Observation {
            broker: self.broker,
            counts: CAUSES.into_iter().map(|cause| (cause, count(cause))).collect::<BTreeMap<_, _>>(),
            declared: &self.share.engine,
            content: content(self.share.content),
            preflight: &self.own.preflight,
            sessions: self.served().map(session).collect(),
            root: self.root(),
        }
    }

    fn root(&self) -> Root {
        match self.probe {
            Some(Probe { found: Ok(_), bare: false, .. }) => Root::Present,
            Some(Probe { found: Ok(_), bare: true, .. }) => Root::Bare,
            _ => Root::Missing,
        }
    }
}

fn session(session: &SessionStatus) -> Session<'_> {
    Session {
        id: &session.id,
        generation: session.active_generation,
        engine: &session.engine,
        preflight: session.preflight.as_ref(),
        full: session.held.inodes.saturating_add(NEARLY) >= session.inodes_limit,
        gone: session.source_gone.is_some(),
        hung: hangs(session),
    }
}

/// True if a request of its guest hangs.
pub(super) fn hangs(session: &SessionStatus) -> bool {
    session.oldest_request.as_ref().is_some_and(|oldest| u128::from(oldest.age_ms) >= HUNG_AFTER.as_millis())
}

/// The declared content.
pub(super) fn content(content: Content) -> remedy::Content {
    match content {
        Content::Immutable => remedy::Content::Immutable,
        Content::Exclusive => remedy::Content::Exclusive,
        Content::Shared => remedy::Content::Shared,
    }
}

/// The declared policy. The schema guarantees the ranges.
pub(super) fn policy(staleness: &StalenessPolicy) -> Policy {
    let at_least_one = |number: u32| NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN);
    Policy {
        mode: match staleness.remedy {
            Remedy::Heal => Mode::Heal,
            Remedy::Report => Mode::Report,
        },
        threshold: at_least_one(staleness.threshold),
        window: Window::within(staleness.window),
        budget: at_least_one(staleness.budget),
    }
}
