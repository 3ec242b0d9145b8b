//! Whether a share is served: what blocks it on this host, and what the broker made of it.

use std::path::Path;
use std::time::{Duration, Instant};

use virtiofs_client::endpoint::{is_volume, share_of};
use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::report::ShareState;
use virtiofs_contract::control::EndpointStatus;
use virtiofs_contract::preflight::{Finding, Reason};
use virtiofs_crds::Share;

use crate::decide::plan::conflict;
use crate::model::action::{Outcome, Progress};
use crate::model::desired::Desired;
use crate::model::endpoint::endpoints_of;
use crate::model::observed::Observed;
use crate::model::site::Site;
use crate::model::source::SourceState;

/// A probe or a trial that runs for longer than this is reported: the source hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A broker that does not answer for longer than this is reported; a new one starts faster.
pub(super) const SILENT_AFTER: Duration = Duration::from_secs(2);

pub(super) enum Blocker {
    /// Nothing is known yet.
    Unknown,
    /// Known, with a reason.
    Notice(Notice),
}

/// What blocks a share, whatever the broker reports about it.
pub(super) fn blocker(now: Instant, observed: &Observed, share: &Share) -> Option<Blocker> {
    let state = observed.sources.get(share.name.as_str());
    let probing = state.and_then(|state| state.probing_since).into_iter();
    let applying = progress(observed, share.name.as_str()).filter_map(|progress| progress.busy_since);
    let waiting = probing.chain(applying).map(|since| now.saturating_duration_since(since)).max();
    if let Some(waiting) = waiting.filter(|waiting| *waiting > PATIENCE) {
        return Some(Blocker::Notice(Notice::from(&hangs(share.source.as_path(), waiting.as_secs()))));
    }
    match state.and_then(|state| state.probe.as_ref()) {
        None => return Some(Blocker::Unknown),
        Some(probe) => {
            if let Err(finding) = &probe.found {
                return Some(Blocker::Notice(Notice::from(finding)));
            }
        }
    }
    let since = observed.silent_since?;
    if now.saturating_duration_since(since) < SILENT_AFTER {
        return Some(Blocker::Unknown);
    }
    let remedy = "see the broker's log; shares are served as soon as it answers";
    Some(Blocker::Notice(Notice::new(NoticeReason::BrokerUnavailable, "the broker does not answer", remedy)))
}

fn hangs(declared: &Path, seconds: u64) -> Finding {
    Finding {
        reason: Reason::SourceUnreadable,
        message: format!("{} has not answered for {seconds} s", declared.display()),
        remedy: "check the file system or its server; the share recovers by itself".to_owned(),
    }
}

/// Progress of a share's endpoints, without volumes: the directory of a volume may hang where the share does not.
fn progress<'a>(observed: &'a Observed, share: &'a str) -> impl Iterator<Item = &'a Progress> {
    let own = move |name: &str| share_of(name) == share && !is_volume(name);
    observed.progress.iter().filter(move |(name, _)| own(name)).map(|(_, progress)| progress)
}

/// State of a share whose source is there: that of its own endpoint. A socket that a person added makes it `Degraded` at
/// worst.
pub(super) fn served(site: &Site, desired: &Desired, observed: &Observed, share: &Share) -> (ShareState, Vec<Notice>) {
    let source = observed.sources.get(share.name.as_str()).and_then(SourceState::source);
    // Findings of a volume, such as a missing directory, concern its pod alone.
    let mut all = endpoints_of(share, &observed.requested).filter(|it| !it.is_volume()).map(|it| {
        let known = observed.endpoints.as_ref().and_then(|endpoints| endpoints.get(it.name));
        let listening = known.filter(|known| known.listening);
        let as_declared = listening
            .zip(source)
            .is_some_and(|(known, source)| known.endpoint == it.resolve(&site.runtime_dir, source));
        let attempt = observed.progress.get(it.name).and_then(|progress| progress.attempt.as_ref());
        let rejection = attempt.and_then(|attempt| rejection(&attempt.outcome));
        (it.name, listening, endpoint_state(listening, as_declared, rejection))
    });
    let Some((_, listening, (mut state, mut notices))) = all.next() else {
        return (ShareState::Pending, Vec::new());
    };
    if let Some(finding) = conflict(site, desired, observed, share) {
        let state = if listening.is_some() { ShareState::Degraded } else { ShareState::NotReady };
        return (state, vec![Notice::from(&finding)]);
    }
    for (name, _, (_, further)) in all {
        let new = further.into_iter().filter(|notice| !notices.contains(notice)).collect::<Vec<_>>();
        if state == ShareState::Ready && !new.is_empty() {
            state = ShareState::Degraded;
        }
        notices.extend(new.into_iter().map(|it| Notice { message: format!("{name}: {}", it.message), ..it }));
    }
    (state, notices)
}

/// State of one endpoint.
fn endpoint_state(
    listening: Option<&EndpointStatus>,
    as_declared: bool,
    rejection: Option<Notice>,
) -> (ShareState, Vec<Notice>) {
    match (listening, rejection) {
        (Some(it), None) if it.preflight.findings.is_empty() => match as_declared {
            true => (ShareState::Ready, Vec::new()),
            false => (ShareState::Pending, Vec::new()),
        },
        (Some(it), None) => (ShareState::Degraded, it.preflight.findings.iter().map(Notice::from).collect()),
        (Some(_), Some(rejection)) => (ShareState::Degraded, vec![rejection]),
        (None, Some(rejection)) => (ShareState::NotReady, vec![rejection]),
        (None, None) => (ShareState::Pending, Vec::new()),
    }
}

fn rejection(outcome: &Outcome) -> Option<Notice> {
    match outcome {
        Outcome::Served(_) => None,
        Outcome::Rejected(finding) => Some(Notice::from(finding)),
        Outcome::Impossible(message) => {
            let remedy = "if VMs still use an earlier share of this name, it is served when they have left";
            Some(Notice::new(NoticeReason::BrokerRejected, message, remedy))
        }
        Outcome::Failed(message) => {
            Some(Notice::new(NoticeReason::BrokerUnavailable, message, "none needed: the request is repeated"))
        }
    }
}
