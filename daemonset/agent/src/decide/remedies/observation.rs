//! From the broker's status to the observation that a decision is made from.

use std::num::NonZeroU32;
use std::path::Path;

use virtiofs_client::endpoint::share_of;
use virtiofs_client::observation::{is_served, session, stale_events};
use virtiofs_contract::control::{EndpointStatus, SessionStatus, Status};
use virtiofs_contract::preflight::Preflight;
use virtiofs_crds::v1alpha1::{Content, Remedy};
use virtiofs_crds::{Share, StalenessPolicy};
use virtiofs_remedy::{self as remedy, Mode, Observation, Policy, Root, Window};

use crate::model::observed::Observed;
use crate::model::source::Probe;

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
        self.endpoints.clone().into_iter().flat_map(|it| &it.sessions).filter(|session| is_served(session))
    }

    /// The observation.
    pub(super) fn observation(&self) -> Observation<'a> {
        Observation {
            broker: self.broker,
            counts: stale_events(&self.endpoints),
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
