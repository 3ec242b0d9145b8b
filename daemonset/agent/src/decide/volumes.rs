//! The state of each volume.

use std::collections::BTreeMap;

use virtiofs_client::endpoint::{is_volume, share_of};
use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::report::{Report, ShareState};

use crate::model::action::Outcome;
use crate::model::observed::Observed;
use crate::model::volume::VolumeState;

/// The state of all volumes, and of what is left of removed ones, by endpoint name.
pub(crate) fn states(observed: &Observed, report: &Report) -> BTreeMap<String, VolumeState> {
    let Some(volumes) = &observed.volumes else { return BTreeMap::new() };
    let published = volumes.by_endpoint.keys().map(|name| (name.clone(), state(name, observed, report)));
    let removed = |name: &str| is_volume(name) && !volumes.may_have(name);
    let known = observed.endpoints().map(|it| &it.endpoint.name);
    // A running apply may serve it in a moment.
    let busy = observed.progress.iter().filter(|(_, progress)| progress.busy_since.is_some()).map(|(name, _)| name);
    let terminating = known.chain(busy).filter(|name| removed(name));
    let terminating: Vec<_> = terminating.map(|name| (name.clone(), VolumeState::Terminating)).collect();
    published.chain(terminating).collect()
}

fn state(name: &str, observed: &Observed, report: &Report) -> VolumeState {
    let known = observed.endpoints.as_ref().and_then(|endpoints| endpoints.get(name));
    if known.is_some_and(|it| it.listening) {
        return VolumeState::Listening;
    }
    let in_use = known.is_some_and(|it| !it.sessions.is_empty());
    match report.shares.iter().find(|share| share.name == share_of(name)) {
        // The share is served: the volume listens again in a moment.
        Some(share) if !matches!(share.state, ShareState::NotReady | ShareState::Draining) => {}
        // The share was withdrawn, and a VM that is connected keeps it.
        _ if in_use => return VolumeState::Listening,
        Some(share) if share.state == ShareState::NotReady => {
            return share.notices.first().cloned().map_or(VolumeState::Waiting, VolumeState::Rejected);
        }
        _ => {
            let message = "no VM may connect to it on this node any more";
            let remedy = "end the pod, or let an admin declare the share for this node again";
            return VolumeState::Rejected(Notice::new(NoticeReason::NotServed, message, remedy));
        }
    }
    let progress = observed.progress.get(name);
    if progress.is_some_and(|progress| progress.busy_since.is_some()) {
        return VolumeState::Waiting;
    }
    match progress.and_then(|progress| progress.attempt.as_ref()).map(|attempt| &attempt.outcome) {
        Some(Outcome::Rejected(finding)) => VolumeState::Rejected(Notice::from(finding)),
        _ => VolumeState::Waiting,
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_client::fixtures::{listening, session, status};
    use virtiofs_contract::control::EndpointStatus;

    use super::*;
    use crate::decide::report::report;
    use crate::fixtures::{declared, desired, site, volume, volumes};
    use crate::model::desired::Desired;
    use crate::model::volume::Volumes;

    #[test]
    fn the_state_follows_from_endpoint_and_share() {
        let now = std::time::Instant::now();
        let volume = volume("a", "one");
        let name = volume.endpoint_name();
        let listens = || listening(volume.endpoint(&name));
        let state = |desired: &Desired, endpoints: Vec<EndpointStatus>, known: bool| {
            let mut observed = Observed::default();
            let known = if known { volumes([volume.clone()]) } else { Volumes::default() };
            observed.update_status(now, 0, Some(&status(1, endpoints)));
            observed.update_volumes(Some(known));
            observed.update_desired(now, desired);
            let report = report(now, &site(), desired, &observed);
            states(&observed, &report).remove(&name)
        };
        let (shared, none) = (desired([declared("a", "/srv/a")]), Desired::default());
        let mut closed = listens();
        closed.listening = false;
        let used = EndpointStatus { sessions: vec![session("a.volume.1")], ..closed.clone() };
        assert_eq!(state(&shared, vec![], true), Some(VolumeState::Waiting));
        assert_eq!(state(&shared, vec![listens()], true), Some(VolumeState::Listening));
        assert_eq!(state(&shared, vec![closed], true), Some(VolumeState::Waiting));
        assert_eq!(state(&shared, vec![used.clone()], true), Some(VolumeState::Waiting), "it is about to listen again");
        assert_eq!(state(&none, vec![used], true), Some(VolumeState::Listening), "its VM continues");
        assert!(
            matches!(state(&none, vec![], true), Some(VolumeState::Rejected(notice)) if notice.reason == NoticeReason::NotServed)
        );
        assert_eq!(state(&shared, vec![listens()], false), Some(VolumeState::Terminating));
        assert_eq!(state(&shared, vec![], false), None);
    }
}
