//! What to do next.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use virtiofs_client::endpoint::{is_volume, share_of};
use virtiofs_contract::control::{Endpoint, EndpointStatus};
use virtiofs_contract::preflight::Finding;
use virtiofs_crds::Share;

use super::backoff::delay;
use super::overlap::{self, Extent, Served};
use crate::model::action::{Action, Attempt, Outcome, Progress};
use crate::model::desired::Desired;
use crate::model::endpoint::{DesiredEndpoint, desired_endpoints, endpoints_of, trial_path};
use crate::model::observed::Observed;
use crate::model::site::Site;
use crate::model::source::Source;

/// Time between two probes of a source: a share notices within it that its source appeared or disappeared.
const PROBE_EVERY: Duration = Duration::from_secs(2);

/// Shortest and longest wait before a share that was rejected, or served with findings, is applied again.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// How long a share must be absent from the declarations before it is withdrawn: an editor may remove a file for a moment
/// to write it again.
const WITHDRAW_AFTER: Duration = Duration::from_secs(2);

/// Longest time between two plans.
const PLAN_AT_LEAST_EVERY: Duration = Duration::from_secs(5);

/// Longest time between two plans while no broker answers: a new one starts within milliseconds.
const CONNECT_EVERY: Duration = Duration::from_millis(200);

/// What to do now, and when to plan again.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    /// At most one action for each share and endpoint.
    pub(crate) actions: Vec<Action>,
    /// Nothing is due for this long, unless something changes.
    pub(crate) idle: Duration,
}

/// Decides what to do.
pub(crate) fn plan(now: Instant, site: &Site, desired: &Desired, observed: &Observed) -> Plan {
    let idle = if observed.endpoints.is_some() { PLAN_AT_LEAST_EVERY } else { CONNECT_EVERY };
    let trials = observed.progress.values().filter_map(|progress| progress.trial.clone()).collect();
    let mut planner = Planner { now, actions: Vec::new(), idle, trials };
    for share in desired.shares.values() {
        planner.share(site, desired, observed, share);
    }
    if !desired.partial {
        let names: BTreeSet<_> = desired_endpoints(desired, &observed.requested).map(|it| it.name).collect();
        planner.withdraw_all_but(&names, observed);
    }
    planner.end_removed_volumes(observed);
    Plan { actions: planner.actions, idle: planner.idle }
}

/// Why a share must not be served, because its source overlaps others or the manifests.
pub(crate) fn conflict(site: &Site, desired: &Desired, observed: &Observed, share: &Share) -> Option<Finding> {
    let extents: Vec<_> = desired.shares.values().filter_map(|other| extent(observed, other)).collect();
    overlap::conflict(extent(observed, share)?, &extents, site.manifests.as_deref())
}

fn extent<'a>(observed: &'a Observed, share: &'a Share) -> Option<Extent<'a>> {
    let path = observed.sources.get(share.name.as_str())?.pinned.as_deref()?;
    let (share, writable) = (share.name.as_str(), share.engine.writable());
    Some(Extent { share, path, writable, served: served(observed, share, writable) })
}

/// How a share is served at any of its endpoints. A running apply may serve it in a moment, and what an earlier broker
/// served is applied to the next.
fn served(observed: &Observed, share: &str, writable: bool) -> Served {
    let active = observed.endpoints_of(share).filter(|it| it.listening);
    let progress = || observed.progress.iter().filter(|(name, _)| share_of(name) == share).map(|(_, it)| it);
    let running = progress().filter(|it| it.trial.is_some()).map(|_| writable);
    let before = progress().filter_map(|it| it.attempt.as_ref());
    let before = before.filter(|attempt| matches!(attempt.outcome, Outcome::Served(_)));
    let before = before.map(|attempt| attempt.endpoint.engine.writable());
    match active.map(|it| it.endpoint.engine.writable()).chain(running).chain(before).max() {
        None => Served::Not,
        Some(false) => Served::ReadOnly,
        Some(true) => Served::Writable,
    }
}

/// True if the share's source is released at any endpoint. That holds for endpoints requested meanwhile as well.
fn is_released(observed: &Observed, share: &str) -> bool {
    observed.endpoints_of(share).any(|it| it.released.is_some())
}

struct Planner {
    now: Instant,
    actions: Vec<Action>,
    idle: Duration,
    /// Directories on which trials run. The broker runs one trial at a time on each directory, and none below a source
    /// while one runs on the source: a directory that hangs must not block it with trials.
    trials: BTreeSet<PathBuf>,
}

impl Planner {
    /// Adds the action if it is due; else shortens the idle time to that moment. True if it was added.
    fn when(&mut self, at: Instant, action: impl FnOnce() -> Action) -> bool {
        let due = at <= self.now;
        if due {
            self.actions.push(action());
        } else {
            self.idle = self.idle.min(at - self.now);
        }
        due
    }

