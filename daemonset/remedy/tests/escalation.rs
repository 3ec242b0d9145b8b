//! Escalation of each cause, from the first event to recovery or failure.

#![allow(clippy::unwrap_used)]

mod host;

use std::time::Duration;

use host::{Host, policy};
use virtiofs_config::{CachePolicy, InodeFileHandles};
use virtiofs_contract::preflight::HandleOutcome;
use virtiofs_remedy::*;

const FILES: Cause = Cause::FdExhausted;

/// Transitions in short form.
fn describe(transitions: &[Transition]) -> Vec<String> {
    let word = |change: &Transition| match change {
        Transition::Stale { cause, .. } => format!("stale {cause:?}"),
        Transition::Recovered { cause } => format!("recovered {cause:?}"),
        Transition::Started { remedy, .. } => format!("started {}", remedy.as_str()),
        Transition::Applying { remedy, .. } => format!("applying {}", remedy.as_str()),
        Transition::Applied { remedy, .. } => format!("applied {}", remedy.as_str()),
        Transition::Ended { remedy, outcome, .. } => format!("{} {}", remedy.as_str(), outcome.as_str()),
        Transition::Reverted { remedy, .. } => format!("reverted {}", remedy.as_str()),
        Transition::Failed { failure, .. } => format!("failed {:?}", failure.exhausted),
    };
    transitions.iter().map(word).collect()
}

fn failure(decision: &Decision) -> &Failure {
    let failed = decision.statuses.iter().find_map(|status| match &status.handling {
        Handling::Failed(failure) => Some(failure),
        _ => None,
    });
    failed.unwrap_or_else(|| panic!("no failure in {:?}", decision.statuses))
}

#[test]
fn below_the_threshold_nothing_happens() {
    let mut host = Host::new(policy(10, 60, 4));
    for _ in 0..60 {
        host.events(FILES, 1);
        assert_eq!(describe(&host.seconds(8).transitions), [""; 0]);
    }
}

#[test]
fn file_handles_are_applied_and_verified() {
    let mut host = Host::new(policy(10, 60, 4));
    host.events(FILES, 400);
    let mut changes = host.for_seconds(4);
    assert_eq!(host.vms[0].engine.inode_file_handles, InodeFileHandles::Prefer);
    changes.extend(host.for_seconds(200));
    assert_eq!(
        describe(&changes),
        [
            "stale FdExhausted",
            "started FileHandles",
            "applied FileHandles",
            "FileHandles Verified",
            "recovered FdExhausted"
        ]
    );
    assert_eq!(host.history.outcomes(FILES, Outcome::Verified), 1);
    assert_eq!(host.history.amendments().len(), 1);
}

#[test]
fn policy_report_changes_nothing() {
    let mut host = Host::new(Policy { mode: Mode::Report, ..policy(10, 60, 4) });
    host.events(FILES, 400);
    let decision = host.seconds(2);
    assert_eq!(describe(&decision.transitions), ["stale FdExhausted"]);
    assert_eq!((decision.statuses[0].handling.clone(), decision.statuses[0].events), (Handling::Reported, 400));
    host.vms[0].gone = true;
    host.for_seconds(100);
    assert_eq!((host.started.len(), host.hand_overs, &host.vms[0].engine), (0, 0, &host.declared));
}

#[test]
fn ineffective_remedies_escalate() {
    let mut host = Host::new(policy(10, 60, 10));
    (host.content, host.hard_limit) = (Content::Immutable, 20_000);
    let mut changes = Vec::new();
    for _ in 0..30 {
        host.events(FILES, 50);
        changes.extend(host.seconds(2).transitions);
    }
    let expected = [
        "stale FdExhausted",
        "started FileHandles",
        "applied FileHandles",
        "FileHandles Ineffective",
        "started OpenFiles",
        "applied OpenFiles",
        "OpenFiles Ineffective",
        "started OpenFiles",
        "started LongerCaching",
        "applied LongerCaching",
        "LongerCaching Ineffective",
        "failed Remedies",
    ];
    assert_eq!(describe(&changes), expected);
    let engine = &host.vms[0].engine;
    assert_eq!((engine.cache, engine.open_files), (CachePolicy::Always, None));
    // The limit beyond the hard one was rejected by a check; no guest noticed.
    assert_eq!(host.history.outcomes(FILES, Outcome::Rejected), 1);

    let decision = host.seconds(2);
    assert!(failure(&decision).message.contains("20000 is the hard limit"), "{:?}", failure(&decision));
    // The failure is reported for a while after the last event.
    assert_eq!(describe(&host.for_seconds(290)), ["recovered FdExhausted"]);
    assert!(matches!(host.seconds(1).statuses[0].handling, Handling::Failed(_)));
    host.for_seconds(20);
    assert_eq!(host.seconds(1).statuses, []);
}

