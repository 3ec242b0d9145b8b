//! What to do next: a pure function of what is declared and what is observed.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use virtiofs_contract::control::{Endpoint, EndpointKind, EndpointStatus, SocketSpec};
use virtiofs_contract::preflight::Finding;
use virtiofs_crds::Share;

use crate::backoff::delay;
use crate::desired::Desired;
use crate::observed::{Attempt, Effort, Observed, Outcome};
use crate::offer::{Offer, offers, offers_of, share_name, share_of};
use crate::overlap::{self, Ground, Served};
use crate::runtime_dir::RuntimeDir;
use crate::source::{Source, Sources};
use crate::volume::is_volume;

/// How often a source is looked for: the time a share needs at most to notice that its source came or went.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(2);

/// First and longest wait before a share that was refused, or found wanting, is tried again.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// How long a share must be gone from the declarations before it is withdrawn: an editor may remove a file
/// for a moment to write it anew.
pub(crate) const WITHDRAW_AFTER: Duration = Duration::from_secs(2);

/// Longest time between two plans.
const PLAN_AT_LEAST_EVERY: Duration = Duration::from_secs(5);

/// The same while no broker answers: one that has just been started does so within milliseconds.
const KNOCK_EVERY: Duration = Duration::from_millis(200);

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// Look for the source of a share.
    Look { share: String },
    /// Have the broker serve a share at an endpoint.
    Apply { endpoint: Box<Endpoint>, source: Source },
    /// Have the broker stop listening at an endpoint; `force`: end its sessions too.
    Withdraw { endpoint: String, force: bool },
}

/// What to do now, and when to think again.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    /// At most one action for each share and endpoint.
    pub(crate) actions: Vec<Action>,
    /// How long nothing needs to be done after that, unless something happens.
    pub(crate) rest: Duration,
}

/// What holds for all shares.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    /// Where sockets are.
    pub(crate) runtime_dir: RuntimeDir,
    /// Where shares are declared, where that is a directory.
    pub(crate) manifests: Option<PathBuf>,
    /// Where sources are looked for.
    pub(crate) sources: Sources,
}

/// Decides what to do.
pub(crate) fn plan(now: Instant, site: &Site, desired: &Desired, observed: &Observed) -> Plan {
    let rest = if observed.endpoints.is_some() { PLAN_AT_LEAST_EVERY } else { KNOCK_EVERY };
    let trying = observed.efforts.values().filter_map(|effort| effort.trying.clone()).collect();
    let mut due = Due { now, actions: Vec::new(), rest, trying };
    for share in desired.shares.values() {
        due.see_to(site, desired, observed, share);
    }
    if !desired.partial {
        let wanted: BTreeSet<_> = offers(desired, &observed.asked).map(|offer| offer.name).collect();
        due.withdraw_all_but(&wanted, observed);
    }
    due.unpublish(observed);
    Plan { actions: due.actions, rest: due.rest }
}

/// What the broker is to be told about a share's own endpoint, when its source was found.
pub(crate) fn endpoint(runtime_dir: &RuntimeDir, share: &Share, source: &Source) -> Endpoint {
    Endpoint {
        sub_path: None,
        name: share.name.to_string(),
        kind: EndpointKind::Share,
        source: source.path.clone(),
        socket: SocketSpec {
            path: runtime_dir.share_socket(share.name.as_str()),
            owner: share.socket.owner,
            group: share.socket.group,
            mode: share.socket.mode,
        },
        engine: share.engine.clone(),
        exclusive: share.exclusive,
        consumer: None,
    }
}

/// Why a share must not be served where its source is, if so.
pub(crate) fn conflict(site: &Site, desired: &Desired, observed: &Observed, share: &Share) -> Option<Finding> {
    let grounds: Vec<_> = desired.shares.values().filter_map(|other| ground(observed, other)).collect();
    overlap::conflict(ground(observed, share)?, &grounds, site.manifests.as_deref())
}

fn ground<'a>(observed: &'a Observed, share: &'a Share) -> Option<Ground<'a>> {
    let path = observed.places.get(share.name.as_str())?.pinned.as_deref()?;
    let (share, writable) = (share.name.as_str(), share.engine.writable());
    Some(Ground { share, path, writable, served: served(observed, share, writable) })
}

/// How a share is served at any of its endpoints. What the broker is just asked for it may serve in a moment, and
/// what an earlier one served the next is asked for.
fn served(observed: &Observed, share: &str, writable: bool) -> Served {
    let own = |endpoint: &str| endpoint == share || share_of(endpoint) == Some(share);
    let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
    let in_force = endpoints.filter(|it| it.listening && own(&it.endpoint.name));
    let efforts = || observed.efforts.iter().filter(|(name, _)| own(name)).map(|(_, effort)| effort);
    let tried = efforts().filter(|effort| effort.trying.is_some()).map(|_| writable);
    let before = efforts().filter_map(|effort| effort.attempt.as_ref());
    let before = before.filter(|attempt| matches!(attempt.outcome, Outcome::Served(_)));
    let before = before.map(|attempt| attempt.endpoint.engine.writable());
    match in_force.map(|it| it.endpoint.engine.writable()).chain(tried).chain(before).max() {
        None => Served::Not,
        Some(false) => Served::ReadOnly,
        Some(true) => Served::Writable,
    }
}

/// The directory on which an endpoint is tried. What a pod has asked for below a source may hang where the rest does not.
pub(crate) fn tried(endpoint: &Endpoint) -> PathBuf {
    endpoint.sub_path.as_ref().map_or_else(|| endpoint.source.clone(), |below| endpoint.source.join(below))
}

