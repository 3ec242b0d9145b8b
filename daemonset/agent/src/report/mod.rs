//! How each share is doing: a pure function of what is wanted and observed. Every sink, be it a terminal,
//! a file, a metric or an API server, shows this and nothing else.

mod serving;
mod sessions;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::control::EndpointStatus;
use virtiofs_contract::preflight::Reason;
use virtiofs_crds::Share;

use self::serving::{Obstacle, SILENCE, obstacle, served};
use self::sessions::{complaints, released};
use crate::desired::{Desired, Problem};
use crate::notice::{MANIFEST_INVALID, Notice};
use crate::observed::Observed;
use crate::offer::share_name;
use crate::plan::Site;
use crate::staleness::ShareStaleness;

/// How a share is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) enum ShareState {
    /// Nothing is known yet.
    Pending,
    /// Served as declared.
    Ready,
    /// Served, but not quite as declared; the notices say how and why.
    Degraded,
    /// Not served to VMs that connect now; the notices say why.
    NotReady,
    /// No longer declared; VMs that were connected are still served.
    Draining,
}

impl ShareState {
    /// The word in status, metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            ShareState::Pending => "Pending",
            ShareState::Ready => "Ready",
            ShareState::Degraded => "Degraded",
            ShareState::NotReady => "NotReady",
            ShareState::Draining => "Draining",
        }
    }

    /// May a VM connect and work?
    pub(crate) fn serves(self) -> bool {
        matches!(self, ShareState::Ready | ShareState::Degraded)
    }
}

/// One share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ShareReport {
    /// Its name.
    pub(crate) name: String,
    /// How it is doing.
    pub(crate) state: ShareState,
    /// Why it is not `Ready`.
    #[serde(default)]
    pub(crate) notices: Vec<Notice>,
    /// The directory as it was declared.
    pub(crate) source: PathBuf,
    /// Its socket.
    pub(crate) socket: PathBuf,
}

impl ShareReport {
    /// May a VM that is new connect, and have its files? Not while somebody has the source released.
    pub(crate) fn admits(&self) -> bool {
        self.state.serves() && self.notices.iter().all(|notice| notice.reason != Reason::SourceReleased.as_str())
    }
}

/// All shares of this host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    /// Does a broker answer?
    pub(crate) broker: bool,
    /// Has it been silent for longer than one takes to start?
    #[serde(default)]
    pub(crate) silent: bool,
    /// Shares in order of their names.
    pub(crate) shares: Vec<ShareReport>,
    /// How declared shares stand with staleness, by name.
    #[serde(default)]
    pub(crate) staleness: BTreeMap<String, ShareStaleness>,
    /// Documents that were not accepted.
    pub(crate) problems: Vec<Problem>,
}

/// Draws the report.
pub(crate) fn report(now: Instant, site: &Site, desired: &Desired, observed: &Observed) -> Report {
    let declared = desired.shares.values().map(|it| declared_share(now, site, desired, observed, it));
    let mut draining: BTreeMap<&str, &EndpointStatus> = BTreeMap::new();
    for status in observed.endpoints.iter().flat_map(|endpoints| endpoints.values()) {
        let share = share_name(&status.endpoint.name);
        if !desired.shares.contains_key(share) {
            draining.entry(share).or_insert(status);
        }
    }
    let draining = draining.into_iter().map(|(name, status)| draining_share(name, status));
    let mut shares: Vec<_> = declared.chain(draining).collect();
    shares.extend(refused_shares(site, desired));
    shares.sort_by(|a, b| a.name.cmp(&b.name));
    let silent = observed.silent_since.is_some_and(|since| now.saturating_duration_since(since) >= SILENCE);
    let (broker, problems) = (observed.endpoints.is_some(), desired.problems.clone());
    Report { broker, silent, shares, staleness: BTreeMap::new(), problems }
}

