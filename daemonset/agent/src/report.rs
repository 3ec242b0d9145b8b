//! How each share is doing: a pure function of what is wanted and observed. Every sink, be it a terminal,
//! a file, a metric or one day an API server, shows this and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant, UNIX_EPOCH};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::control::{EndpointStatus, SessionState, SessionStatus};
use virtiofs_contract::preflight::Reason;
use virtiofs_crds::Share;

use crate::desired::{Desired, Problem};
use crate::notice::{
    BROKER_REFUSED, BROKER_UNAVAILABLE, EXCLUSIVE_REFUSED, MANIFEST_INVALID, NEAR_LIMIT, Notice, SESSION_FAILED,
    SOURCE_HUNG,
};
use crate::observed::{Effort, Observed, Outcome, Place};
use crate::offer::{offers_of, share_name, share_of};
use crate::plan::{Site, conflict};
use crate::source::hangs;
use crate::staleness::ShareStaleness;

/// A look at a source that takes longer than this is worth a word.
const PATIENCE: Duration = Duration::from_secs(10);

/// So is a broker that is silent for longer than a new one takes to start.
const SILENCE: Duration = Duration::from_secs(2);

/// A request that has been waiting for longer than this hangs.
const HUNG_AFTER: Duration = Duration::from_secs(10);

/// How long it is told that a second VM was refused.
const REFUSAL_STANDS: Duration = Duration::from_secs(300);

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

enum Obstacle {
    Unknown,
    Notice(Notice),
}

