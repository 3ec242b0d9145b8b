//! Table tests of the status of an export.

use serde_json::json;
use virtiofs_client::fixtures::listening;
use virtiofs_contract::preflight::{Finding, Reason};

use super::super::exports::tests::export;
use super::*;
use crate::fixtures::{site, source};
use crate::model::endpoint::own_endpoint;

/// The endpoint that an export's share declares.
fn endpoint(export: &VirtiofsExport) -> EndpointStatus {
    let share = share_of(export).unwrap();
    let source = source(&share.source.to_string(), 2);
    listening(own_endpoint(&site().runtime_dir, &share, &source))
}

fn report(state: ShareState, reasons: &[&str]) -> ShareReport {
    let reason = |name: &&str| serde_json::from_value(json!(name)).unwrap();
    let notices = reasons.iter().map(|name| Notice::new(reason(name), "found", "mend it")).collect();
    ShareReport { name: "a".into(), state, notices, source: "/srv/a".into(), socket: "/run/a.sock".into() }
}

fn known<'a>(report: Option<&'a ShareReport>, endpoints: &'a [EndpointStatus]) -> Known<'a> {
    Known {
        report,
        staleness: None,
        amended: None,
        endpoints,
        recent_recoveries: 0,
        changed_at: Instant::now(),
        user: |_, session| session.id.clone(),
    }
}

fn status_of(
    export: &VirtiofsExport,
    report: Option<&ShareReport>,
    endpoints: &[EndpointStatus],
    waited: Duration,
) -> Option<VirtiofsExportStatus> {
    status_after(export, &known(report, endpoints), waited)
}

fn status_after(export: &VirtiofsExport, known: &Known<'_>, waited: Duration) -> Option<VirtiofsExportStatus> {
    export_status(export, known, (known.changed_at + waited, &Time(Timestamp::UNIX_EPOCH)))
}

/// Revision, then status and reason of Ready and Degraded.
fn words(status: &VirtiofsExportStatus) -> String {
    let mut words = status.observed_revision.clone().unwrap_or("-".into());
    for it in &status.conditions {
        words += &format!(" {}={}:{}", it.type_, it.status, it.reason);
    }
    words
}

#[test]
fn the_status_of_a_serving_export() {
    use ShareState::{Degraded, NotReady, Pending, Ready};
    let asked = export("a", json!({}));
    let served = || vec![endpoint(&asked)];
    let other = || vec![endpoint(&export("a", json!({"engine": {"maxInodes": 5000}})))];
    let (soon, late) = (Duration::ZERO, RESULT_AFTER + Duration::from_secs(1));
    for (what, report, endpoints, waited, expected) in [
        ("nothing known", None, vec![], soon, "- Ready=False:Pending Degraded=False:AsExpected"),
        ("served", Some(report(Ready, &[])), served(), soon, "r1 Ready=True:Serving Degraded=False:AsExpected"),
        (
            "served with a complaint",
            Some(report(Degraded, &["FileHandlesUnavailable"])),
            served(),
            soon,
            "r1 Ready=True:Serving Degraded=True:FileHandlesUnavailable",
        ),
        (
            "a remedy that failed is what matters",
            Some(report(Degraded, &["RemountRequired", "RemedyFailed"])),
            served(),
            soon,
            "r1 Ready=True:Serving Degraded=True:RemedyFailed",
        ),
        ("not tried yet", Some(report(Pending, &[])), other(), late, "- Ready=False:Pending Degraded=False:AsExpected"),
        (
            "just refused, or still refused from before",
            Some(report(Degraded, &["CapabilityMissing"])),
            other(),
            soon,
            "- Ready=False:CapabilityMissing Degraded=True:CapabilityMissing",
        ),
        (
            "refused, and that is the answer",
            Some(report(Degraded, &["CapabilityMissing"])),
            other(),
            late,
            "r1 Ready=False:CapabilityMissing Degraded=True:CapabilityMissing",
        ),
        (
            "the source is missing",
            Some(report(NotReady, &["SourceMissing"])),
            vec![],
            late,
            "r1 Ready=False:SourceMissing Degraded=True:SourceMissing",
        ),
    ] {
        let status = status_of(&asked, report.as_ref(), &endpoints, waited).unwrap();
        assert_eq!(words(&status), expected, "{what}");
        assert_eq!((status.observed_generation, status.sessions), (Some(3), Some(0)), "{what}");
    }
}

