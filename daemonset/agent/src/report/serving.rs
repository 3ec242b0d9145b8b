//! Whether a share is served: what stands in its way on this host, and what the broker has made of it.

use std::time::{Duration, Instant};

use virtiofs_contract::control::EndpointStatus;
use virtiofs_crds::Share;

use super::ShareState;
use crate::desired::Desired;
use crate::notice::{BROKER_REFUSED, BROKER_UNAVAILABLE, Notice};
use crate::observed::{Effort, Observed, Outcome, Place};
use crate::offer::{offers_of, share_name};
use crate::plan::{Site, conflict};
use crate::source::hangs;
use crate::volume::is_volume_name;

/// A look at a source that takes longer than this is worth a word.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// So is a broker that is silent for longer than a new one takes to start.
pub(super) const SILENCE: Duration = Duration::from_secs(2);

pub(super) enum Obstacle {
    Unknown,
    Notice(Notice),
}

/// What keeps a share from being served whatever the broker says about it.
pub(super) fn obstacle(now: Instant, observed: &Observed, share: &Share) -> Option<Obstacle> {
    let place = observed.places.get(share.name.as_str());
    let looking = place.and_then(|place| place.looking_since).into_iter();
    let trying = efforts(observed, share.name.as_str()).filter_map(|effort| effort.busy_since);
    let waiting = looking.chain(trying).map(|since| now.saturating_duration_since(since)).max();
    if let Some(waiting) = waiting.filter(|waiting| *waiting > PATIENCE) {
        return Some(Obstacle::Notice(Notice::from(&hangs(share.source.as_path(), waiting.as_secs()))));
    }
    match place.and_then(|place| place.look.as_ref()) {
        None => return Some(Obstacle::Unknown),
        Some(look) => {
            if let Err(finding) = &look.found {
                return Some(Obstacle::Notice(Notice::from(finding)));
            }
        }
    }
    if let Some(since) = observed.silent_since {
        if now.saturating_duration_since(since) < SILENCE {
            return Some(Obstacle::Unknown);
        }
        let remedy = "see the broker's own log lines; shares are offered as soon as it answers";
        return Some(Obstacle::Notice(Notice::new(BROKER_UNAVAILABLE, "the broker does not answer", remedy)));
    }
    None
}

/// What was done about the endpoints of a share, but for those of volumes: what a pod has asked for may hang without the
/// share doing so.
fn efforts<'a>(observed: &'a Observed, share: &'a str) -> impl Iterator<Item = &'a Effort> {
    let own = move |name: &str| share_name(name) == share && !is_volume_name(name);
    observed.efforts.iter().filter(move |(name, _)| own(name)).map(|(_, effort)| effort)
}

/// What the broker has made of a share whose source is there. How its own endpoint is doing is how the share is
/// doing; one that was asked for beside it makes it no worse than `Degraded`.
pub(super) fn served(site: &Site, desired: &Desired, observed: &Observed, share: &Share) -> (ShareState, Vec<Notice>) {
    let source = observed.places.get(share.name.as_str()).and_then(Place::source);
    // What a pod asks for, such as a directory that is not there, is between it and its volume.
    let mut all = offers_of(share, &observed.asked).filter(|offer| !offer.is_volume()).map(|offer| {
        let known = observed.endpoints.as_ref().and_then(|endpoints| endpoints.get(offer.name));
        let listening = known.filter(|it| it.listening);
        let as_declared =
            listening.zip(source).is_some_and(|(it, source)| it.endpoint == offer.endpoint(&site.runtime_dir, source));
        let attempt = observed.efforts.get(offer.name).and_then(|effort| effort.attempt.as_ref());
        let refusal = attempt.and_then(|attempt| refusal(&attempt.outcome));
        (offer.name, listening, offered(listening, as_declared, refusal))
    });
    let Some((_, listening, (mut state, mut notices))) = all.next() else {
        return (ShareState::Pending, Vec::new());
    };
    if let Some(finding) = conflict(site, desired, observed, share) {
        let state = if listening.is_some() { ShareState::Degraded } else { ShareState::NotReady };
        return (state, vec![Notice::from(&finding)]);
    }
    for (name, _, (_, worse)) in all {
        let said = worse.into_iter().filter(|notice| !notices.contains(notice)).collect::<Vec<_>>();
        if state == ShareState::Ready && !said.is_empty() {
            state = ShareState::Degraded;
        }
        notices.extend(said.into_iter().map(|it| Notice { message: format!("{name}: {}", it.message), ..it }));
    }
    (state, notices)
}

/// How one endpoint is doing.
fn offered(
    listening: Option<&EndpointStatus>,
    as_declared: bool,
    refusal: Option<Notice>,
) -> (ShareState, Vec<Notice>) {
    match (listening, refusal) {
        (Some(it), None) if it.preflight.findings.is_empty() => match as_declared {
            true => (ShareState::Ready, Vec::new()),
            false => (ShareState::Pending, Vec::new()),
        },
        (Some(it), None) => (ShareState::Degraded, it.preflight.findings.iter().map(Notice::from).collect()),
        (Some(_), Some(refusal)) => (ShareState::Degraded, vec![refusal]),
        (None, Some(refusal)) => (ShareState::NotReady, vec![refusal]),
        (None, None) => (ShareState::Pending, Vec::new()),
    }
}

fn refusal(outcome: &Outcome) -> Option<Notice> {
    match outcome {
        Outcome::Served(_) => None,
        Outcome::Refused(finding) => Some(Notice::from(finding)),
        Outcome::Impossible(message) => {
            let remedy = "if VMs still use an earlier share of this name, it is served when they have left";
            Some(Notice::new(BROKER_REFUSED, message, remedy))
        }
        Outcome::Failed(message) => Some(Notice::new(BROKER_UNAVAILABLE, message, "it is asked again by itself")),
    }
}
