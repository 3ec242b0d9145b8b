//! What is said of an export: a pure function of what was asked, how the share does and what the broker says.

use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use virtiofs_contract::control::{EndpointStatus, SessionStatus};
use virtiofs_contract::counters::Totals;
use virtiofs_contract::preflight::Preflight;
use virtiofs_crds::export::share_of;
use virtiofs_crds::v1alpha1::conditions::{
    AS_DECLARED, DEGRADED, DRAINED, DRAINING, INVALID, PENDING, READY, REMEDY_FAILED, SERVING,
};
use virtiofs_crds::v1alpha1::{
    ExportFinding, ExportPreflight, FINDINGS_MAX, LastRemedy, MESSAGE_MAX, RecoveryCounts, StaleCount, USERS_MAX,
};
use virtiofs_crds::{ExportMode, Share, VirtiofsExport, VirtiofsExportStatus};

use crate::notice::Notice;
use crate::offer::share_of as share_of_endpoint;
use crate::report::{ShareReport, ShareState};
use crate::staleness::{Amended, LastRemedy as Tried, ShareStaleness};

/// After this time without the asked revision in force, what stands in its way is the answer. It is tried within
/// milliseconds; this is for a host that is busy.
const TRIED_AFTER: Duration = Duration::from_secs(10);
/// What is said of a remedy that has not ended.
const ON_TRIAL: &str = "OnTrial";

/// What is known of an export's share.
#[derive(Clone, Debug)]
pub(crate) struct Known<'a> {
    /// How the share does; none: nothing is known of it.
    pub(crate) report: Option<&'a ShareReport>,
    /// How it stands with staleness.
    pub(crate) staleness: Option<&'a ShareStaleness>,
    /// What its engines run with, where remedies have changed that.
    pub(crate) amended: Option<&'a Amended>,
    /// All that the broker has.
    pub(crate) endpoints: &'a [EndpointStatus],
    /// What it has counted for the share.
    pub(crate) totals: Option<&'a Totals>,
    /// Recoveries among that.
    pub(crate) recoveries: RecoveryCounts,
    /// Since when this has been asked.
    pub(crate) asked_since: Instant,
    /// Who a session's VM is.
    pub(crate) user: fn(&SessionStatus) -> String,
}

/// What is said of an export now; none: it cannot be told yet, and what was said before stands.
pub(crate) fn answer(
    export: &VirtiofsExport,
    known: &Known<'_>,
    now: (Instant, &Time),
) -> Option<VirtiofsExportStatus> {
    let own: Vec<&EndpointStatus> =
        known.endpoints.iter().filter(|it| belongs_to(&it.endpoint.name, &export.spec.share)).collect();
    let sessions: Vec<&SessionStatus> = own.iter().flat_map(|it| &it.sessions).collect();
    let said = match export.spec.mode {
        ExportMode::Serve => serve(export, known, &own, now.0),
        // Before it has stopped listening, nothing can be said for good: a VM might still come.
        ExportMode::Drain if own.iter().any(|it| it.listening) => return None,
        ExportMode::Drain => drain(export, &sessions),
    };
    let before = export.status.as_ref();
    Some(VirtiofsExportStatus {
        observed_generation: export.metadata.generation,
        observed_revision: said.revision.or_else(|| before.and_then(|it| it.observed_revision.clone())),
        sessions: Some(i64::try_from(sessions.len()).unwrap_or(i64::MAX)),
        users: sessions.iter().take(USERS_MAX).map(|session| cut(&(known.user)(session), 253)).collect(),
        preflight: own.first().map(|it| preflight(&it.preflight)),
        stale: known.totals.map(|totals| total(totals.stale.iter().map(|it| it.events).sum())),
        staleness: known.totals.map(staleness).unwrap_or_default(),
        recoveries: Some(known.recoveries),
        // The history lies with the broker; of what it does not know any more, the last word stands.
        last_remedy: known
            .staleness
            .and_then(|it| it.last_remedy.as_ref())
            .map(last_remedy)
            .or_else(|| before.and_then(|it| it.last_remedy.clone())),
        agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        conditions: conditions(export, said.conditions, now.1),
    })
}

