use std::path::Path;

use virtiofs_client::fixtures::{finding, listening, preflight};
use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::control::{EndpointKind, SocketSpec};

use super::*;
use crate::fixtures::{ShareProgress, attempt, declared, desired, observed, present, probed, site, source};
use crate::model::endpoint::own_endpoint;

mod volumes;

#[test]
fn a_new_share_is_probed_then_applied_then_left_alone() {
    let now = Instant::now();
    let share = declared("a", "/srv/a");
    let desired = desired([share.clone()]);

    let first = plan(now, &site(), &desired, &observed(vec![], vec![]));
    assert_eq!(first.actions, [Action::Probe { share: "a".into() }]);

    let second = plan(now, &site(), &desired, &observed(vec![], vec![("a", present(now, "/srv/a"))]));
    let expected = own_endpoint(&site().runtime_dir, &share, &source("/srv/a", 2));
    assert_eq!(expected.socket.path, Path::new("/run/virtiofs/shares/a.sock"));
    assert_eq!(second.actions, [Action::Apply { endpoint: Box::new(expected.clone()), source: source("/srv/a", 2) }]);

    let progress = present(now, "/srv/a").tried(attempt(now, &share, 0, Outcome::Served(Box::new(preflight(vec![])))));
    let third = plan(now, &site(), &desired, &observed(vec![listening(expected)], vec![("a", progress)]));
    assert_eq!(third.actions, []);
    assert_eq!(third.idle, PROBE_EVERY);
}

#[test]
fn what_is_served_already_is_not_applied_again() {
    let now = Instant::now();
    let share = declared("a", "/srv/a");
    let there = listening(own_endpoint(&site().runtime_dir, &share, &source("/srv/a", 2)));
    let plan = plan(now, &site(), &desired([share]), &observed(vec![there], vec![("a", present(now, "/srv/a"))]));
    assert_eq!(plan.actions, []);
}

#[test]
fn a_missing_source_is_only_looked_for_and_does_not_hold_up_others() {
    let now = Instant::now();
    let missing = probed(now, Err(finding()));
    let desired = desired([declared("a", "/srv/a"), declared("b", "/srv/b")]);
    let shares = vec![("a", missing), ("b", present(now, "/srv/b"))];
    let plan = plan(now, &site(), &desired, &observed(vec![], shares));
    assert!(matches!(&plan.actions[..], [Action::Apply { endpoint, .. }] if endpoint.name == "b"));
    assert_eq!(plan.idle, PROBE_EVERY);
}

#[test]
fn a_rejected_share_is_retried_with_back_off() {
    let share = declared("a", "/srv/a");
    for (repeated, wait) in [(0, 1), (1, 2), (5, 32), (6, 60), (40, 60)] {
        let ended = Instant::now();
        let now = ended + Duration::from_secs(wait);
        for (now, tried) in [(now - Duration::from_millis(1), false), (now, true)] {
            let progress = present(now, "/srv/a").tried(attempt(ended, &share, repeated, Outcome::Rejected(finding())));
            let plan = plan(now, &site(), &desired([share.clone()]), &observed(vec![], vec![("a", progress)]));
            assert_eq!(!plan.actions.is_empty(), tried, "{repeated} repetitions");
        }
    }
}

#[test]
fn a_change_is_applied_at_once() {
    let now = Instant::now();
    let share = declared("a", "/srv/a");
    let mut changed = share.clone();
    changed.engine = EngineConfig { xattr: true, ..EngineConfig::stock(Access::ReadOnly) };
    let mut progress = present(now, "/srv/a").tried(attempt(now, &share, 7, Outcome::Rejected(finding())));
    let plan_changed = plan(now, &site(), &desired([changed]), &observed(vec![], vec![("a", progress.clone())]));
    assert_eq!(plan_changed.actions.len(), 1);

    progress.source = probed(now, Ok(source("/srv/a", 3))).source;
    let plan_moved = plan(now, &site(), &desired([share]), &observed(vec![], vec![("a", progress)]));
    assert_eq!(plan_moved.actions.len(), 1);
}

