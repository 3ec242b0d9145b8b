//! What becomes of each cause: the courses that trouble takes, from the first event to the cure or the end.

#![allow(clippy::unwrap_used)]

mod host;

use std::time::Duration;

use host::{Host, policy};
use virtiofs_config::{CachePolicy, InodeFileHandles};
use virtiofs_contract::preflight::HandleOutcome;
use virtiofs_remedy::*;

const FILES: Cause = Cause::FdExhausted;

/// The changes as short words.
fn told(changes: &[Change]) -> Vec<String> {
    let word = |change: &Change| match change {
        Change::Ill { cause, .. } => format!("ill {cause:?}"),
        Change::Well { cause } => format!("well {cause:?}"),
        Change::Begun { rung, .. } => format!("begun {}", rung.as_str()),
        Change::Ordered { rung, .. } => format!("ordered {}", rung.as_str()),
        Change::InForce { rung, .. } => format!("in force {}", rung.as_str()),
        Change::Ended { rung, outcome, .. } => format!("{} {}", rung.as_str(), outcome.as_str()),
        Change::Undone { rung, .. } => format!("undone {}", rung.as_str()),
        Change::Failed { failure, .. } => format!("failed {:?}", failure.end),
    };
    changes.iter().map(word).collect()
}

fn failure(decision: &Decision) -> &Failure {
    let failed = decision.standings.iter().find_map(|standing| match &standing.course {
        Course::Failed(failure) => Some(failure),
        _ => None,
    });
    failed.unwrap_or_else(|| panic!("no failure in {:?}", decision.standings))
}

#[test]
fn below_the_threshold_nothing_is_said_or_done() {
    let mut host = Host::new(policy(10, 60, 4));
    for _ in 0..60 {
        host.events(FILES, 1);
        assert_eq!(told(&host.seconds(8).changes), [""; 0]);
    }
}

#[test]
fn an_engine_out_of_files_is_handed_over_to_file_handles_and_that_is_verified() {
    let mut host = Host::new(policy(10, 60, 4));
    host.events(FILES, 400);
    let mut changes = host.for_seconds(4);
    assert_eq!(host.vms[0].engine.inode_file_handles, InodeFileHandles::Prefer);
    changes.extend(host.for_seconds(200));
    assert_eq!(
        told(&changes),
        ["ill FdExhausted", "begun FileHandles", "in force FileHandles", "FileHandles Verified", "well FdExhausted"]
    );
    assert_eq!(host.history.outcomes(FILES, Outcome::Verified), 1);
    assert_eq!(host.history.amendments().len(), 1);
}

#[test]
fn report_counts_tells_and_touches_nothing() {
    let mut host = Host::new(Policy { mode: Mode::Report, ..policy(10, 60, 4) });
    host.events(FILES, 400);
    let decision = host.seconds(2);
    assert_eq!(told(&decision.changes), ["ill FdExhausted"]);
    assert_eq!((decision.standings[0].course.clone(), decision.standings[0].events), (Course::Reported, 400));
    host.vms[0].gone = true;
    host.for_seconds(100);
    assert_eq!((host.begun.len(), host.hand_overs, &host.vms[0].engine), (0, 0, &host.declared));
}

#[test]
fn each_rung_that_does_not_help_is_followed_by_the_next_and_the_last_by_what_to_do() {
    let mut host = Host::new(policy(10, 60, 10));
    (host.content, host.hard_limit) = (Content::Immutable, 20_000);
    let mut changes = Vec::new();
    for _ in 0..30 {
        host.events(FILES, 50);
        changes.extend(host.seconds(2).changes);
    }
    let expected = [
        "ill FdExhausted",
        "begun FileHandles",
        "in force FileHandles",
        "FileHandles Ineffective",
        "begun OpenFiles",
        "in force OpenFiles",
        "OpenFiles Ineffective",
        "begun OpenFiles",
        "begun LongerCaching",
        "in force LongerCaching",
        "LongerCaching Ineffective",
        "failed Ladder",
    ];
    assert_eq!(told(&changes), expected);
    let engine = &host.vms[0].engine;
    assert_eq!((engine.cache, engine.open_files), (CachePolicy::Always, None));
    // The limit beyond the hard one was refused by a trial; no guest noticed.
    assert_eq!(host.history.outcomes(FILES, Outcome::Rejected), 1);

    let decision = host.seconds(2);
    assert!(failure(&decision).message.contains("20000 is the hard limit"), "{:?}", failure(&decision));
    // It stays said for a while after it has become quiet, then it is over.
    assert_eq!(told(&host.for_seconds(290)), ["well FdExhausted"]);
    assert!(matches!(host.seconds(1).standings[0].course, Course::Failed(_)));
    host.for_seconds(20);
    assert_eq!(host.seconds(1).standings, []);
}

