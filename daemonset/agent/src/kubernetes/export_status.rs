//! The status of an export: a pure function of its spec, the share's report and the broker's endpoints.

use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use virtiofs_client::endpoint;
use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::report::{ShareReport, ShareState};
use virtiofs_client::staleness::{LastRemedy as RemedyReport, ShareStaleness};
use virtiofs_contract::control::{Endpoint, EndpointStatus, SessionStatus};
use virtiofs_contract::preflight::Preflight;
use virtiofs_crds::export::share_of;
use virtiofs_crds::v1alpha1::conditions::{
    AS_EXPECTED, DEGRADED, DRAINED, DRAINING, INVALID_SPEC, PENDING, READY, SERVING,
};
use virtiofs_crds::v1alpha1::{ExportFinding, ExportPreflight, FINDINGS_MAX, LastRemedy, MESSAGE_MAX, USERS_MAX, word};
use virtiofs_crds::{ExportMode, Share, VirtiofsExport, VirtiofsExportStatus};

use crate::model::pass::Amended;

/// If the revision is not active after this time, its notices are its result. An apply takes milliseconds; this is for a busy
/// host.
const RESULT_AFTER: Duration = Duration::from_secs(10);
/// Outcome of a remedy that has not ended.
const VERIFYING: &str = "Verifying";

/// What is known of an export's share.
#[derive(Clone, Debug)]
pub(crate) struct Known<'a> {
    /// Its report; `None` if nothing is known of it.
    pub(crate) report: Option<&'a ShareReport>,
    /// Its staleness.
    pub(crate) staleness: Option<&'a ShareStaleness>,
    /// Its engine configuration, if remedies have amended it.
    pub(crate) amended: Option<&'a Amended>,
    /// All endpoints of the broker.
    pub(crate) endpoints: &'a [EndpointStatus],
    /// Engines that were recovered within the last ten minutes.
    pub(crate) recent_recoveries: i64,
    /// When the spec last changed.
    pub(crate) changed_at: Instant,
    /// Names a session's VM.
    pub(crate) user: fn(&Endpoint, &SessionStatus) -> String,
}

/// The status of an export; `None` if it is not known yet and the last status stays.
pub(crate) fn export_status(
    export: &VirtiofsExport,
    known: &Known<'_>,
    now: (Instant, &Time),
) -> Option<VirtiofsExportStatus> {
    let own: Vec<&EndpointStatus> =
        known.endpoints.iter().filter(|it| endpoint::share_of(&it.endpoint.name) == export.spec.share_name).collect();
    let sessions: Vec<(&Endpoint, &SessionStatus)> =
        own.iter().flat_map(|it| it.sessions.iter().map(|session| (&it.endpoint, session))).collect();
    let result = match export.spec.mode {
        ExportMode::Serve => serve(export, known, &own, now.0),
        // Until it has stopped listening, a VM may still connect.
        ExportMode::Drain if own.iter().any(|it| it.listening) => return None,
        ExportMode::Drain => drain(export, sessions.len()),
    };
    let before = export.status.as_ref();
    Some(VirtiofsExportStatus {
        observed_generation: export.metadata.generation,
        observed_revision: result.revision.or_else(|| before.and_then(|it| it.observed_revision.clone())),
        sessions: Some(i64::try_from(sessions.len()).unwrap_or(i64::MAX)),
        users: sessions
            .iter()
            .take(USERS_MAX)
            .map(|(endpoint, session)| cut(&(known.user)(endpoint, session), 253))
            .collect(),
        preflight: own.first().map(|it| preflight(&it.preflight)),
        recent_recoveries: Some(known.recent_recoveries),
        // The broker stores the history; if it was lost, the last remedy stays.
        last_remedy: known
            .staleness
            .and_then(|it| it.last_remedy.as_ref())
            .map(last_remedy)
            .or_else(|| before.and_then(|it| it.last_remedy.clone())),
        agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        conditions: conditions(export, result.conditions, now.1),
    })
}