#[test]
fn a_share_served_with_a_finding_is_retried() {
    let ended = Instant::now();
    let now = ended + Duration::from_secs(1);
    let share = declared("a", "/srv/a");
    let there = listening(own_endpoint(&site().runtime_dir, &share, &source("/srv/a", 2)));
    let progress =
        present(now, "/srv/a").tried(attempt(ended, &share, 0, Outcome::Served(Box::new(preflight(vec![finding()])))));
    let plan = plan(now, &site(), &desired([share]), &observed(vec![there], vec![("a", progress)]));
    assert!(matches!(&plan.actions[..], [Action::Apply { .. }]));
}

#[test]
fn a_new_broker_gets_every_share() {
    let ended = Instant::now();
    let now = ended + Duration::from_secs(1);
    let share = declared("a", "/srv/a");
    let progress =
        present(now, "/srv/a").tried(attempt(ended, &share, 0, Outcome::Served(Box::new(preflight(vec![])))));
    let plan = plan(now, &site(), &desired([share]), &observed(vec![], vec![("a", progress)]));
    assert!(matches!(&plan.actions[..], [Action::Apply { .. }]));
}

#[test]
fn nothing_is_applied_without_a_broker_or_to_a_busy_share() {
    let now = Instant::now();
    let share = declared("a", "/srv/a");
    let mut without_broker = observed(vec![], vec![("a", present(now, "/srv/a"))]);
    without_broker.endpoints = None;
    assert_eq!(plan(now, &site(), &desired([share.clone()]), &without_broker).actions, []);

    let busy = present(now, "/srv/a").busy(now, "/srv/a");
    assert_eq!(plan(now, &site(), &desired([share]), &observed(vec![], vec![("a", busy)])).actions, []);
}

#[test]
fn one_trial_runs_on_a_source_at_a_time() {
    let now = Instant::now();
    let desired = desired([declared("a", "/srv/a"), declared("b", "/srv/a")]);
    let observed_first = observed(vec![], vec![("a", present(now, "/srv/a")), ("b", present(now, "/srv/a"))]);
    let first = plan(now, &site(), &desired, &observed_first);
    assert!(matches!(&first.actions[..], [Action::Apply { endpoint, .. }] if endpoint.name == "a"));

    let busy = present(now, "/srv/a").busy(now, "/srv/a");
    let second = plan(now, &site(), &desired, &observed(vec![], vec![("a", busy), ("b", present(now, "/srv/a"))]));
    assert_eq!(second.actions, []);
}

#[test]
fn a_share_is_withdrawn_after_a_grace_period() {
    let gone = Instant::now();
    let there = listening(own_endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2)));
    let progress = Progress { undesired_since: Some(gone), ..Progress::default() };
    let progress = ShareProgress { progress, ..ShareProgress::default() };
    let observed = observed(vec![there], vec![("a", progress)]);
    assert_eq!(plan(gone, &site(), &Desired::default(), &observed).actions, []);
    let later = plan(gone + WITHDRAW_AFTER, &site(), &Desired::default(), &observed);
    assert_eq!(later.actions, [Action::Withdraw { endpoint: "a".into(), force: false }]);
}

#[test]
fn a_share_redeclared_with_another_source_is_first_withdrawn() {
    let now = Instant::now();
    let old = listening(own_endpoint(&site().runtime_dir, &declared("a", "/srv/old"), &source("/srv/old", 1)));
    let mut observed = observed(vec![old], vec![("a", present(now, "/srv/a"))]);
    let desired = desired([declared("a", "/srv/a")]);
    let first = plan(now, &site(), &desired, &observed);
    assert_eq!(first.actions, [Action::Withdraw { endpoint: "a".into(), force: false }]);

    observed.endpoints.as_mut().unwrap().get_mut("a").unwrap().listening = false;
    let second = plan(now, &site(), &desired, &observed);
    assert!(matches!(&second.actions[..], [Action::Apply { .. }]));
}

#[test]
fn a_draining_share_is_not_withdrawn_twice() {
    let now = Instant::now();
    let mut draining = listening(own_endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2)));
    draining.listening = false;
    assert_eq!(plan(now, &site(), &Desired::default(), &observed(vec![draining], vec![])).actions, []);
}