#[test]
fn impossible_file_handles_name_the_requirement() {
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
        assert_eq!((failure.exhausted, host.hand_overs), (Exhausted::Remedies, 0));
        assert_eq!(host.vms[0].engine, host.declared, "no guest is touched by what cannot help");
    }
}

#[test]
fn full_inodes_have_no_remedy() {
    let mut host = Host::new(policy(10, 60, 4));
    host.vms[0].full = true;
    host.events(FILES, 400);
    let decision = host.seconds(2);
    assert!(failure(&decision).remedy.contains("maxInodes"));
    assert_eq!(host.started, []);
}

#[test]
fn a_missing_source_is_followed_when_it_returns() {
    let mut host = Host::new(policy(10, 60, 4));
    (host.vms[0].gone, host.root) = (true, Root::Bare);
    host.events(Cause::SourceGone, 1);
    let decision = host.seconds(2);
    assert_eq!(decision.statuses[0].handling, Handling::AwaitsSource(Root::Bare));
    host.root = Root::Missing;
    host.for_seconds(7200);
    assert_eq!(host.hand_overs, 0);
    host.root = Root::Present;
    host.events(Cause::SourceGone, 1);
    assert_eq!(
        describe(&host.for_seconds(70)),
        ["applying HandOver", "applied HandOver", "HandOver Verified", "recovered SourceGone"]
    );
    assert_eq!(host.hand_overs, 1);
}

#[test]
fn repeated_replacements_exhaust_the_budget() {
    let mut host = Host::new(policy(10, 10, 4));
    let mut last = None;
    for _ in 0..200 {
        host.vms[0].gone = true;
        last = Some(host.seconds(15));
    }
    assert_eq!(host.hand_overs, 4);
    assert_eq!(failure(&last.unwrap()).exhausted, Exhausted::Budget);
    // The budget is available again after an hour.
    host.for_seconds(3600);
    assert_eq!(host.hand_overs, 5);
}

#[test]
fn stale_handles_are_handed_over_once() {
    let mut host = Host::new(policy(10, 60, 4));
    let mut changes = Vec::new();
    for _ in 0..20 {
        host.events(Cause::HandleStale, 20);
        changes.extend(host.seconds(2).transitions);
    }
    assert_eq!(
        describe(&changes),
        ["stale HandleStale", "applying HandOver", "applied HandOver", "HandOver Ineffective", "failed Remedies"]
    );
    assert_eq!(host.hand_overs, 1);
}

#[test]
fn changes_of_the_source_are_only_reported() {
    for (cause, content, events) in [
        (Cause::SourceReplaced, Content::Immutable, 1),
        (Cause::SourceRemoved, Content::Exclusive, 1),
        (Cause::SourceReplaced, Content::Shared, 0),
        (Cause::SourceRemoved, Content::Shared, 0),
        (Cause::Fenced, Content::Shared, 0),
    ] {
        let mut host = Host::new(policy(10, 60, 4));
        host.content = content;
        host.events(cause, events.max(1) - 1);
        assert_eq!(host.seconds(2).statuses, [], "{cause:?} {content:?}");
        host.events(cause, 1);
        let statuses = host.seconds(2).statuses;
        if events > 0 {
            assert_eq!((statuses[0].cause, &statuses[0].handling), (cause, &Handling::NoRemedy));
        } else {
            host.events(cause, 100_000);
            assert_eq!(host.seconds(2).statuses, []);
        }
        assert_eq!((host.started.len(), host.hand_overs), (0, 0));
        // A violation is reported for an hour.
        host.for_seconds(600);
        let remembered = !host.seconds(2).statuses.is_empty();
        assert_eq!(remembered, events > 0, "{cause:?} {content:?}");
    }
}