/// What is said of an export beside its numbers.
struct Said {
    /// The revision that was taken up, or tried in vain.
    revision: Option<String>,
    conditions: Vec<(&'static str, bool, String, String)>,
}

fn serve(export: &VirtiofsExport, known: &Known<'_>, own: &[&EndpointStatus], now: Instant) -> Said {
    let share = match share_of(export) {
        Ok(share) => share,
        Err(refusals) => {
            let message = refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            let ready = (READY, false, INVALID.to_owned(), message);
            return Said { revision: Some(export.spec.revision.clone()), conditions: vec![ready] };
        }
    };
    let in_force = own.iter().any(|it| is_in_force(it, &share, known.amended));
    let state = known.report.map_or(ShareState::Pending, |report| report.state);
    let notices = known.report.map(|report| report.notices.as_slice()).unwrap_or_default();
    let first = notices.iter().find(|it| it.reason == REMEDY_FAILED).or(notices.first());
    let tried = !matches!(state, ShareState::Pending) && now.saturating_duration_since(known.asked_since) > TRIED_AFTER;
    let ready = match (in_force && state.serves(), first) {
        (true, _) => (READY, true, SERVING.to_owned(), String::new()),
        (false, Some(notice)) => (READY, false, notice.reason.clone(), text(notice)),
        (false, None) => (READY, false, PENDING.to_owned(), String::new()),
    };
    let degraded = match first {
        Some(notice) => (DEGRADED, true, notice.reason.clone(), text(notice)),
        None => (DEGRADED, false, AS_DECLARED.to_owned(), String::new()),
    };
    let revision = (in_force || (tried && first.is_some())).then(|| export.spec.revision.clone());
    Said { revision, conditions: vec![ready, degraded] }
}

fn drain(export: &VirtiofsExport, sessions: &[&SessionStatus]) -> Said {
    let reason = if sessions.is_empty() { DRAINED } else { DRAINING };
    let ready = (READY, false, reason.to_owned(), String::new());
    Said { revision: Some(export.spec.revision.clone()), conditions: vec![ready] }
}

/// Does the broker serve this as the share declares it, or as a remedy has amended what it declares?
fn is_in_force(status: &EndpointStatus, share: &Share, amended: Option<&Amended>) -> bool {
    let endpoint = &status.endpoint;
    let engine = amended.filter(|it| it.declared == share.engine).map_or(&share.engine, |it| &it.engine);
    let socket = (endpoint.socket.owner, endpoint.socket.group, endpoint.socket.mode);
    status.listening
        && endpoint.name == share.name.as_str()
        && endpoint.engine == *engine
        && endpoint.exclusive == share.exclusive
        && socket == (share.socket.owner, share.socket.group, share.socket.mode)
}

fn belongs_to(endpoint: &str, share: &str) -> bool {
    endpoint == share || share_of_endpoint(endpoint) == Some(share)
}

fn text(notice: &Notice) -> String {
    format!("{} ({})", notice.message, notice.remedy)
}

fn preflight(found: &Preflight) -> ExportPreflight {
    let finding = |it: &virtiofs_contract::preflight::Finding| ExportFinding {
        reason: it.reason.as_str().to_owned(),
        message: cut(&it.message, MESSAGE_MAX),
        remedy: cut(&it.remedy, MESSAGE_MAX),
    };
    ExportPreflight {
        sandbox: found.sandbox,
        inode_file_handles: found.inode_file_handles,
        open_files: found.open_files.min(1_073_741_816),
        findings: found.findings.iter().take(FINDINGS_MAX).map(finding).collect(),
    }
}

/// Causes that occurred.
fn staleness(totals: &Totals) -> Vec<StaleCount> {
    let occurred = totals.stale.iter().filter(|it| it.events > 0);
    occurred.map(|it| StaleCount { cause: it.cause.name().to_owned(), count: total(it.events) }).collect()
}

fn last_remedy(last: &Tried) -> LastRemedy {
    let at = i64::try_from(last.begun).ok().and_then(|at| Timestamp::from_millisecond(at).ok());
    LastRemedy {
        // To the second, which is what survives being written and read.
        at: Time(at.and_then(|at| Timestamp::from_second(at.as_second()).ok()).unwrap_or_default()),
        cause: last.cause.name().to_owned(),
        action: last.remedy.clone(),
        outcome: last.outcome.clone().unwrap_or_else(|| ON_TRIAL.to_owned()),
    }
}

fn total(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn cut(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}

/// Conditions as they are written: each since when its status holds.
fn conditions(export: &VirtiofsExport, said: Vec<(&'static str, bool, String, String)>, now: &Time) -> Vec<Condition> {
    let before = export.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let condition = |(type_, status, reason, message): (&str, bool, String, String)| {
        let status = if status { "True" } else { "False" };
        let old = before.iter().find(|old| old.type_ == type_ && old.status == status);
        Condition {
            last_transition_time: old.map_or_else(|| now.clone(), |old| old.last_transition_time.clone()),
            message: cut(&message, MESSAGE_MAX),
            observed_generation: export.metadata.generation,
            reason,
            status: status.to_owned(),
            type_: type_.to_owned(),
        }
    };
    said.into_iter().map(condition).collect()
}

#[cfg(test)]
mod tests {
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
            "refusedConnections": 0,
            "refusedExclusive": 0,
            "sessionsStarted": 0,
            "enginesStarted": 0,
            "totals": Totals::default(),
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
            totals: None,
            recoveries: RecoveryCounts::default(),
            asked_since: Instant::now(),
            user: |session| session.id.clone(),
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
            ("nothing known", None, vec![], soon, "- Ready=False:Pending Degraded=False:AsDeclared"),
            ("served", Some(report(Ready, &[])), served(), soon, "r1 Ready=True:Serving Degraded=False:AsDeclared"),
            (
                "served with a complaint",
                Some(report(Degraded, &["FileHandlesUnavailable"])),
                served(),
                soon,
                "r1 Ready=True:Serving Degraded=True:FileHandlesUnavailable",
            ),
            (
                "a remedy that failed is what matters",
                Some(report(Degraded, &["NextMount", "RemedyFailed"])),
                served(),
                soon,
                "r1 Ready=True:Serving Degraded=True:RemedyFailed",
            ),
            (
                "not tried yet",
                Some(report(Pending, &[])),
                other(),
                late,
                "- Ready=False:Pending Degraded=False:AsDeclared",
            ),
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
            [(Some(tried(None)), "OnTrial"), (Some(tried(Some("Verified"))), "Verified"), (None, "Verified")]
        {
            let known = Known { staleness: staleness.as_ref(), ..known(None, &[]) };
            let status = told(&asked, &known, Duration::ZERO).unwrap();
            let last = json!(status.last_remedy);
            let expected = json!({"at": "2023-11-14T22:13:20Z", "cause": "FdExhausted", "action": "FileHandles",
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
        assert_eq!(words(&status), "r1 Ready=False:Invalid");
        assert!(status.conditions[0].message.contains("spec.access"), "{:?}", status.conditions);
    }

    #[test]
    fn what_was_said_before_is_kept_where_it_still_holds() {
        let mut asked = export("a", json!({}));
        let mut first =
            said(&asked, Some(&report(ShareState::Ready, &[])), &[endpoint(&asked)], Duration::ZERO).unwrap();
        let since = Time(Timestamp::from_second(7).unwrap());
        first.conditions[0].last_transition_time = since.clone();
        asked.status = Some(first);
        asked.spec.revision = "r2".into();
        let now = said(&asked, None, &[], Duration::ZERO).unwrap();
        assert_eq!(words(&now), "r1 Ready=False:Pending Degraded=False:AsDeclared");
        assert_ne!(now.conditions[0].last_transition_time, since, "it has changed");
        asked.spec.revision = "r1".into();
        let now = said(&asked, Some(&report(ShareState::Ready, &[])), &[endpoint(&asked)], Duration::ZERO).unwrap();
        assert_eq!(now.conditions[0].last_transition_time, since, "it holds since then");
    }

    #[test]
    fn a_preflight_is_repeated_within_bounds() {
        let asked = export("a", json!({}));
        let mut status = endpoint(&asked);
        let finding = Finding { reason: Reason::NextMount, message: "x".repeat(5000), remedy: String::new() };
        status.preflight.findings = vec![finding; 40];
        let said = said(&asked, None, &[status], Duration::ZERO).unwrap().preflight.unwrap();
        assert_eq!((said.findings.len(), said.findings[0].message.len()), (FINDINGS_MAX, MESSAGE_MAX));
    }
}