/// What keeps a share from being served whatever the broker says about it.
fn obstacle(now: Instant, observed: &Observed, share: &Share) -> Option<Obstacle> {
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

/// What was done about the endpoints of a share.
fn efforts<'a>(observed: &'a Observed, share: &'a str) -> impl Iterator<Item = &'a Effort> {
    let own = move |name: &str| name == share || share_of(name) == Some(share);
    observed.efforts.iter().filter(move |(name, _)| own(name)).map(|(_, effort)| effort)
}

/// What the broker has made of a share whose source is there. How its own endpoint is doing is how the share is
/// doing; one that was asked for beside it makes it no worse than `Degraded`.
fn served(site: &Site, desired: &Desired, observed: &Observed, share: &Share) -> (ShareState, Vec<Notice>) {
    let source = observed.places.get(share.name.as_str()).and_then(Place::source);
    let mut all = offers_of(share, &observed.asked).map(|offer| {
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

/// What is wrong around a share that may be served all the same.
fn complaints(now: Instant, share: &str, problems: &[Problem], observed: &Observed) -> Vec<Notice> {
    let documents = problems.iter().filter(|problem| problem.share.as_deref() == Some(share));
    let mut notices: Vec<_> = documents
        .map(|problem| {
            let message = format!("{problem}; the last good version stays in force");
            Notice::new(MANIFEST_INVALID, message, "correct the document and save it")
        })
        .collect();
    // Each thing once: there may be many sessions.
    let sessions = sessions(observed, share);
    for notice in sessions.flat_map(|it| session_notice(it).into_iter().chain(strained(it))) {
        if !notices.contains(&notice) {
            notices.push(notice);
        }
    }
    notices.extend(refused_second(now, share, observed));
    notices
}

/// What is not wrong yet, or nobody's fault here, but worth knowing of a session before its guest is refused.
fn strained(session: &SessionStatus) -> Vec<Notice> {
    let mut notices = Vec::new();
    if let Some(oldest) = session.oldest_request.as_ref().filter(|it| it.age_ms >= HUNG_AFTER.as_millis() as u64) {
        let message =
            format!("{}: a request has been waiting for the source for {} s", session.id, oldest.age_ms / 1000);
        let remedy = "look after the source's file system or its server; other sessions go on, and so does this one \
                      when it answers";
        notices.push(Notice::new(SOURCE_HUNG, message, remedy));
    }
    let near = |held: u64, most: u64| most > 0 && u128::from(held) * 10 >= u128::from(most) * 8;
    if near(session.held.inodes, session.inodes_limit) {
        let message = format!("{} holds {} of {} inodes", session.id, session.held.inodes, session.inodes_limit);
        let remedy = "raise engine.maxInodes and have that VM connect anew, or drop caches in the guest";
        notices.push(Notice::new(NEAR_LIMIT, message, remedy));
    }
    let limit = session.preflight.as_ref().map_or(0, |preflight| preflight.open_files);
    if near(session.open_files, limit) {
        let message = format!("{} has {} of {limit} files open", session.id, session.open_files);
        let remedy = "let file handles work (see the manual), raise engine.openFiles, or drop caches in the guest";
        notices.push(Notice::new(NEAR_LIMIT, message, remedy));
    }
    notices
}

/// Has a second VM been refused a while ago?
fn refused_second(now: Instant, share: &str, observed: &Observed) -> Option<Notice> {
    let at = observed.efforts.iter().filter(|(name, _)| share_name(name) == share);
    let last = at.filter_map(|(_, effort)| effort.refused_at).max()?;
    (now.saturating_duration_since(last) < REFUSAL_STANDS).then(|| {
        let remedy = "content Exclusive is for one VM at a time: end the other first, or declare what is true";
        Notice::new(EXCLUSIVE_REFUSED, "a VM was refused while another uses the share", remedy)
    })
}

/// Somebody has the source released, so that the host can unmount it: whether it is there is no question now.
fn released(observed: &Observed, share: &str) -> Option<Notice> {
    let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
    let own = endpoints.filter(|it| share_name(&it.endpoint.name) == share);
    own.filter_map(|it| it.released).map(|it| it.until).max().map(|until| {
        let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(until));
        let message = format!("the source is released until {at}; guests wait");
        Notice::new(Reason::SourceReleased.as_str(), message, format!("virtiofs-agent resume {share}"))
    })
}

/// Sessions of a share, at whatever endpoint.
fn sessions<'a>(observed: &'a Observed, share: &'a str) -> impl Iterator<Item = &'a SessionStatus> {
    let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
    let own = move |it: &&EndpointStatus| share_name(&it.endpoint.name) == share;
    endpoints.filter(own).flat_map(|it| &it.sessions)
}

fn session_notice(session: &SessionStatus) -> Option<Notice> {
    match (session.state, &session.finding) {
        (SessionState::Failed, Some(finding)) => {
            let message = format!("{}: {}", finding.reason.as_str(), finding.message);
            Some(Notice::new(SESSION_FAILED, message, &finding.remedy))
        }
        (SessionState::Failed, None) => {
            Some(Notice::new(SESSION_FAILED, "its engine is gone", "another is started; see the log for why"))
        }
        (SessionState::Recovering, _) => None,
        // It is said of the share.
        (SessionState::Released, _) => None,
        (_, finding) => finding.as_ref().map(Notice::from),
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
    use virtiofs_contract::control::{OldestRequest, Released};
    use virtiofs_contract::counters::{Held, Totals};
    use virtiofs_contract::preflight::Finding;

    use super::*;
    use crate::desired::tests::{declared, desired};
    use crate::plan::endpoint;
    use crate::plan::tests::{Progress, attempt, finding, listening, looked, observed, preflight, seen, site, source};

    /// State and reasons of the one share.
    fn of(now: Instant, desired: &Desired, observed: &Observed) -> (ShareState, Vec<String>) {
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

    fn served(findings: Vec<Finding>) -> EndpointStatus {
        let endpoint = endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2));
        EndpointStatus { preflight: preflight(findings), ..listening(endpoint) }
    }

    /// A session that serves, with nothing to complain of.
    pub(crate) fn session(id: &str) -> SessionStatus {
        SessionStatus {
            id: id.into(),
            state: SessionState::Serving,
            vmm_pid: 1,
            connected_at: 0,
            engine_pid: None,
            engines: 1,
            engine_binary: None,
            generation: 0,
            wanted_generation: 0,
            last_exchange: None,
            oldest_request: None,
            trace: None,
            parked_files: 0,
            engine: declared("a", "/srv/a").engine,
            guest_memory: 0,
            preflight: None,
            finding: None,
            open_files: 0,
            held: Held::default(),
            inodes_limit: 1,
            totals: Totals::default(),
            stale_events: vec![],
            source_gone: None,
        }
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
    fn sessions_that_failed_show_once_for_each_cause() {
        let now = Instant::now();
        let mut status = served(vec![]);
        let failed = |id: &str, reason| {
            let finding = Some(Finding { reason, ..finding() });
            SessionStatus { state: SessionState::Failed, finding, ..session(id) }
        };
        status.sessions = vec![
            failed("a-1", Reason::EngineFailed),
            failed("a-2", Reason::EngineFailed),
            failed("a-3", Reason::SourceMissing),
        ];
        let found =
            of(now, &desired([declared("a", "/srv/a")]), &observed(vec![status], vec![("a", seen(now, "/srv/a"))]));
        assert_eq!(found, (ShareState::Degraded, vec![SESSION_FAILED.to_owned(); 2]));
    }

    #[test]
    fn what_is_no_longer_declared_drains() {
        let mut status = served(vec![]);
        status.listening = false;
        assert_eq!(of(Instant::now(), &Desired::default(), &observed(vec![status], vec![])).0, ShareState::Draining);
    }

    /// State and reasons of the one share when its endpoint is like this.
    fn with(change: impl FnOnce(&mut EndpointStatus)) -> (ShareState, Vec<String>) {
        let now = Instant::now();
        let mut status = served(vec![]);
        status.sessions = vec![session("a-1")];
        change(&mut status);
        of(now, &desired([declared("a", "/srv/a")]), &observed(vec![status], vec![("a", seen(now, "/srv/a"))]))
    }

    #[test]
    fn what_strains_a_session_is_said_before_its_guest_is_refused() {
        let old = |age_ms| Some(OldestRequest { age_ms, opcode: 15, node: 2, path: None });
        assert_eq!(with(|_| ()), (ShareState::Ready, vec![]));
        assert_eq!(with(|it| it.sessions[0].oldest_request = old(9_999)), (ShareState::Ready, vec![]));
        let hung = (ShareState::Degraded, vec![SOURCE_HUNG.to_owned()]);
        assert_eq!(with(|it| it.sessions[0].oldest_request = old(10_000)), hung);

        let holding = |inodes, limit| {
            with(|it| {
                (it.sessions[0].held.inodes, it.sessions[0].inodes_limit) = (inodes, limit);
            })
        };
        let near = (ShareState::Degraded, vec![NEAR_LIMIT.to_owned()]);
        assert_eq!(holding(799, 1000), (ShareState::Ready, vec![]));
        assert_eq!(holding(800, 1000), near);
        let opened = |files| {
            with(|it| {
                it.sessions[0].open_files = files;
                it.sessions[0].preflight = Some(preflight(vec![]));
            })
        };
        assert_eq!((opened(800), opened(1000)), ((ShareState::Ready, vec![]), near));
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

    #[test]
    fn a_second_vm_that_was_refused_is_told_of_for_a_while() {
        let start = Instant::now();
        let mut observed = observed(vec![], vec![("a", seen(start, "/srv/a"))]);
        let wanted = desired([declared("a", "/srv/a")]);
        let mut at = |seconds, refused| {
            let now = start + Duration::from_secs(seconds);
            let endpoint = EndpointStatus { refused_exclusive: refused, ..served(vec![]) };
            observed.hear(now, Some(&crate::plan::tests::status(1, vec![endpoint])));
            of(now, &wanted, &observed)
        };
        let told = (ShareState::Degraded, vec![EXCLUSIVE_REFUSED.to_owned()]);
        assert_eq!(at(0, 3), (ShareState::Ready, vec![]), "before this agent");
        assert_eq!(at(1, 4), told);
        assert_eq!(at(300, 4), told);
        assert_eq!(at(302, 4), (ShareState::Ready, vec![]));
    }
}