#[test]
fn where_file_handles_are_impossible_the_end_says_how_to_grant_them() {
    for (outcome, wanted, words) in [
        (
            HandleOutcome::NotPermitted,
            InodeFileHandles::Never,
            &["DAC_READ_SEARCH", "Kubernetes", "Podman", "systemd"][..],
        ),
        (HandleOutcome::NotPermitted, InodeFileHandles::Prefer, &["DAC_READ_SEARCH", "cap-add", "LimitNOFILE"]),
        (HandleOutcome::Unsupported, InodeFileHandles::Never, &["ext4, xfs", "nfs_export=on", "ulimit"]),
    ] {
        let mut host = Host::new(policy(10, 60, 10));
        (host.handles, host.hard_limit, host.declared.inode_file_handles) = (outcome, 2000, wanted);
        host.vms[0].engine = host.declared.clone();
        host.events(FILES, 400);
        host.for_seconds(10);
        let decision = host.seconds(1);
        let failure = failure(&decision);
        for word in words {
            assert!(failure.remedy.contains(word), "{word} in {failure:?}");
        }
        assert_eq!((failure.end, host.hand_overs), (End::Ladder, 0));
        assert_eq!(host.vms[0].engine, host.declared, "no guest is touched by what cannot help");
    }
}

#[test]
fn a_guest_that_holds_all_the_inodes_it_may_is_no_case_for_more_files() {
    let mut host = Host::new(policy(10, 60, 4));
    host.vms[0].full = true;
    host.events(FILES, 400);
    let decision = host.seconds(2);
    assert!(failure(&decision).remedy.contains("maxInodes"));
    assert_eq!(host.begun, []);
}

#[test]
fn a_source_that_is_gone_is_followed_as_soon_as_another_is_there() {
    let mut host = Host::new(policy(10, 60, 4));
    (host.vms[0].gone, host.root) = (true, Root::Bare);
    host.events(Cause::SourceGone, 1);
    let decision = host.seconds(2);
    assert_eq!(decision.standings[0].course, Course::AwaitsSource);
    host.root = Root::Missing;
    host.for_seconds(7200);
    assert_eq!(host.hand_overs, 0);
    host.root = Root::Present;
    host.events(Cause::SourceGone, 1);
    assert_eq!(
        told(&host.for_seconds(70)),
        ["ordered HandOver", "in force HandOver", "HandOver Verified", "well SourceGone"]
    );
    assert_eq!(host.hand_overs, 1);
}

#[test]
fn a_source_that_is_replaced_again_and_again_is_followed_as_often_as_the_budget_says() {
    let mut host = Host::new(policy(10, 10, 4));
    let mut last = None;
    for _ in 0..200 {
        host.vms[0].gone = true;
        last = Some(host.seconds(15));
    }
    assert_eq!(host.hand_overs, 4);
    assert_eq!(failure(&last.unwrap()).end, End::Budget);
    // With the hour the budget comes back.
    host.for_seconds(3600);
    assert_eq!(host.hand_overs, 5);
}

#[test]
fn stale_handles_are_found_anew_once_and_then_somebody_has_to_look() {
    let mut host = Host::new(policy(10, 60, 4));
    let mut changes = Vec::new();
    for _ in 0..20 {
        host.events(Cause::HandleStale, 20);
        changes.extend(host.seconds(2).changes);
    }
    assert_eq!(
        told(&changes),
        ["ill HandleStale", "ordered HandOver", "in force HandOver", "HandOver Ineffective", "failed Ladder"]
    );
    assert_eq!(host.hand_overs, 1);
}

#[test]
fn changes_by_others_are_told_and_nothing_of_ours_is_tried() {
    for (cause, content, events) in [
        (Cause::SourceReplaced, Content::Immutable, 1),
        (Cause::SourceRemoved, Content::Exclusive, 1),
        (Cause::SourceReplaced, Content::Shared, 10),
        (Cause::Fenced, Content::Shared, 0),
    ] {
        let mut host = Host::new(policy(10, 60, 4));
        host.content = content;
        host.events(cause, events.max(1) - 1);
        assert_eq!(host.seconds(2).standings, [], "{cause:?} {content:?}");
        host.events(cause, 1);
        let standings = host.seconds(2).standings;
        if events > 0 {
            assert_eq!((standings[0].cause, &standings[0].course), (cause, &Course::OutOfReach));
        } else {
            host.events(cause, 100_000);
            assert_eq!(host.seconds(2).standings, []);
        }
        assert_eq!((host.begun.len(), host.hand_overs), (0, 0));
        // What was promised not to happen is spoken of for an hour.
        host.for_seconds(600);
        let remembered = !host.seconds(2).standings.is_empty();
        assert_eq!(remembered, events > 0 && content != Content::Shared, "{cause:?} {content:?}");
    }
}