    fn share(&mut self, site: &Site, desired: &Desired, observed: &Observed, share: &Share) {
        let state = observed.sources.get(share.name.as_str());
        if state.is_some_and(|state| state.probing_since.is_some()) {
            return;
        }
        let probe_at = state.and_then(|state| state.probe.as_ref()).map_or(self.now, |probe| probe.at + PROBE_EVERY);
        if self.when(probe_at, || Action::Probe { share: share.name.to_string() }) {
            return;
        }
        let Some(source) = state.and_then(|state| state.source()) else { return };
        if is_released(observed, share.name.as_str()) {
            // A trial would open the source that a person is about to unmount, and might find the bare mount point.
            return;
        }
        if conflict(site, desired, observed, share).is_none() {
            for endpoint in endpoints_of(share, &observed.requested) {
                self.endpoint(site, desired, observed, endpoint, source);
            }
        }
    }

    fn endpoint(
        &mut self,
        site: &Site,
        desired: &Desired,
        observed: &Observed,
        wanted: DesiredEndpoint<'_>,
        source: &Source,
    ) {
        let idle = Progress::default();
        let progress = observed.progress.get(wanted.name).unwrap_or(&idle);
        let Some(endpoints) = observed.endpoints.as_ref().filter(|_| progress.busy_since.is_none()) else { return };
        let endpoint = wanted.resolve(&site.runtime_dir, source);
        let known = endpoints.get(wanted.name);
        if known.is_some_and(|it| it.listening && it.endpoint.source != endpoint.source) {
            // Another share had this name; no VM may get its files instead of the new one's.
            if !desired.partial {
                self.actions.push(Action::Withdraw { endpoint: endpoint.name, force: false });
            }
            return;
        }
        let active = known.is_some_and(|it| it.listening && it.endpoint == endpoint);
        if wanted.is_volume() && active {
            // Findings are reported, and applied again, at the share's own endpoint.
            return;
        }
        let trial = trial_path(&endpoint);
        if let Some(at) = apply_at(self.now, &endpoint, source, known, progress.attempt.as_ref())
            && !self.trials.contains(&source.path)
            && !self.trials.contains(&trial)
            && self.when(at, || Action::Apply { endpoint: Box::new(endpoint), source: source.clone() })
        {
            self.trials.insert(trial);
        }
    }

    fn withdraw_all_but(&mut self, names: &BTreeSet<&str>, observed: &Observed) {
        // An endpoint that neither listens nor has a session has lost its socket.
        let open = observed.endpoints().filter(|it| it.listening || it.sessions.is_empty());
        let open = open.filter(|it| !is_volume(&it.endpoint.name) || observed.volumes.is_some());
        for name in open.map(|it| &it.endpoint.name).filter(|name| !names.contains(name.as_str())) {
            let progress = observed.progress.get(name);
            if progress.is_none_or(|progress| progress.busy_since.is_none()) {
                let since = progress.and_then(|progress| progress.undesired_since).unwrap_or(self.now);
                self.when(since + WITHDRAW_AFTER, || Action::Withdraw { endpoint: name.clone(), force: false });
            }
        }
    }

    /// Ends volumes that were removed, with their sessions: their pods have ended.
    fn end_removed_volumes(&mut self, observed: &Observed) {
        let Some(volumes) = &observed.volumes else { return };
        let removed = |name: &String| is_volume(name) && !volumes.may_have(name);
        for name in observed.endpoints().map(|it| &it.endpoint.name).filter(|name| removed(name)) {
            if observed.progress.get(name).is_none_or(|progress| progress.busy_since.is_none()) {
                self.actions.retain(|action| !matches!(action, Action::Withdraw { endpoint, .. } if endpoint == name));
                self.actions.push(Action::Withdraw { endpoint: name.clone(), force: true });
            }
        }
    }
}

/// When to apply `endpoint` next; `None` if it is active without findings. `known` is the broker's endpoint of this name.
fn apply_at(
    now: Instant,
    endpoint: &Endpoint,
    source: &Source,
    known: Option<&EndpointStatus>,
    last: Option<&Attempt>,
) -> Option<Instant> {
    let active = known.is_some_and(|it| it.listening && it.endpoint == *endpoint);
    match last {
        None if active => None,
        None => Some(now),
        Some(last) if last.endpoint != *endpoint || last.source != *source => Some(now),
        Some(last) if last.outcome.is_clean() && active => None,
        Some(last) => Some(last.at + pause(last, known.is_some())),
    }
}

/// How long to wait after an attempt without full success. What an earlier share of the same name made impossible is
/// possible once the broker no longer has that one.
fn pause(last: &Attempt, known: bool) -> Duration {
    match last.outcome {
        Outcome::Impossible(_) if !known => RETRY_AFTER.0,
        _ => delay(RETRY_AFTER.0, RETRY_AFTER.1, last.repeated),
    }
}

#[cfg(test)]
mod tests;
