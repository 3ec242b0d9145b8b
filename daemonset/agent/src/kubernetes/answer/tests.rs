//! What is said of an export, by tables.

use serde_json::json;
use virtiofs_contract::preflight::{Finding, Reason};

use super::super::exports::tests::export;
use super::*;

/// The endpoint as an export's share asks for it.
fn endpoint(export: &VirtiofsExport) -> EndpointStatus {
    let share = share_of(export).unwrap();
    let endpoint = json!({
        "name": share.name,
        "source": share.source,
        "socket": {"path": "/run/a.sock", "mode": share.socket.mode},
        "engine": share.engine,
        "exclusive": share.exclusive,
    });
    serde_json::from_value(json!({
        "endpoint": endpoint,
        "listening": true,
        "preflight": {
            "sandbox": "Chroot", "userNamespace": false, "capabilities": [], "inodeFileHandles": "Prefer",
            "mounts": [], "openFiles": 1024, "guestOpenFiles": 1000, "findings": [],
        },
        "sessions": [],
        "rejectedConnections": 0,
        "rejectedExclusive": 0,
        "sessionsStarted": 0,
        "enginesStarted": 0,
        "totals": virtiofs_contract::counters::Totals::default(),
    }))
    .unwrap()
}

fn report(state: ShareState, reasons: &[&str]) -> ShareReport {
    let notices = reasons.iter().map(|reason| Notice::new(reason, "found", "mend it")).collect();
    ShareReport { name: "a".into(), state, notices, source: "/srv/a".into(), socket: "/run/a.sock".into() }
}

fn known<'a>(report: Option<&'a ShareReport>, endpoints: &'a [EndpointStatus]) -> Known<'a> {
    Known {
        report,
        staleness: None,
        amended: None,
        endpoints,
        recent_recoveries: 0,
        asked_since: Instant::now(),
        user: |_, session| session.id.clone(),
    }
}

fn said(
    export: &VirtiofsExport,
    report: Option<&ShareReport>,
    endpoints: &[EndpointStatus],
    waited: Duration,
) -> Option<VirtiofsExportStatus> {
    told(export, &known(report, endpoints), waited)
}

fn told(export: &VirtiofsExport, known: &Known<'_>, waited: Duration) -> Option<VirtiofsExportStatus> {
    answer(export, known, (known.asked_since + waited, &Time(Timestamp::UNIX_EPOCH)))
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
fn what_is_said_of_an_export_that_is_to_serve() {
    use ShareState::{Degraded, NotReady, Pending, Ready};
    let asked = export("a", json!({}));
    let served = || vec![endpoint(&asked)];
    let other = || vec![endpoint(&export("a", json!({"content": "Immutable"})))];
    let (soon, late) = (Duration::ZERO, TRIED_AFTER + Duration::from_secs(1));
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
        let status = said(&asked, report.as_ref(), &endpoints, waited).unwrap();
        assert_eq!(words(&status), expected, "{what}");
        assert_eq!((status.observed_generation, status.sessions), (Some(3), Some(0)), "{what}");
    }
}

#[test]
fn a_share_that_is_served_with_a_remedy_is_served() {
    let asked = export("a", json!({}));
    let declared = share_of(&asked).unwrap().engine;
    let engine = share_of(&export("a", json!({"engine": {"openFiles": 4096}}))).unwrap().engine;
    let mut remedied = endpoint(&asked);
    remedied.endpoint.engine = engine.clone();
    let (report, endpoints) = (report(ShareState::Degraded, &["RemedyInForce"]), [remedied]);
    let amended = Amended { declared, engine };
    let known = Known { amended: Some(&amended), ..known(Some(&report), &endpoints) };
    let served = "r1 Ready=True:Serving Degraded=True:RemedyInForce";
    assert_eq!(words(&told(&asked, &known, Duration::ZERO).unwrap()), served);
    // That a remedy was for what was asked before says nothing of what is asked now.
    let next = export("a", json!({"revision": "r2", "content": "Immutable"}));
    let waits = "- Ready=False:RemedyInForce Degraded=True:RemedyInForce";
    assert_eq!(words(&told(&next, &known, Duration::ZERO).unwrap()), waits);
}

#[test]
fn the_last_remedy_is_told_and_not_forgotten() {
    let mut asked = export("a", json!({}));
    let tried = |outcome: Option<&str>| ShareStaleness {
        last_remedy: Some(Tried {
            cause: virtiofs_contract::staleness::Cause::FdExhausted,
            remedy: "FileHandles".into(),
            begun: 1_700_000_000_999,
            in_force: None,
            ended: None,
            outcome: outcome.map(str::to_owned),
        }),
        ..ShareStaleness::default()
    };
    for (staleness, outcome) in
        [(Some(tried(None)), "Verifying"), (Some(tried(Some("Verified"))), "Verified"), (None, "Verified")]
    {
        let known = Known { staleness: staleness.as_ref(), ..known(None, &[]) };
        let status = told(&asked, &known, Duration::ZERO).unwrap();
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
fn a_drained_export_is_one_that_nobody_can_connect_to_any_more() {
    let drains = export("a", json!({"mode": "Drain"}));
    let mut listening = endpoint(&drains);
    assert_eq!(said(&drains, None, &[listening.clone()], Duration::ZERO), None);
    listening.listening = false;
    let status = said(&drains, None, &[listening], Duration::ZERO).unwrap();
    assert_eq!((words(&status).as_str(), status.sessions), ("r1 Ready=False:Drained", Some(0)));
}

#[test]
fn what_makes_no_sense_is_refused_by_field() {
    let odd = export("a", json!({"content": "Immutable", "access": "ReadWrite"}));
    let status = said(&odd, None, &[], Duration::ZERO).unwrap();
    assert_eq!(words(&status), "r1 Ready=False:InvalidSpec");
    assert!(status.conditions[0].message.contains("spec.access"), "{:?}", status.conditions);
}

#[test]
fn what_was_said_before_is_kept_where_it_still_holds() {
    let mut asked = export("a", json!({}));
    let mut first = said(&asked, Some(&report(ShareState::Ready, &[])), &[endpoint(&asked)], Duration::ZERO).unwrap();
    let since = Time(Timestamp::from_second(7).unwrap());
    first.conditions[0].last_transition_time = since.clone();
    asked.status = Some(first);
    asked.spec.revision = "r2".into();
    let now = said(&asked, None, &[], Duration::ZERO).unwrap();
    assert_eq!(words(&now), "r1 Ready=False:Pending Degraded=False:AsExpected");
    assert_ne!(now.conditions[0].last_transition_time, since, "it has changed");
    asked.spec.revision = "r1".into();
    let now = said(&asked, Some(&report(ShareState::Ready, &[])), &[endpoint(&asked)], Duration::ZERO).unwrap();
    assert_eq!(now.conditions[0].last_transition_time, since, "it holds since then");
}

#[test]
fn a_preflight_is_repeated_within_bounds() {
    let asked = export("a", json!({}));
    let mut status = endpoint(&asked);
    let finding = Finding { reason: Reason::RemountRequired, message: "x".repeat(5000), remedy: String::new() };
    status.preflight.findings = vec![finding; 40];
    let said = said(&asked, None, &[status], Duration::ZERO).unwrap().preflight.unwrap();
    assert_eq!((said.findings.len(), said.findings[0].message.len()), (FINDINGS_MAX, MESSAGE_MAX));
}
