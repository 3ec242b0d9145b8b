use std::path::Path;

use virtiofs_config::{Access, EngineConfig, InodeFileHandles, Sandbox};
use virtiofs_contract::control::Status;
use virtiofs_contract::counters::Totals;
use virtiofs_contract::preflight::{Preflight, Reason};

use super::*;
use crate::desired::tests::{declared, desired};
use crate::observed::{Look, Place};

mod volumes;

pub(crate) fn site() -> Site {
    Site {
        runtime_dir: RuntimeDir::at(Path::new("/run/virtiofs")),
        manifests: None,
        sources: crate::source::Sources::default(),
    }
}

pub(crate) fn source(path: &str, inode: u64) -> Source {
    Source { path: PathBuf::from(path), identity: (1, inode) }
}

/// What is known of one share, and was done about its own endpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    pub(crate) place: Place,
    pub(crate) effort: Effort,
}

impl Progress {
    /// The same after this attempt.
    pub(crate) fn tried(mut self, attempt: Attempt) -> Self {
        self.effort.attempt = Some(attempt);
        self
    }

    /// The same while something is being tried on this source.
    pub(crate) fn busy(mut self, since: Instant, source: &str) -> Self {
        (self.effort.busy_since, self.effort.trying) = (Some(since), Some(source.into()));
        self
    }
}

/// A share whose source was looked for, with this result.
pub(crate) fn looked(at: Instant, found: Result<Source, Finding>) -> Progress {
    let pinned = found.as_ref().ok().map(|source| source.path.clone());
    let place = Place { look: Some(Look { at, found, bare: false, space: None }), pinned, ..Place::default() };
    Progress { place, ..Progress::default() }
}

pub(crate) fn seen(at: Instant, path: &str) -> Progress {
    looked(at, Ok(source(path, 2)))
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
        limits: virtiofs_config::Limits::default(),
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
        rejected_connections: 0,
        rejected_exclusive: 0,
        last_rejection: None,
        released: None,
        sessions_started: 0,
        engines_started: 0,
        totals: Totals::default(),
    }
}

pub(crate) fn status(pid: u32, endpoints: Vec<EndpointStatus>) -> Status {
    Status { pid, endpoints }
}

/// An endpoint of this name whose sessions have counted this.
pub(crate) fn counting(name: &str, totals: Totals) -> EndpointStatus {
    let own = endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2));
    EndpointStatus { totals, ..listening(Endpoint { name: name.to_owned(), ..own }) }
}

pub(crate) fn observed(endpoints: Vec<EndpointStatus>, shares: Vec<(&str, Progress)>) -> Observed {
    let mut observed = Observed::default();
    observed.hear(Instant::now(), Some(&status(1, endpoints)));
    for (name, progress) in shares {
        observed.places.insert(name.to_owned(), progress.place);
        observed.efforts.insert(name.to_owned(), progress.effort);
    }
    observed
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
    assert_eq!(second.actions, [Action::Apply { endpoint: Box::new(expected.clone()), source: source("/srv/a", 2) }]);

    let progress = seen(now, "/srv/a").tried(attempt(now, &share, 0, Outcome::Served(Box::new(preflight(vec![])))));
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
    let missing = looked(now, Err(finding()));
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
            let progress = seen(now, "/srv/a").tried(attempt(ended, &share, repeated, Outcome::Refused(finding())));
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
    let mut progress = seen(now, "/srv/a").tried(attempt(now, &share, 7, Outcome::Refused(finding())));
    let plan_changed = plan(now, &site(), &desired([changed]), &observed(vec![], vec![("a", progress.clone())]));
    assert_eq!(plan_changed.actions.len(), 1);

    progress.place = looked(now, Ok(source("/srv/a", 3))).place;
    let plan_moved = plan(now, &site(), &desired([share]), &observed(vec![], vec![("a", progress)]));
    assert_eq!(plan_moved.actions.len(), 1);
}

#[test]
fn a_share_served_with_a_complaint_is_tried_again_in_case_the_cause_is_gone() {
    let ended = Instant::now();
    let now = ended + Duration::from_secs(1);
    let share = declared("a", "/srv/a");
    let there = listening(endpoint(&site().runtime_dir, &share, &source("/srv/a", 2)));
    let progress =
        seen(now, "/srv/a").tried(attempt(ended, &share, 0, Outcome::Served(Box::new(preflight(vec![finding()])))));
    let plan = plan(now, &site(), &desired([share]), &observed(vec![there], vec![("a", progress)]));
    assert!(matches!(&plan.actions[..], [Action::Apply { .. }]));
}

#[test]
fn a_new_broker_gets_every_share() {
    let ended = Instant::now();
    let now = ended + Duration::from_secs(1);
    let share = declared("a", "/srv/a");
    let progress = seen(now, "/srv/a").tried(attempt(ended, &share, 0, Outcome::Served(Box::new(preflight(vec![])))));
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

    let busy = seen(now, "/srv/a").busy(now, "/srv/a");
    assert_eq!(plan(now, &site(), &desired([share]), &observed(vec![], vec![("a", busy)])).actions, []);
}

#[test]
fn one_source_is_tried_for_one_share_at_a_time() {
    let now = Instant::now();
    let desired = desired([declared("a", "/srv/a"), declared("b", "/srv/a")]);
    let observed_first = observed(vec![], vec![("a", seen(now, "/srv/a")), ("b", seen(now, "/srv/a"))]);
    let first = plan(now, &site(), &desired, &observed_first);
    assert!(matches!(&first.actions[..], [Action::Apply { endpoint, .. }] if endpoint.name == "a"));

    let busy = seen(now, "/srv/a").busy(now, "/srv/a");
    let second = plan(now, &site(), &desired, &observed(vec![], vec![("a", busy), ("b", seen(now, "/srv/a"))]));
    assert_eq!(second.actions, []);
}