#[test]
fn a_source_that_hangs_is_told_while_it_does() {
    let mut host = Host::new(policy(10, 60, 4));
    host.vms[0].hung = true;
    assert_eq!(told(&host.for_seconds(600)), ["ill SourceHung"]);
    host.vms[0].hung = false;
    assert_eq!(told(&host.for_seconds(70)), ["well SourceHung"]);
    assert_eq!(host.begun, []);
}

#[test]
fn what_a_remedy_changed_is_taken_back_when_somebody_decides() {
    let heal = || {
        let mut host = Host::new(policy(10, 60, 4));
        host.events(FILES, 400);
        host.for_seconds(100);
        assert_eq!(host.vms[0].engine.inode_file_handles, InodeFileHandles::Prefer);
        host
    };
    // Another field: that is no word about this one.
    let mut host = heal();
    host.declared.xattr = true;
    assert_eq!(told(&host.seconds(2).changes), [""; 0]);
    assert_eq!(host.vms[0].engine.inode_file_handles, InodeFileHandles::Prefer);
    // The share says itself what the remedy says.
    let mut host = heal();
    host.declared.inode_file_handles = InodeFileHandles::Mandatory;
    assert_eq!(told(&host.seconds(2).changes), ["undone FileHandles"]);
    assert_eq!(host.vms[0].engine.inode_file_handles, InodeFileHandles::Mandatory);
    // Nothing is to be changed.
    let mut host = heal();
    host.policy.mode = Mode::Report;
    assert_eq!(told(&host.seconds(2).changes), ["undone FileHandles"]);
    assert_eq!(host.vms[0].engine, host.declared);
}

#[test]
fn longer_caching_is_given_up_with_the_promise_that_allows_it() {
    let mut host = Host::new(policy(10, 60, 4));
    host.content = Content::Immutable;
    host.declared.inode_file_handles = InodeFileHandles::Prefer;
    (host.declared.open_files, host.hard_limit) = (None, 2000);
    host.vms[0].engine = host.declared.clone();
    host.events(FILES, 400);
    host.for_seconds(100);
    assert_eq!(host.vms[0].engine.cache, CachePolicy::Always);
    host.content = Content::Shared;
    assert_eq!(told(&host.seconds(2).changes), ["undone LongerCaching"]);
    assert_eq!(host.vms[0].engine, host.declared);
}

#[test]
fn a_remedy_that_does_not_come_into_force_is_taken_back_and_tried_again_within_the_budget() {
    let mut host = Host::new(policy(10, 10, 2));
    host.obeys = false;
    let mut changes = Vec::new();
    for _ in 0..200 {
        host.events(FILES, 20);
        changes.extend(host.seconds(2).changes);
    }
    assert_eq!(host.history.amendments(), []);
    assert_eq!(host.history.outcomes(FILES, Outcome::NotApplied), 2);
    assert_eq!(told(&changes).last().unwrap(), "failed Budget");
}

#[test]
fn a_trial_that_nobody_answers_ends() {
    let mut host = Host::new(policy(10, 10, 1));
    host.answers = false;
    host.events(FILES, 400);
    assert_eq!(
        told(&host.for_seconds(70)),
        ["ill FdExhausted", "begun FileHandles", "FileHandles NotApplied", "well FdExhausted"]
    );
}

#[test]
fn counts_of_a_new_broker_are_new_and_those_of_the_old_one_do_not_count_twice() {
    let mut host = Host::new(policy(10, 60, 4));
    host.events(FILES, 9);
    assert_eq!(told(&host.seconds(2).changes), [""; 0]);
    host.for_seconds(100);
    // It has begun from nought, and is already further than the old one was.
    (host.broker, host.counts) = (2, [(FILES, 9)].into());
    assert_eq!(told(&host.seconds(2).changes), [""; 0]);
    host.events(FILES, 1);
    assert_eq!(told(&host.seconds(2).changes)[0], "ill FdExhausted");
}

#[test]
fn where_no_vm_is_left_nothing_is_done_and_what_is_on_trial_ends() {
    let mut host = Host::new(policy(10, 60, 4));
    host.answers = false;
    host.events(FILES, 400);
    host.seconds(2);
    let vms = std::mem::take(&mut host.vms);
    assert_eq!(told(&host.seconds(2).changes), ["FileHandles Abandoned"]);
    host.events(FILES, 400);
    assert_eq!(told(&host.seconds(2).changes), [""; 0]);
    host.vms = vms;
    assert_eq!(told(&host.after(Duration::from_secs(2)).changes), ["begun FileHandles"]);
}