#[test]
fn a_hanging_source_is_reported() {
    let mut host = Host::new(policy(10, 60, 4));
    host.vms[0].hung = true;
    assert_eq!(describe(&host.for_seconds(600)), ["stale SourceHung"]);
    host.vms[0].hung = false;
    assert_eq!(describe(&host.for_seconds(70)), ["recovered SourceHung"]);
    assert_eq!(host.started, []);
}

#[test]
fn a_declared_change_reverts_the_remedy() {
    let heal = || {
        let mut host = Host::new(policy(10, 60, 4));
        host.events(FILES, 400);
        host.for_seconds(100);
        assert_eq!(host.vms[0].engine.inode_file_handles, InodeFileHandles::Prefer);
        host
    };
    // Another field does not affect the remedy.
    let mut host = heal();
    host.declared.xattr = true;
    assert_eq!(describe(&host.seconds(2).transitions), [""; 0]);
    assert_eq!(host.vms[0].engine.inode_file_handles, InodeFileHandles::Prefer);
    // The share declares what the remedy set.
    let mut host = heal();
    host.declared.inode_file_handles = InodeFileHandles::Mandatory;
    assert_eq!(describe(&host.seconds(2).transitions), ["reverted FileHandles"]);
    assert_eq!(host.vms[0].engine.inode_file_handles, InodeFileHandles::Mandatory);
    // The policy changes to report.
    let mut host = heal();
    host.policy.mode = Mode::Report;
    assert_eq!(describe(&host.seconds(2).transitions), ["reverted FileHandles"]);
    assert_eq!(host.vms[0].engine, host.declared);
}

#[test]
fn longer_caching_ends_with_immutable_content() {
    let mut host = Host::new(policy(10, 60, 4));
    host.content = Content::Immutable;
    host.declared.inode_file_handles = InodeFileHandles::Prefer;
    (host.declared.open_files, host.hard_limit) = (None, 2000);
    host.vms[0].engine = host.declared.clone();
    host.events(FILES, 400);
    host.for_seconds(100);
    assert_eq!(host.vms[0].engine.cache, CachePolicy::Always);
    host.content = Content::Shared;
    assert_eq!(describe(&host.seconds(2).transitions), ["reverted LongerCaching"]);
    assert_eq!(host.vms[0].engine, host.declared);
}

#[test]
fn a_remedy_that_is_not_applied_is_reverted() {
    let mut host = Host::new(policy(10, 10, 2));
    host.obeys = false;
    let mut changes = Vec::new();
    for _ in 0..200 {
        host.events(FILES, 20);
        changes.extend(host.seconds(2).transitions);
    }
    assert_eq!(host.history.amendments(), []);
    assert_eq!(host.history.outcomes(FILES, Outcome::NotApplied), 2);
    assert_eq!(describe(&changes).last().unwrap(), "failed Budget");
}

#[test]
fn a_check_without_result_ends() {
    let mut host = Host::new(policy(10, 10, 1));
    host.answers = false;
    host.events(FILES, 400);
    assert_eq!(
        describe(&host.for_seconds(70)),
        ["stale FdExhausted", "started FileHandles", "FileHandles NotApplied", "recovered FdExhausted"]
    );
}

#[test]
fn counts_restart_with_a_new_broker() {
    let mut host = Host::new(policy(10, 60, 4));
    host.events(FILES, 9);
    assert_eq!(describe(&host.seconds(2).transitions), [""; 0]);
    host.for_seconds(100);
    // It started from zero, and its count exceeds the old one already.
    (host.broker, host.counts) = (2, [(FILES, 9)].into());
    assert_eq!(describe(&host.seconds(2).transitions), [""; 0]);
    host.events(FILES, 1);
    assert_eq!(describe(&host.seconds(2).transitions)[0], "stale FdExhausted");
}

#[test]
fn without_vms_a_remedy_is_abandoned() {
    let mut host = Host::new(policy(10, 60, 4));
    host.answers = false;
    host.events(FILES, 400);
    host.seconds(2);
    let vms = std::mem::take(&mut host.vms);
    assert_eq!(describe(&host.seconds(2).transitions), ["FileHandles Abandoned"]);
    host.events(FILES, 400);
    assert_eq!(describe(&host.seconds(2).transitions), [""; 0]);
    host.vms = vms;
    assert_eq!(describe(&host.after(Duration::from_secs(2)).transitions), ["started FileHandles"]);
}