#[test]
fn a_share_with_an_active_remedy_is_served() {
    let asked = export("a", json!({}));
    let declared = share_of(&asked).unwrap().engine;
    let engine = share_of(&export("a", json!({"engine": {"openFiles": 4096}}))).unwrap().engine;
    let mut remedied = endpoint(&asked);
    remedied.endpoint.engine = engine.clone();
    let (report, endpoints) = (report(ShareState::Degraded, &["RemedyActive"]), [remedied]);
    let amended = Amended { declared, engine };
    let known = Known { amended: Some(&amended), ..known(Some(&report), &endpoints) };
    let served = "r1 Ready=True:Serving Degraded=True:RemedyActive";
    assert_eq!(words(&status_after(&asked, &known, Duration::ZERO).unwrap()), served);
    // A remedy for the earlier revision does not count for the present one.
    let next = export("a", json!({"revision": "r2", "engine": {"maxInodes": 5000}}));
    let waits = "- Ready=False:RemedyActive Degraded=True:RemedyActive";
    assert_eq!(words(&status_after(&next, &known, Duration::ZERO).unwrap()), waits);
}

#[test]
fn the_last_remedy_is_kept() {
    let mut asked = export("a", json!({}));
    let tried = |outcome: Option<&str>| ShareStaleness {
        last_remedy: Some(RemedyReport {
            cause: virtiofs_contract::staleness::Cause::FdExhausted,
            remedy: "FileHandles".into(),
            started: 1_700_000_000_999,
            applied: None,
            ended: None,
            outcome: outcome.map(str::to_owned),
        }),
        ..ShareStaleness::default()
    };
    for (staleness, outcome) in
        [(Some(tried(None)), "Verifying"), (Some(tried(Some("Verified"))), "Verified"), (None, "Verified")]
    {
        let known = Known { staleness: staleness.as_ref(), ..known(None, &[]) };
        let status = status_after(&asked, &known, Duration::ZERO).unwrap();
        let last = json!(status.last_remedy);
        let expected = json!({"startTime": "2023-11-14T22:13:20Z", "cause": "FdExhausted", "action": "FileHandles",
                              "outcome": outcome});
        assert_eq!(last, expected);
        // Read again, it is the same, and nothing is written.
        assert_eq!(status.last_remedy, serde_json::from_value(last).unwrap());
        asked.status = Some(status);
    }
}

#[test]
fn an_export_is_drained_once_no_vm_can_connect() {
    let drains = export("a", json!({"mode": "Drain"}));
    let mut listening = endpoint(&drains);
    assert_eq!(status_of(&drains, None, &[listening.clone()], Duration::ZERO), None);
    listening.listening = false;
    let status = status_of(&drains, None, &[listening], Duration::ZERO).unwrap();
    assert_eq!((words(&status).as_str(), status.sessions), ("r1 Ready=False:Drained", Some(0)));
}

#[test]
fn what_makes_no_sense_is_refused_by_field() {
    let odd = export("a", json!({"content": "Immutable", "access": "ReadWrite"}));
    let status = status_of(&odd, None, &[], Duration::ZERO).unwrap();
    assert_eq!(words(&status), "r1 Ready=False:InvalidSpec");
    assert!(status.conditions[0].message.contains("spec.access"), "{:?}", status.conditions);
}

#[test]
fn transition_times_are_kept() {
    let mut asked = export("a", json!({}));
    let mut first =
        status_of(&asked, Some(&report(ShareState::Ready, &[])), &[endpoint(&asked)], Duration::ZERO).unwrap();
    let since = Time(Timestamp::from_second(7).unwrap());
    first.conditions[0].last_transition_time = since.clone();
    asked.status = Some(first);
    asked.spec.revision = "r2".into();
    let now = status_of(&asked, None, &[], Duration::ZERO).unwrap();
    assert_eq!(words(&now), "r1 Ready=False:Pending Degraded=False:AsExpected");
    assert_ne!(now.conditions[0].last_transition_time, since, "it has changed");
    asked.spec.revision = "r1".into();
    let now = status_of(&asked, Some(&report(ShareState::Ready, &[])), &[endpoint(&asked)], Duration::ZERO).unwrap();
    assert_eq!(now.conditions[0].last_transition_time, since, "it holds since then");
}

#[test]
fn a_preflight_is_truncated() {
    let asked = export("a", json!({}));
    let mut status = endpoint(&asked);
    let finding = Finding { reason: Reason::RemountRequired, message: "x".repeat(5000), remedy: String::new() };
    status.preflight.findings = vec![finding; 40];
    let said = status_of(&asked, None, &[status], Duration::ZERO).unwrap().preflight.unwrap();
    assert_eq!((said.findings.len(), said.findings[0].message.len()), (FINDINGS_MAX, MESSAGE_MAX));
}