/// The part of a status without numbers.
struct RevisionResult {
    /// The revision that is active, or that was applied without success.
    revision: Option<String>,
    conditions: Vec<(&'static str, bool, String, String)>,
}

fn serve(export: &VirtiofsExport, known: &Known<'_>, own: &[&EndpointStatus], now: Instant) -> RevisionResult {
    let share = match share_of(export) {
        Ok(share) => share,
        Err(refusals) => {
            let message = refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            let ready = (READY, false, INVALID_SPEC.to_owned(), message);
            return RevisionResult { revision: Some(export.spec.revision.clone()), conditions: vec![ready] };
        }
    };
    let active = own.iter().any(|it| is_active(it, &share, known.amended));
    let state = known.report.map_or(ShareState::Pending, |report| report.state);
    let notices = known.report.map(|report| report.notices.as_slice()).unwrap_or_default();
    let first = notices.iter().find(|it| it.reason == NoticeReason::RemedyFailed).or(notices.first());
    let settled =
        !matches!(state, ShareState::Pending) && now.saturating_duration_since(known.changed_at) > RESULT_AFTER;
    let ready = match (active && state.serves(), first) {
        (true, _) => (READY, true, SERVING.to_owned(), String::new()),
        (false, Some(notice)) => (READY, false, notice.reason.as_str().to_owned(), text(notice)),
        (false, None) => (READY, false, PENDING.to_owned(), String::new()),
    };
    let degraded = match first {
        Some(notice) => (DEGRADED, true, notice.reason.as_str().to_owned(), text(notice)),
        None => (DEGRADED, false, AS_EXPECTED.to_owned(), String::new()),
    };
    let revision = (active || (settled && first.is_some())).then(|| export.spec.revision.clone());
    RevisionResult { revision, conditions: vec![ready, degraded] }
}

fn drain(export: &VirtiofsExport, sessions: usize) -> RevisionResult {
    let reason = if sessions == 0 { DRAINED } else { DRAINING };
    let ready = (READY, false, reason.to_owned(), String::new());
    RevisionResult { revision: Some(export.spec.revision.clone()), conditions: vec![ready] }
}

/// True if the broker serves the share as declared, or as amended by remedies.
fn is_active(status: &EndpointStatus, share: &Share, amended: Option<&Amended>) -> bool {
    let endpoint = &status.endpoint;
    let engine = amended.filter(|it| it.declared == share.engine).map_or(&share.engine, |it| &it.engine);
    let socket = (endpoint.socket.owner, endpoint.socket.group, endpoint.socket.mode);
    status.listening
        && endpoint.name == share.name.as_str()
        && endpoint.engine == *engine
        && endpoint.exclusive == share.exclusive
        && socket == (share.socket.owner, share.socket.group, share.socket.mode)
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
        sandbox: word(found.sandbox),
        inode_file_handles: word(found.inode_file_handles),
        open_files: found.open_files.min(1_073_741_816),
        findings: found.findings.iter().take(FINDINGS_MAX).map(finding).collect(),
    }
}

fn last_remedy(last: &RemedyReport) -> LastRemedy {
    let at = i64::try_from(last.started).ok().and_then(|at| Timestamp::from_millisecond(at).ok());
    LastRemedy {
        // To the second, as it is serialized.
        start_time: Time(at.and_then(|at| Timestamp::from_second(at.as_second()).ok()).unwrap_or_default()),
        cause: last.cause.name().to_owned(),
        action: last.remedy.clone(),
        outcome: last.outcome.clone().unwrap_or_else(|| VERIFYING.to_owned()),
    }
}

fn cut(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}

/// The conditions, each with the time of its last transition.
fn conditions(export: &VirtiofsExport, new: Vec<(&'static str, bool, String, String)>, now: &Time) -> Vec<Condition> {
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
    new.into_iter().map(condition).collect()
}

#[cfg(test)]
mod tests;
