//! What to do next: a pure function of what is declared and what is observed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use virtiofs_contract::control::{Endpoint, EndpointStatus, SocketSpec};
use virtiofs_contract::preflight::{Finding, Preflight};
use virtiofs_crds::Share;

use crate::backoff::delay;
use crate::desired::Desired;
use crate::overlap::{self, Place};
use crate::runtime_dir::RuntimeDir;
use crate::source::Source;

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

/// What is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observed {
    /// The broker's endpoints by name; none: no broker answers.
    pub(crate) endpoints: Option<BTreeMap<String, EndpointStatus>>,
    /// Since when no broker has answered.
    pub(crate) silent_since: Option<Instant>,
    /// What was done about each share so far.
    pub(crate) shares: BTreeMap<String, Progress>,
}

/// What was done about one share so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Progress {
    /// Where its source was declared to be, the last time it was.
    pub(crate) declared: Option<PathBuf>,
    /// Since when an action on it has been under way.
    pub(crate) busy_since: Option<Instant>,
    /// The source on which a trial of it is under way.
    pub(crate) trying: Option<PathBuf>,
    /// The last look at its source.
    pub(crate) look: Option<Look>,
    /// Where its source was found first.
    pub(crate) pinned: Option<PathBuf>,
    /// The last attempt to have it served.
    pub(crate) attempt: Option<Attempt>,
    /// Since when it has no longer been declared.
    pub(crate) absent_since: Option<Instant>,
}

/// A look at a source.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Look {
    /// When.
    pub(crate) at: Instant,
    /// What was there.
    pub(crate) found: Result<Source, Finding>,
}

/// An attempt to have a share served.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Attempt {
    /// When it ended.
    pub(crate) at: Instant,
    /// What was asked of the broker.
    pub(crate) endpoint: Endpoint,
    /// The source at that time.
    pub(crate) source: Source,
    /// How often in a row the same was asked before, without it having become all right.
    pub(crate) repeated: u32,
    /// What came of it.
    pub(crate) outcome: Outcome,
}

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// Served; what the trial found.
    Served(Box<Preflight>),
    /// Refused by the broker, with its reason.
    Refused(Finding),
    /// Not to be, as the broker is now; its words.
    Impossible(String),
    /// The broker could not be asked, or its answer not be understood.
    Failed(String),
}

impl Outcome {
    /// Served, and nothing to complain of?
    pub(crate) fn is_flawless(&self) -> bool {
        matches!(self, Outcome::Served(preflight) if preflight.findings.is_empty())
    }
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// Look for the source of a share.
    Look { share: String },
    /// Have the broker serve a share.
    Apply { endpoint: Box<Endpoint>, source: Source },
    /// Have the broker stop listening for a share.
    Withdraw { share: String },
}

impl Action {
    /// The share it is about.
    pub(crate) fn share(&self) -> &str {
        match self {
            Action::Look { share } | Action::Withdraw { share } => share,
            Action::Apply { endpoint, .. } => &endpoint.name,
        }
    }
}

/// What to do now, and when to think again.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    /// At most one action for each share.
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
}

/// Decides what to do.
pub(crate) fn plan(now: Instant, site: &Site, desired: &Desired, observed: &Observed) -> Plan {
    let rest = if observed.endpoints.is_some() { PLAN_AT_LEAST_EVERY } else { KNOCK_EVERY };
    let trying = observed.shares.values().filter_map(|progress| progress.trying.clone()).collect();
    let mut due = Due { now, actions: Vec::new(), rest, trying };
    let idle = Progress::default();
    for share in desired.shares.values() {
        let progress = observed.shares.get(share.name.as_str()).unwrap_or(&idle);
        if progress.busy_since.is_none() {
            due.see_to(site, desired, observed, share, progress);
        }
    }
    for endpoint in observed.endpoints.iter().flat_map(|endpoints| endpoints.values()).filter(|it| it.listening) {
        let name = &endpoint.endpoint.name;
        let progress = observed.shares.get(name).unwrap_or(&idle);
        if !desired.shares.contains_key(name) && progress.busy_since.is_none() {
            let gone_since = progress.absent_since.unwrap_or(now);
            due.when(gone_since + WITHDRAW_AFTER, || Action::Withdraw { share: name.clone() });
        }
    }
    Plan { actions: due.actions, rest: due.rest }
}

/// What the broker is to be told about a share whose source was found.
pub(crate) fn endpoint(runtime_dir: &RuntimeDir, share: &Share, source: &Source) -> Endpoint {
    Endpoint {
        name: share.name.to_string(),
        source: source.path.clone(),
        socket: SocketSpec {
            path: runtime_dir.share_socket(share.name.as_str()),
            owner: share.socket.owner,
            group: share.socket.group,
            mode: share.socket.mode,
        },
        engine: share.engine.clone(),
        exclusive: share.exclusive,
    }
}