#[test]
fn a_share_is_withdrawn_only_after_it_was_gone_for_a_while() {
    let gone = Instant::now();
    let there = listening(endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2)));
    let effort = Effort { unwanted_since: Some(gone), ..Effort::default() };
    let progress = Progress { effort, ..Progress::default() };
    let observed = observed(vec![there], vec![("a", progress)]);
    assert_eq!(plan(gone, &site(), &Desired::default(), &observed).actions, []);
    let later = plan(gone + WITHDRAW_AFTER, &site(), &Desired::default(), &observed);
    assert_eq!(later.actions, [Action::Withdraw { endpoint: "a".into(), force: false }]);
}

#[test]
fn a_share_declared_anew_with_another_source_is_first_withdrawn() {
    let now = Instant::now();
    let old = listening(endpoint(&site().runtime_dir, &declared("a", "/srv/old"), &source("/srv/old", 1)));
    let mut observed = observed(vec![old], vec![("a", seen(now, "/srv/a"))]);
    let desired = desired([declared("a", "/srv/a")]);
    let first = plan(now, &site(), &desired, &observed);
    assert_eq!(first.actions, [Action::Withdraw { endpoint: "a".into(), force: false }]);

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

#[test]
fn a_writable_share_around_one_that_is_served_or_about_to_be_is_not_applied() {
    let now = Instant::now();
    let inner = declared("inner", "/srv/outer/inner");
    let mut outer = declared("outer", "/srv/outer");
    outer.engine = EngineConfig::stock(Access::ReadWrite);
    let desired = desired([inner.clone(), outer]);
    let plan = |endpoints, inner| {
        let shares = vec![("inner", inner), ("outer", seen(now, "/srv/outer"))];
        plan(now, &site(), &desired, &observed(endpoints, shares)).actions
    };
    let seen = seen(now, "/srv/outer/inner");
    let there = endpoint(&site().runtime_dir, &inner, &source("/srv/outer/inner", 2));
    assert_eq!(plan(vec![listening(there)], seen.clone()), []);
    assert_eq!(plan(vec![], seen.clone().busy(now, "/srv/outer/inner")), []);
    let by_another_broker = attempt(now, &inner, 0, Outcome::Served(Box::new(preflight(vec![]))));
    let again = plan(vec![], seen.tried(by_another_broker));
    assert!(matches!(&again[..], [Action::Apply { endpoint, .. }] if endpoint.name == "inner"), "{again:?}");
}

/// An endpoint of share `a` that somebody asked for.
fn asked() -> Endpoint {
    let own = endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2));
    let socket = SocketSpec { path: "/run/vm-7.sock".into(), owner: Some(7), ..own.socket };
    Endpoint { name: "a.vm-7".into(), kind: EndpointKind::Socket, socket, ..own }
}

#[test]
fn an_endpoint_that_was_asked_for_follows_its_share_and_goes_with_it() {
    let now = Instant::now();
    let mut share = declared("a", "/srv/a");
    let own = endpoint(&site().runtime_dir, &share, &source("/srv/a", 2));
    let there = || vec![listening(own.clone()), listening(asked())];
    let unchanged = observed(there(), vec![("a", seen(now, "/srv/a"))]);
    assert_eq!(plan(now, &site(), &desired([share.clone()]), &unchanged).actions, []);

    share.engine = EngineConfig { xattr: true, ..share.engine };
    let changed = Endpoint { engine: share.engine.clone(), ..asked() };
    let mut own_is_tried = observed(there(), vec![("a", seen(now, "/srv/a"))]);
    let Action::Apply { endpoint: first, .. } =
        &plan(now, &site(), &desired([share.clone()]), &own_is_tried).actions[0]
    else {
        panic!("the share's own endpoint comes first")
    };
    assert_eq!(first.name, "a");
    own_is_tried.endpoints.as_mut().unwrap().get_mut("a").unwrap().endpoint.engine = share.engine.clone();
    let then = plan(now, &site(), &desired([share]), &own_is_tried);
    assert_eq!(then.actions, [Action::Apply { endpoint: Box::new(changed), source: source("/srv/a", 2) }]);

    let mut orphaned = observed(there(), vec![]);
    orphaned.asked.clear();
    orphaned.efforts.clear();
    let gone = plan(now + WITHDRAW_AFTER, &site(), &Desired::default(), &orphaned);
    assert_eq!(gone.actions, [], "timed from when it was first missed");
    orphaned.remember(now, &Desired::default());
    let gone = plan(now + WITHDRAW_AFTER, &site(), &Desired::default(), &orphaned);
    let withdrawn = |name: &str| Action::Withdraw { endpoint: name.into(), force: false };
    assert_eq!(gone.actions, [withdrawn("a"), withdrawn("a.vm-7")]);
}

#[test]
fn nothing_is_withdrawn_while_declarations_may_be_missing() {
    let now = Instant::now();
    let there = listening(endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2)));
    let effort = Effort { unwanted_since: Some(now), ..Effort::default() };
    let observed = observed(vec![there], vec![("a", Progress { effort, ..Progress::default() })]);
    let partial = Desired { partial: true, ..Desired::default() };
    assert_eq!(plan(now + WITHDRAW_AFTER, &site(), &partial, &observed).actions, []);
}