#[test]
fn a_share_inside_a_writable_one_is_not_applied() {
    let now = Instant::now();
    let inner = declared("inner", "/srv/outer/inner");
    let mut outer = declared("outer", "/srv/outer");
    outer.engine = EngineConfig::stock(Access::ReadWrite);
    let shares = vec![("inner", present(now, "/srv/outer/inner")), ("outer", present(now, "/srv/outer"))];
    let plan = plan(now, &site(), &desired([inner, outer]), &observed(vec![], shares));
    assert!(matches!(&plan.actions[..], [Action::Apply { endpoint, .. }] if endpoint.name == "outer"));
}

#[test]
fn a_writable_share_around_a_served_one_is_not_applied() {
    let now = Instant::now();
    let inner = declared("inner", "/srv/outer/inner");
    let mut outer = declared("outer", "/srv/outer");
    outer.engine = EngineConfig::stock(Access::ReadWrite);
    let desired = desired([inner.clone(), outer]);
    let plan = |endpoints, inner| {
        let shares = vec![("inner", inner), ("outer", present(now, "/srv/outer"))];
        plan(now, &site(), &desired, &observed(endpoints, shares)).actions
    };
    let present = present(now, "/srv/outer/inner");
    let there = own_endpoint(&site().runtime_dir, &inner, &source("/srv/outer/inner", 2));
    assert_eq!(plan(vec![listening(there)], present.clone()), []);
    assert_eq!(plan(vec![], present.clone().busy(now, "/srv/outer/inner")), []);
    let by_another_broker = attempt(now, &inner, 0, Outcome::Served(Box::new(preflight(vec![]))));
    let again = plan(vec![], present.tried(by_another_broker));
    assert!(matches!(&again[..], [Action::Apply { endpoint, .. }] if endpoint.name == "inner"), "{again:?}");
}

/// A socket of share `a` that a person added.
fn added() -> Endpoint {
    let own = own_endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2));
    let socket = SocketSpec { path: "/run/vm-7.sock".into(), owner: Some(7), ..own.socket };
    Endpoint { name: "a.vm-7".into(), kind: EndpointKind::Socket, socket, ..own }
}

#[test]
fn an_added_socket_follows_its_share() {
    let now = Instant::now();
    let mut share = declared("a", "/srv/a");
    let own = own_endpoint(&site().runtime_dir, &share, &source("/srv/a", 2));
    let there = || vec![listening(own.clone()), listening(added())];
    let unchanged = observed(there(), vec![("a", present(now, "/srv/a"))]);
    assert_eq!(plan(now, &site(), &desired([share.clone()]), &unchanged).actions, []);

    share.engine = EngineConfig { xattr: true, ..share.engine };
    let changed = Endpoint { engine: share.engine.clone(), ..added() };
    let mut own_is_tried = observed(there(), vec![("a", present(now, "/srv/a"))]);
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
    orphaned.requested.clear();
    orphaned.progress.clear();
    let gone = plan(now + WITHDRAW_AFTER, &site(), &Desired::default(), &orphaned);
    assert_eq!(gone.actions, [], "timed from when it was first missed");
    orphaned.update_desired(now, &Desired::default());
    let gone = plan(now + WITHDRAW_AFTER, &site(), &Desired::default(), &orphaned);
    let withdrawn = |name: &str| Action::Withdraw { endpoint: name.into(), force: false };
    assert_eq!(gone.actions, [withdrawn("a"), withdrawn("a.vm-7")]);
}

#[test]
fn nothing_is_withdrawn_while_declarations_are_partial() {
    let now = Instant::now();
    let there = listening(own_endpoint(&site().runtime_dir, &declared("a", "/srv/a"), &source("/srv/a", 2)));
    let progress = Progress { undesired_since: Some(now), ..Progress::default() };
    let observed = observed(vec![there], vec![("a", ShareProgress { progress, ..ShareProgress::default() })]);
    let partial = Desired { partial: true, ..Desired::default() };
    assert_eq!(plan(now + WITHDRAW_AFTER, &site(), &partial, &observed).actions, []);
}