/// Why a share must not be served where its source is, if so.
pub(crate) fn conflict(site: &Site, desired: &Desired, observed: &Observed, share: &Share) -> Option<Finding> {
    let places: Vec<_> = desired.shares.values().filter_map(|other| place(observed, other)).collect();
    overlap::conflict(place(observed, share)?, &places, site.manifests.as_deref())
}

fn place<'a>(observed: &'a Observed, share: &'a Share) -> Option<Place<'a>> {
    let path = observed.shares.get(share.name.as_str())?.pinned.as_deref()?;
    Some(Place { share: share.name.as_str(), path, writable: share.engine.writable() })
}

struct Due {
    now: Instant,
    actions: Vec<Action>,
    rest: Duration,
    /// Sources on which something is being tried. The broker tries one thing at a time on each: a source that
    /// hangs must not fill it with trials.
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

    fn see_to(&mut self, site: &Site, desired: &Desired, observed: &Observed, share: &Share, progress: &Progress) {
        let look_at = progress.look.as_ref().map_or(self.now, |look| look.at + LOOK_EVERY);
        if self.when(look_at, || Action::Look { share: share.name.to_string() }) {
            return;
        }
        let (Some(Ok(source)), Some(endpoints)) = (progress.look.as_ref().map(|look| &look.found), &observed.endpoints)
        else {
            return;
        };
        if conflict(site, desired, observed, share).is_some() {
            return;
        }
        let endpoint = endpoint(&site.runtime_dir, share, source);
        let known = endpoints.get(share.name.as_str());
        let listening = known.filter(|it| it.listening);
        if listening.is_some_and(|it| it.endpoint.source != endpoint.source) {
            // Another share of this name was here; nobody may get its files for the new one's.
            self.actions.push(Action::Withdraw { share: share.name.to_string() });
            return;
        }
        if let Some(at) = try_at(self.now, &endpoint, source, known, progress.attempt.as_ref())
            && !self.trying.contains(&source.path)
            && self.when(at, || Action::Apply { endpoint: Box::new(endpoint), source: source.clone() })
        {
            self.trying.insert(source.path.clone());
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
pub(crate) mod tests {
    use std::path::Path;

    use virtiofs_contract::config::{Access, EngineConfig, InodeFileHandles, Sandbox};
    use virtiofs_contract::counters::Totals;
    use virtiofs_contract::preflight::Reason;

    use super::*;
    use crate::desired::tests::{declared, desired};

    pub(crate) fn site() -> Site {
        Site { runtime_dir: RuntimeDir::at(Path::new("/run/virtiofs")), manifests: None }
    }

    pub(crate) fn source(path: &str, inode: u64) -> Source {
        Source { path: PathBuf::from(path), identity: (1, inode) }
    }

    pub(crate) fn seen(at: Instant, path: &str) -> Progress {
        Progress {
            look: Some(Look { at, found: Ok(source(path, 2)) }),
            pinned: Some(path.into()),
            ..Progress::default()
        }
    }

    pub(crate) fn finding() -> Finding {
        Finding { reason: Reason::CapabilityMissing, message: "m".into(), remedy: "r".into() }
    }

    pub(crate) fn preflight(findings: Vec<Finding>) -> Preflight {
        Preflight {
            sandbox: Sandbox::Chroot,
            user_namespace: false,
            capabilities: Vec::new(),
            inode_file_handles: InodeFileHandles::Prefer,
            mounts: Vec::new(),
            open_files: 1024,
            guest_open_files: 1000,
            findings,
        }
    }

    pub(crate) fn listening(endpoint: Endpoint) -> EndpointStatus {
        EndpointStatus {
            endpoint,
            listening: true,
            preflight: preflight(Vec::new()),
            sessions: Vec::new(),
            refused_connections: 0,
            sessions_started: 0,
            engines_started: 0,
            totals: Totals::default(),
        }
    }

    pub(crate) fn observed(endpoints: Vec<EndpointStatus>, shares: Vec<(&str, Progress)>) -> Observed {
        Observed {
            endpoints: Some(endpoints.into_iter().map(|it| (it.endpoint.name.clone(), it)).collect()),
            silent_since: None,
            shares: shares.into_iter().map(|(name, progress)| (name.to_owned(), progress)).collect(),
        }
    }

    pub(crate) fn attempt(at: Instant, share: &Share, repeated: u32, outcome: Outcome) -> Attempt {
        let source = source("/srv/a", 2);
        Attempt { at, endpoint: endpoint(&site().runtime_dir, share, &source), source, repeated, outcome }
    }

    #[test]
    fn a_new_share_is_looked_for_then_applied_then_left_alone() {
        let now = Instant::now();
        let share = declared("a", "/srv/a");
        let desired = desired([share.clone()]);

        let first = plan(now, &site(), &desired, &observed(vec![], vec![]));
        assert_eq!(first.actions, [Action::Look { share: "a".into() }]);

        let second = plan(now, &site(), &desired, &observed(vec![], vec![("a", seen(now, "/srv/a"))]));
        let expected = endpoint(&site().runtime_dir, &share, &source("/srv/a", 2));
        assert_eq!(expected.socket.path, Path::new("/run/virtiofs/shares/a.sock"));
        assert_eq!(
            second.actions,
            [Action::Apply { endpoint: Box::new(expected.clone()), source: source("/srv/a", 2) }]
        );

        let mut progress = seen(now, "/srv/a");
        progress.attempt = Some(attempt(now, &share, 0, Outcome::Served(Box::new(preflight(vec![])))));
        let third = plan(now, &site(), &desired, &observed(vec![listening(expected)], vec![("a", progress)]));
        assert_eq!(third.actions, []);
        assert_eq!(third.rest, LOOK_EVERY);
    }

    #[test]
    fn what_an_earlier_agent_had_served_is_not_asked_for_again() {
        let now = Instant::now();
        let share = declared("a", "/srv/a");
        let there = listening(endpoint(&site().runtime_dir, &share, &source("/srv/a", 2)));
        let plan = plan(now, &site(), &desired([share]), &observed(vec![there], vec![("a", seen(now, "/srv/a"))]));
        assert_eq!(plan.actions, []);
    }

    #[test]
    fn a_missing_source_is_only_looked_for_and_does_not_hold_up_others() {
        let now = Instant::now();
        let missing = Progress { look: Some(Look { at: now, found: Err(finding()) }), ..Progress::default() };
        let desired = desired([declared("a", "/srv/a"), declared("b", "/srv/b")]);
        let shares = vec![("a", missing), ("b", seen(now, "/srv/b"))];
        let plan = plan(now, &site(), &desired, &observed(vec![], shares));
        assert!(matches!(&plan.actions[..], [Action::Apply { endpoint, .. }] if endpoint.name == "b"));
        assert_eq!(plan.rest, LOOK_EVERY);
    }

    #[test]
    fn a_refused_share_is_tried_again_later_each_time_up_to_a_minute() {
        let share = declared("a", "/srv/a");
        for (repeated, wait) in [(0, 1), (1, 2), (5, 32), (6, 60), (40, 60)] {
            let ended = Instant::now();
            let now = ended + Duration::from_secs(wait);
            for (now, tried) in [(now - Duration::from_millis(1), false), (now, true)] {
                let mut progress = seen(now, "/srv/a");
                progress.attempt = Some(attempt(ended, &share, repeated, Outcome::Refused(finding())));
                let plan = plan(now, &site(), &desired([share.clone()]), &observed(vec![], vec![("a", progress)]));
                assert_eq!(!plan.actions.is_empty(), tried, "{repeated} repetitions");
            }
        }
    }

    #[test]
    fn a_change_of_declaration_or_source_is_tried_at_once() {
        let now = Instant::now();
        let share = declared("a", "/srv/a");
        let mut changed = share.clone();
        changed.engine = EngineConfig { xattr: true, ..EngineConfig::stock(Access::ReadOnly) };
        let mut progress = seen(now, "/srv/a");
        progress.attempt = Some(attempt(now, &share, 7, Outcome::Refused(finding())));
        let plan_changed = plan(now, &site(), &desired([changed]), &observed(vec![], vec![("a", progress.clone())]));
        assert_eq!(plan_changed.actions.len(), 1);

        progress.look = Some(Look { at: now, found: Ok(source("/srv/a", 3)) });
        let plan_moved = plan(now, &site(), &desired([share]), &observed(vec![], vec![("a", progress)]));
        assert_eq!(plan_moved.actions.len(), 1);
    }

    #[test]
    fn a_share_served_with_a_complaint_is_tried_again_in_case_the_cause_is_gone() {
        let ended = Instant::now();
        let now = ended + Duration::from_secs(1);
        let share = declared("a", "/srv/a");
        let there = listening(endpoint(&site().runtime_dir, &share, &source("/srv/a", 2)));
        let mut progress = seen(now, "/srv/a");
        progress.attempt = Some(attempt(ended, &share, 0, Outcome::Served(Box::new(preflight(vec![finding()])))));
        let plan = plan(now, &site(), &desired([share]), &observed(vec![there], vec![("a", progress)]));
        assert!(matches!(&plan.actions[..], [Action::Apply { .. }]));
    }

    #[test]
    fn a_new_broker_gets_every_share() {
        let ended = Instant::now();
        let now = ended + Duration::from_secs(1);
        let share = declared("a", "/srv/a");
        let mut progress = seen(now, "/srv/a");
        progress.attempt = Some(attempt(ended, &share, 0, Outcome::Served(Box::new(preflight(vec![])))));
        let plan = plan(now, &site(), &desired([share]), &observed(vec![], vec![("a", progress)]));
        assert!(matches!(&plan.actions[..], [Action::Apply { .. }]));
    }

    #[test]
    fn nothing_is_asked_of_a_broker_that_does_not_answer_nor_of_a_busy_share() {
        let now = Instant::now();
        let share = declared("a", "/srv/a");
        let mut without_broker = observed(vec![], vec![("a", seen(now, "/srv/a"))]);
        without_broker.endpoints = None;
        assert_eq!(plan(now, &site(), &desired([share.clone()]), &without_broker).actions, []);

        let busy = Progress { busy_since: Some(now), ..seen(now, "/srv/a") };
        assert_eq!(plan(now, &site(), &desired([share]), &observed(vec![], vec![("a", busy)])).actions, []);
    }

    #[test]
    fn one_source_is_tried_for_one_share_at_a_time() {
        let now = Instant::now();
        let desired = desired([declared("a", "/srv/a"), declared("b", "/srv/a")]);
        let observed_first = observed(vec![], vec![("a", seen(now, "/srv/a")), ("b", seen(now, "/srv/a"))]);
        let first = plan(now, &site(), &desired, &observed_first);
        assert!(matches!(&first.actions[..], [Action::Apply { endpoint, .. }] if endpoint.name == "a"));

        let busy = Progress { busy_since: Some(now), trying: Some("/srv/a".into()), ..seen(now, "/srv/a") };
        let second = plan(now, &site(), &desired, &observed(vec![], vec![("a", busy), ("b", seen(now, "/srv/a"))]));
        assert_eq!(second.actions, []);
    }

    #[test]
    fn a_share_is_withdrawn_only_after_it_was_gone_for_a_while() {
        let gone = Instant::now();
        let there = listening(endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2)));
        let progress = Progress { absent_since: Some(gone), ..Progress::default() };
        let observed = observed(vec![there], vec![("a", progress)]);
        assert_eq!(plan(gone, &site(), &Desired::default(), &observed).actions, []);
        let later = plan(gone + WITHDRAW_AFTER, &site(), &Desired::default(), &observed);
        assert_eq!(later.actions, [Action::Withdraw { share: "a".into() }]);
    }

    #[test]
    fn a_share_declared_anew_with_another_source_is_first_withdrawn() {
        let now = Instant::now();
        let old = listening(endpoint(&site().runtime_dir, &declared("a", "/srv/old"), &source("/srv/old", 1)));
        let mut observed = observed(vec![old], vec![("a", seen(now, "/srv/a"))]);
        let desired = desired([declared("a", "/srv/a")]);
        let first = plan(now, &site(), &desired, &observed);
        assert_eq!(first.actions, [Action::Withdraw { share: "a".into() }]);

        observed.endpoints.as_mut().unwrap().get_mut("a").unwrap().listening = false;
        let second = plan(now, &site(), &desired, &observed);
        assert!(matches!(&second.actions[..], [Action::Apply { .. }]));
    }

    #[test]
    fn a_share_whose_sessions_run_out_is_not_withdrawn_twice() {
        let now = Instant::now();
        let mut draining = listening(endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2)));
        draining.listening = false;
        assert_eq!(plan(now, &site(), &Desired::default(), &observed(vec![draining], vec![])).actions, []);
    }

    #[test]
    fn a_share_inside_a_writable_one_is_not_applied() {
        let now = Instant::now();
        let inner = declared("inner", "/srv/outer/inner");
        let mut outer = declared("outer", "/srv/outer");
        outer.engine = EngineConfig::stock(Access::ReadWrite);
        let shares = vec![("inner", seen(now, "/srv/outer/inner")), ("outer", seen(now, "/srv/outer"))];
        let plan = plan(now, &site(), &desired([inner, outer]), &observed(vec![], shares));
        assert!(matches!(&plan.actions[..], [Action::Apply { endpoint, .. }] if endpoint.name == "outer"));
    }
}
