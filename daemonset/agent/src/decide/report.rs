//! The state of each share. Every sink, be it a terminal, a file, a metric or an API server, shows this and nothing else.

mod serving;
mod sessions;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

use virtiofs_client::endpoint::share_of;
use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::report::{Report, ShareReport, ShareState};
use virtiofs_contract::control::EndpointStatus;
use virtiofs_crds::Share;

use self::serving::{Blocker, SILENT_AFTER, blocker, served};
use self::sessions::{notices, released};
use crate::model::desired::Desired;
use crate::model::observed::Observed;
use crate::model::site::Site;

/// Makes the report, without staleness.
pub(crate) fn report(now: Instant, site: &Site, desired: &Desired, observed: &Observed) -> Report {
    let declared = desired.shares.values().map(|it| declared_share(now, site, desired, observed, it));
    let mut draining: BTreeMap<&str, &EndpointStatus> = BTreeMap::new();
    for status in observed.endpoints() {
        let share = share_of(&status.endpoint.name);
        if !desired.shares.contains_key(share) {
            draining.entry(share).or_insert(status);
        }
    }
    let draining = draining.into_iter().map(|(name, status)| draining_share(name, status));
    let mut shares: Vec<_> = declared.chain(draining).collect();
    shares.extend(rejected_shares(site, desired));
    shares.sort_by(|a, b| a.name.cmp(&b.name));
    let silent = observed.silent_since.is_some_and(|since| now.saturating_duration_since(since) >= SILENT_AFTER);
    let (broker, problems) = (observed.endpoints.is_some(), desired.problems.clone());
    Report { broker, silent, shares, staleness: BTreeMap::new(), problems }
}

fn declared_share(now: Instant, site: &Site, desired: &Desired, observed: &Observed, share: &Share) -> ShareReport {
    let name = share.name.as_str();
    let (mut state, mut all) = match (released(observed, name), blocker(now, observed, share)) {
        (Some(notice), _) => (ShareState::Degraded, vec![notice]),
        (None, Some(Blocker::Unknown)) => (ShareState::Pending, Vec::new()),
        (None, Some(Blocker::Notice(notice))) => (ShareState::NotReady, vec![notice]),
        (None, None) => served(site, desired, observed, share),
    };
    let further = notices(now, name, &desired.problems, observed);
    if state == ShareState::Ready && !further.is_empty() {
        state = ShareState::Degraded;
    }
    all.extend(further);
    ShareReport {
        name: name.to_owned(),
        state,
        notices: all,
        source: share.source.as_path().to_path_buf(),
        socket: site.runtime_dir.share_socket(name),
    }
}

fn draining_share(name: &str, status: &EndpointStatus) -> ShareReport {
    ShareReport {
        name: name.to_owned(),
        state: ShareState::Draining,
        notices: Vec::new(),
        source: status.endpoint.source.clone(),
        socket: status.endpoint.socket.path.clone(),
    }
}