fn declared_share(now: Instant, site: &Site, desired: &Desired, observed: &Observed, share: &Share) -> ShareReport {
    let name = share.name.as_str();
    let (mut state, mut notices) = match (released(observed, name), obstacle(now, observed, share)) {
        (Some(notice), _) => (ShareState::Degraded, vec![notice]),
        (None, Some(Obstacle::Unknown)) => (ShareState::Pending, Vec::new()),
        (None, Some(Obstacle::Notice(notice))) => (ShareState::NotReady, vec![notice]),
        (None, None) => served(site, desired, observed, share),
    };
    let complaints = complaints(now, name, &desired.problems, observed);
    if state == ShareState::Ready && !complaints.is_empty() {
        state = ShareState::Degraded;
    }
    notices.extend(complaints);
    ShareReport {
        name: name.to_owned(),
        state,
        notices,
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

/// Shares that are only known from a document that was not accepted.
fn refused_shares(site: &Site, desired: &Desired) -> Vec<ShareReport> {
    let mut names: BTreeSet<&str> = desired.problems.iter().filter_map(|problem| problem.share.as_deref()).collect();
    names.retain(|name| !desired.shares.contains_key(*name));
    let notices = |name: &str| {
        let own = desired.problems.iter().filter(|problem| problem.share.as_deref() == Some(name));
        own.map(|problem| Notice::new(MANIFEST_INVALID, problem.to_string(), "correct the document and save it"))
            .collect()
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
pub(crate) mod tests {
    use std::time::Duration;

    use virtiofs_contract::control::Released;
    use virtiofs_contract::preflight::Finding;

    use super::serving::PATIENCE;
    pub(crate) use super::sessions::tests::session;
    use super::*;
    use crate::desired::tests::{declared, desired};
    use crate::notice::BROKER_UNAVAILABLE;
    use crate::observed::Outcome;
    use crate::plan::endpoint;
    use crate::plan::tests::{Progress, attempt, finding, listening, looked, observed, preflight, seen, site, source};
    use crate::volume::tests::volume;

    /// State and reasons of the one share.
    pub(super) fn of(now: Instant, desired: &Desired, observed: &Observed) -> (ShareState, Vec<String>) {
        let report = report(now, &site(), desired, observed);
        let [share] = &report.shares[..] else { panic!("one share: {report:?}") };
        (share.state, share.notices.iter().map(|notice| notice.reason.clone()).collect())
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

    pub(super) fn served(findings: Vec<Finding>) -> EndpointStatus {
        let endpoint = endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2));
        EndpointStatus { preflight: preflight(findings), ..listening(endpoint) }
    }

    #[test]
    fn how_a_share_is_doing_follows_from_what_was_found() {
        let now = Instant::now();
        let share = declared("a", "/srv/a");
        let missing = || looked(now, Err(finding()));
        let tried = |outcome| seen(now, "/srv/a").tried(attempt(now, &share, 0, outcome));
        let fine = || Outcome::Served(Box::new(preflight(vec![])));
        let refused = || Outcome::Refused(finding());
        let stuck = || seen(now, "/srv/a").busy(now, "/srv/a");
        let late = now + PATIENCE + Duration::from_secs(1);
        use ShareState::{Degraded, NotReady, Pending, Ready};
        for (what, at, endpoints, progress, state, reasons) in [
            ("nothing known", now, vec![], Progress::default(), Pending, &[][..]),
            ("found, not tried", now, vec![], seen(now, "/srv/a"), Pending, &[]),
            ("served", now, vec![served(vec![])], tried(fine()), Ready, &[]),
            ("served before this agent", now, vec![served(vec![])], seen(now, "/srv/a"), Ready, &[]),
            (
                "served with a finding",
                now,
                vec![served(vec![finding()])],
                tried(fine()),
                Degraded,
                &["CapabilityMissing"],
            ),
            ("refused", now, vec![], tried(refused()), NotReady, &["CapabilityMissing"]),
            ("a change refused", now, vec![served(vec![])], tried(refused()), Degraded, &["CapabilityMissing"]),
            ("source missing", now, vec![], missing(), NotReady, &["CapabilityMissing"]),
            ("source gone", now, vec![served(vec![])], missing(), NotReady, &["CapabilityMissing"]),
            ("hangs", late, vec![served(vec![])], stuck(), NotReady, &["SourceUnreadable"]),
            ("broker failed", now, vec![], tried(Outcome::Failed("x".into())), NotReady, &["BrokerUnavailable"]),
        ] {
            let found = of(at, &desired([share.clone()]), &observed(endpoints, vec![("a", progress)]));
            assert_eq!(found, (state, reasons.iter().map(|it| (*it).to_owned()).collect()), "{what}");
        }
    }

    #[test]
    fn a_volume_that_hangs_is_no_matter_of_its_share() {
        let now = Instant::now();
        let mut here = observed(vec![served(vec![])], vec![("a", seen(now, "/srv/a"))]);
        let late = now + PATIENCE + Duration::from_secs(1);
        for (endpoint, state) in
            [(volume("a", "one").endpoint_name(), ShareState::Ready), ("a.vm-7".into(), ShareState::NotReady)]
        {
            here.efforts.entry(endpoint).or_default().busy_since = Some(now);
            assert_eq!(of(late, &desired([declared("a", "/srv/a")]), &here).0, state);
        }
    }

    #[test]
    fn a_silent_broker_is_said_only_when_it_stays_silent() {
        let now = Instant::now();
        let mut silent = observed(vec![], vec![("a", seen(now, "/srv/a"))]);
        (silent.endpoints, silent.silent_since) = (None, Some(now));
        let wanted = desired([declared("a", "/srv/a")]);
        assert_eq!(of(now, &wanted, &silent).0, ShareState::Pending);
        assert_eq!(of(now + SILENCE, &wanted, &silent), (ShareState::NotReady, vec![BROKER_UNAVAILABLE.to_owned()]));
    }

    #[test]
    fn a_bad_document_degrades_a_share_that_is_served_and_declares_none_that_never_was() {
        let now = Instant::now();
        let here = observed(vec![served(vec![])], vec![("a", seen(now, "/srv/a"))]);
        let mut wanted = desired([declared("a", "/srv/a")]);
        wanted.problems = vec![problem(Some("a"))];
        assert_eq!(of(now, &wanted, &here), (ShareState::Degraded, vec![MANIFEST_INVALID.to_owned()]));

        wanted.shares.clear();
        let nothing = observed(vec![], vec![]);
        assert_eq!(of(now, &wanted, &nothing), (ShareState::NotReady, vec![MANIFEST_INVALID.to_owned()]));

        wanted.problems = vec![problem(None)];
        assert_eq!(report(now, &site(), &wanted, &nothing).shares, []);
    }

    #[test]
    fn what_is_no_longer_declared_drains() {
        let mut status = served(vec![]);
        status.listening = false;
        assert_eq!(of(Instant::now(), &Desired::default(), &observed(vec![status], vec![])).0, ShareState::Draining);
    }

    #[test]
    fn a_released_source_may_be_missing_and_is_not_tried() {
        let now = Instant::now();
        let mut status = served(vec![]);
        status.released = Some(Released { until: 1_700_000_000 });
        status.endpoint.engine.xattr = true;
        let wanted = desired([declared("a", "/srv/a")]);
        let gone = observed(vec![status.clone()], vec![("a", looked(now, Err(finding())))]);
        let report = report(now, &site(), &wanted, &gone);
        assert_eq!((report.shares[0].state, report.shares[0].notices.len()), (ShareState::Degraded, 1));
        assert_eq!(report.shares[0].notices[0].reason, "SourceReleased");
        assert_eq!(report.shares[0].notices[0].remedy, "virtiofs-agent resume a");
        let there = observed(vec![status], vec![("a", seen(now, "/srv/a"))]);
        assert_eq!(crate::plan::plan(now, &site(), &wanted, &there).actions, []);
    }
}