/// Has somebody released the share's source? That holds for endpoints that are asked for meanwhile as well.
fn is_released(observed: &Observed, share: &str) -> bool {
    let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
    endpoints.filter(|it| share_name(&it.endpoint.name) == share).any(|it| it.released.is_some())
}

struct Due {
    now: Instant,
    actions: Vec<Action>,
    rest: Duration,
    /// Directories on which something is being tried. The broker tries one thing at a time on each, and below a source
    /// nothing while that is tried: one that hangs must not fill it with trials.
    trying: BTreeSet<PathBuf>,
}

impl Due {
    /// Adds the action if its time has come; else the plan's rest ends then. Was it added?
    fn when(&mut self, at: Instant, action: impl FnOnce() -> Action) -> bool {
        let due = at <= self.now;
        if due {
            self.actions.push(action());
        } else {
            self.rest = self.rest.min(at - self.now);
        }
        due
    }

    fn see_to(&mut self, site: &Site, desired: &Desired, observed: &Observed, share: &Share) {
        let place = observed.places.get(share.name.as_str());
        if place.is_some_and(|place| place.looking_since.is_some()) {
            return;
        }
        let look_at = place.and_then(|place| place.look.as_ref()).map_or(self.now, |look| look.at + LOOK_EVERY);
        if self.when(look_at, || Action::Look { share: share.name.to_string() }) {
            return;
        }
        let Some(source) = place.and_then(|place| place.source()) else { return };
        if is_released(observed, share.name.as_str()) {
            // A trial would hold what somebody is about to unmount, and what is found then may be the bare mount point.
            return;
        }
        if conflict(site, desired, observed, share).is_none() {
            for offer in offers_of(share, &observed.asked) {
                self.offer(site, desired, observed, offer, source);
            }
        }
    }

    fn offer(&mut self, site: &Site, desired: &Desired, observed: &Observed, offer: Offer<'_>, source: &Source) {
        let idle = Effort::default();
        let effort = observed.efforts.get(offer.name).unwrap_or(&idle);
        let Some(endpoints) = observed.endpoints.as_ref().filter(|_| effort.busy_since.is_none()) else { return };
        let endpoint = offer.endpoint(&site.runtime_dir, source);
        let known = endpoints.get(offer.name);
        if known.is_some_and(|it| it.listening && it.endpoint.source != endpoint.source) {
            // Another share of this name was here; nobody may get its files for the new one's.
            if !desired.partial {
                self.actions.push(Action::Withdraw { endpoint: endpoint.name, force: false });
            }
            return;
        }
        let in_force = known.is_some_and(|it| it.listening && it.endpoint == endpoint);
        if offer.is_volume() && in_force {
            // What there is to complain of is said, and tried again, at the share's own endpoint.
            return;
        }
        let tried = tried(&endpoint);
        if let Some(at) = try_at(self.now, &endpoint, source, known, effort.attempt.as_ref())
            && !self.trying.contains(&source.path)
            && !self.trying.contains(&tried)
            && self.when(at, || Action::Apply { endpoint: Box::new(endpoint), source: source.clone() })
        {
            self.trying.insert(tried);
        }
    }

    fn withdraw_all_but(&mut self, wanted: &BTreeSet<&str>, observed: &Observed) {
        let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
        // One that neither listens nor has a session has lost its socket to somebody.
        let open = endpoints.filter(|it| it.listening || it.sessions.is_empty());
        let open = open.filter(|it| !is_volume(&it.endpoint) || observed.volumes.is_some());
        for name in open.map(|it| &it.endpoint.name).filter(|name| !wanted.contains(name.as_str())) {
            let effort = observed.efforts.get(name);
            if effort.is_none_or(|effort| effort.busy_since.is_none()) {
                let gone_since = effort.and_then(|effort| effort.unwanted_since).unwrap_or(self.now);
                self.when(gone_since + WITHDRAW_AFTER, || Action::Withdraw { endpoint: name.clone(), force: false });
            }
        }
    }

    /// Volumes that are no more: their pods have ended, and whatever is connected still.
    fn unpublish(&mut self, observed: &Observed) {
        let Some(volumes) = &observed.volumes else { return };
        let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
        let gone = endpoints.filter(|it| is_volume(&it.endpoint) && !volumes.may_have(&it.endpoint.name));
        for name in gone.map(|it| &it.endpoint.name) {
            if observed.efforts.get(name).is_none_or(|effort| effort.busy_since.is_none()) {
                self.actions.retain(|action| !matches!(action, Action::Withdraw { endpoint, .. } if endpoint == name));
                self.actions.push(Action::Withdraw { endpoint: name.clone(), force: true });
            }
        }
    }
}

/// When the broker is to be asked for `endpoint` next; none: it is as it should be. `known` is what the broker has
/// under its name.
fn try_at(
    now: Instant,
    endpoint: &Endpoint,
    source: &Source,
    known: Option<&EndpointStatus>,
    last: Option<&Attempt>,
) -> Option<Instant> {
    let in_force = known.is_some_and(|it| it.listening && it.endpoint == *endpoint);
    match last {
        None if in_force => None,
        None => Some(now),
        Some(last) if last.endpoint != *endpoint || last.source != *source => Some(now),
        Some(last) if last.outcome.is_flawless() && in_force => None,
        Some(last) => Some(last.at + pause(last, known.is_some())),
    }
}

/// How long to wait after an attempt that was not flawless. What was impossible because of an earlier share of the
/// same name is possible as soon as the broker knows that one no more.
fn pause(last: &Attempt, known: bool) -> Duration {
    match last.outcome {
        Outcome::Impossible(_) if !known => TRY_AGAIN.0,
        _ => delay(TRY_AGAIN.0, TRY_AGAIN.1, last.repeated),
    }
}

#[cfg(test)]
pub(crate) mod tests;