/// Shares that are known only from a rejected document.
fn rejected_shares(site: &Site, desired: &Desired) -> Vec<ShareReport> {
    let mut names: BTreeSet<&str> = desired.problems.iter().filter_map(|problem| problem.share.as_deref()).collect();
    names.retain(|name| !desired.shares.contains_key(*name));
    let notices = |name: &str| {
        let own = desired.problems.iter().filter(|problem| problem.share.as_deref() == Some(name));
        let remedy = "correct the document and save it";
        own.map(|problem| Notice::new(NoticeReason::ManifestInvalid, problem.to_string(), remedy)).collect()
    };
    names
        .into_iter()
        .map(|name| ShareReport {
            name: name.to_owned(),
            state: ShareState::NotReady,
            notices: notices(name),
            source: PathBuf::new(),
            socket: site.runtime_dir.share_socket(name),
        })
        .collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use virtiofs_client::fixtures::{finding, listening, preflight};
    use virtiofs_client::report::Problem;
    use virtiofs_contract::control::Released;
    use virtiofs_contract::preflight::{Finding, Reason};

    use super::serving::PATIENCE;
    use super::*;
    use crate::decide::plan::plan;
    use crate::fixtures::{ShareProgress, attempt, declared, desired, observed, present, probed, site, source, volume};
    use crate::model::action::Outcome;
    use crate::model::endpoint::own_endpoint;

    /// State and reasons of the one share.
    pub(crate) fn of(now: Instant, desired: &Desired, observed: &Observed) -> (ShareState, Vec<NoticeReason>) {
        let report = report(now, &site(), desired, observed);
        let [share] = &report.shares[..] else { panic!("one share: {report:?}") };
        (share.state, share.notices.iter().map(|notice| notice.reason).collect())
    }

    fn problem(share: Option<&str>) -> Problem {
        Problem {
            file: Some("a.yaml".into()),
            document: 1,
            share: share.map(str::to_owned),
            field: "spec.access".into(),
            message: "\"Sometimes\" is not one of ReadOnly, ReadWrite".into(),
        }
    }

    pub(crate) fn served(findings: Vec<Finding>) -> EndpointStatus {
        let endpoint = own_endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2));
        EndpointStatus { preflight: preflight(findings), ..listening(endpoint) }
    }

    #[test]
    fn the_state_follows_from_what_was_found() {
        let now = Instant::now();
        let share = declared("a", "/srv/a");
        let missing = || probed(now, Err(finding()));
        let tried = |outcome| present(now, "/srv/a").tried(attempt(now, &share, 0, outcome));
        let fine = || Outcome::Served(Box::new(preflight(vec![])));
        let refused = || Outcome::Rejected(finding());
        let stuck = || present(now, "/srv/a").busy(now, "/srv/a");
        let late = now + PATIENCE + Duration::from_secs(1);
        use ShareState::{Degraded, NotReady, Pending, Ready};
        for (what, at, endpoints, progress, state, reasons) in [
            ("nothing known", now, vec![], ShareProgress::default(), Pending, &[][..]),
            ("found, not tried", now, vec![], present(now, "/srv/a"), Pending, &[]),
            ("served", now, vec![served(vec![])], tried(fine()), Ready, &[]),
            ("served before this agent", now, vec![served(vec![])], present(now, "/srv/a"), Ready, &[]),
            (
                "served with a finding",
                now,
                vec![served(vec![finding()])],
                tried(fine()),
                Degraded,
                &[NoticeReason::Finding(Reason::CapabilityMissing)],
            ),
            ("refused", now, vec![], tried(refused()), NotReady, &[NoticeReason::Finding(Reason::CapabilityMissing)]),
            (
                "a change refused",
                now,
                vec![served(vec![])],
                tried(refused()),
                Degraded,
                &[NoticeReason::Finding(Reason::CapabilityMissing)],
            ),
            ("source missing", now, vec![], missing(), NotReady, &[NoticeReason::Finding(Reason::CapabilityMissing)]),
            (
                "source gone",
                now,
                vec![served(vec![])],
                missing(),
                NotReady,
                &[NoticeReason::Finding(Reason::CapabilityMissing)],
            ),
            (
                "hangs",
                late,
                vec![served(vec![])],
                stuck(),
                NotReady,
                &[NoticeReason::Finding(Reason::SourceUnreadable)],
            ),
            (
                "broker failed",
                now,
                vec![],
                tried(Outcome::Failed("x".into())),
                NotReady,
                &[NoticeReason::BrokerUnavailable],
            ),
        ] {
            let found = of(at, &desired([share.clone()]), &observed(endpoints, vec![("a", progress)]));
            assert_eq!(found, (state, reasons.to_vec()), "{what}");
        }
    }

    #[test]
    fn a_volume_that_hangs_does_not_affect_its_share() {
        let now = Instant::now();
        let mut here = observed(vec![served(vec![])], vec![("a", present(now, "/srv/a"))]);
        let late = now + PATIENCE + Duration::from_secs(1);
        for (endpoint, state) in
            [(volume("a", "one").endpoint_name(), ShareState::Ready), ("a.vm-7".into(), ShareState::NotReady)]
        {
            here.progress.entry(endpoint).or_default().busy_since = Some(now);
            assert_eq!(of(late, &desired([declared("a", "/srv/a")]), &here).0, state);
        }
    }

    #[test]
    fn a_broker_that_is_silent_briefly_is_not_reported() {
        let now = Instant::now();
        let mut silent = observed(vec![], vec![("a", present(now, "/srv/a"))]);
        (silent.endpoints, silent.silent_since) = (None, Some(now));
        let wanted = desired([declared("a", "/srv/a")]);
        assert_eq!(of(now, &wanted, &silent).0, ShareState::Pending);
        assert_eq!(
            of(now + SILENT_AFTER, &wanted, &silent),
            (ShareState::NotReady, vec![NoticeReason::BrokerUnavailable])
        );
    }

    #[test]
    fn an_invalid_document_degrades_a_served_share() {
        let now = Instant::now();
        let here = observed(vec![served(vec![])], vec![("a", present(now, "/srv/a"))]);
        let mut wanted = desired([declared("a", "/srv/a")]);
        wanted.problems = vec![problem(Some("a"))];
        assert_eq!(of(now, &wanted, &here), (ShareState::Degraded, vec![NoticeReason::ManifestInvalid]));

        wanted.shares.clear();
        let nothing = observed(vec![], vec![]);
        assert_eq!(of(now, &wanted, &nothing), (ShareState::NotReady, vec![NoticeReason::ManifestInvalid]));

        wanted.problems = vec![problem(None)];
        assert_eq!(report(now, &site(), &wanted, &nothing).shares, []);
    }

    #[test]
    fn an_undeclared_share_drains() {
        let mut status = served(vec![]);
        status.listening = false;
        assert_eq!(of(Instant::now(), &Desired::default(), &observed(vec![status], vec![])).0, ShareState::Draining);
    }

    #[test]
    fn a_released_source_may_be_missing_and_is_not_probed() {
        let now = Instant::now();
        let mut status = served(vec![]);
        status.released = Some(Released { until: 1_700_000_000 });
        status.endpoint.engine.xattr = true;
        let wanted = desired([declared("a", "/srv/a")]);
        let gone = observed(vec![status.clone()], vec![("a", probed(now, Err(finding())))]);
        let report = report(now, &site(), &wanted, &gone);
        assert_eq!((report.shares[0].state, report.shares[0].notices.len()), (ShareState::Degraded, 1));
        assert_eq!(report.shares[0].notices[0].reason, NoticeReason::Finding(Reason::SourceReleased));
        assert_eq!(report.shares[0].notices[0].remedy, "virtiofsctl resume a");
        let there = observed(vec![status], vec![("a", present(now, "/srv/a"))]);
        assert_eq!(plan(now, &site(), &wanted, &there).actions, []);
    }
}
