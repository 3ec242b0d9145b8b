//! Writes the status of this node's exports, only if it changed; numbers alone are written less often.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::sleep;
use virtiofs_contract::control::{Endpoint, SessionStatus};
use virtiofs_crds::schema::API_VERSION;
use virtiofs_crds::{VirtiofsExport, VirtiofsExportStatus};

use super::export_status::{Known, export_status};
use super::exports::Exports;
use super::recoveries::Recoveries;
use crate::model::pass::Pass;

/// Owner of the fields that agents apply. An export has one agent at a time.
const FIELD_MANAGER: &str = "virtiofs-agent";
/// Time between two rounds; changes in between are written together.
const ROUND: Duration = Duration::from_secs(1);
/// Numbers, and messages with numbers, are written this often while nothing else changes.
const NUMBERS_EVERY: Duration = Duration::from_secs(30);
/// The first and the longest wait after a failed write.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Writes statuses.
pub(crate) struct Sink {
    /// The API server.
    pub(crate) client: Client,
    /// The exports.
    pub(crate) exports: watch::Receiver<Exports>,
    /// State of the shares.
    pub(crate) passes: watch::Receiver<Pass>,
}

/// The last written status.
struct Written {
    at: Instant,
    uid: Option<String>,
    status: VirtiofsExportStatus,
}

impl Sink {
    /// Writes until the reconcile loop ends.
    pub(crate) async fn run(mut self) {
        let mut written: HashMap<String, Written> = HashMap::new();
        let mut recoveries = Recoveries::default();
        let mut failing: Option<Duration> = None;
        loop {
            tokio::select! {
                changed = self.passes.changed() => if changed.is_err() { return },
                changed = self.exports.changed() => if changed.is_err() { return },
            }
            let exports = self.exports.borrow_and_update().clone();
            let pass = self.passes.borrow_and_update().clone();
            written.retain(|name, _| exports.known.contains_key(name));
            let due = due(&exports, &pass, &mut recoveries, &written);
            match self.write(due, &mut written).await {
                Ok(()) => {
                    if failing.take().is_some() {
                        tracing::info!("status is written again");
                    }
                    sleep(ROUND).await;
                }
                Err(error) => {
                    if failing.is_none() {
                        tracing::warn!(%error, "status not written; trying again");
                    }
                    let wait = failing.map_or(RETRY_AFTER.0, |wait| (wait * 2).min(RETRY_AFTER.1));
                    failing = Some(wait);
                    // Agents of a thousand nodes lose the same API server at the same moment.
                    sleep(wait.mul_f64(0.5 + jitter())).await;
                }
            }
        }
    }

    /// # Errors
    /// The first export that could not be written; others wait for the next round, too.
    async fn write(
        &self,
        due: Vec<(VirtiofsExport, VirtiofsExportStatus)>,
        written: &mut HashMap<String, Written>,
    ) -> kube::Result<()> {
        let api = Api::<VirtiofsExport>::all(self.client.clone());
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        for (export, status) in due {
            let name = export.name_any();
            let applied = json!({
                "apiVersion": API_VERSION,
                "kind": "VirtiofsExport",
                "metadata": {"name": name, "uid": export.uid()},
                "status": status,
            });
            match api.patch_status(&name, &parameters, &Patch::Apply(&applied)).await {
                Ok(_) => {
                    written.insert(name, Written { at: Instant::now(), uid: export.uid(), status });
                }
                // Deleted or replaced meanwhile: the watch reports it.
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The statuses to write now. They come from one pass, so report and counts are of the same moment.
fn due(
    exports: &Exports,
    pass: &Pass,
    recoveries: &mut Recoveries,
    written: &HashMap<String, Written>,
) -> Vec<(VirtiofsExport, VirtiofsExportStatus)> {
    // While the broker is silent only briefly, the last status stays.
    let endpoints = pass.endpoints.as_deref().unwrap_or_default();
    let report = &pass.report;
    if pass.endpoints.is_none() && !report.silent {
        return Vec::new();
    }
    let (now, time) = (Instant::now(), Time(Timestamp::now()));
    let mut due = Vec::new();
    for (export, since) in exports.known.values() {
        let share = &export.spec.share_name;
        let recovered = pass.totals.get(share).map_or(0, |it| it.totals.replacements.recoveries.count);
        let known = Known {
            report: report.shares.iter().find(|it| it.name == *share),
            staleness: report.staleness.get(share),
            amended: pass.amended.get(share),
            endpoints,
            recent_recoveries: recoveries.count(share, recovered, now),
            changed_at: *since,
            user,
        };
        // The last write may not have come back by the watch yet.
        let last = written.get(&export.name_any()).filter(|it| it.uid == export.uid());
        let mut current = export.clone();
        if let Some(last) = last {
            current.status = Some(last.status.clone());
        }
        let Some(status) = export_status(&current, &known, (now, &time)) else { continue };
        let rested = last.is_none_or(|last| now.saturating_duration_since(last.at) >= NUMBERS_EVERY);
        if must_write(current.status.as_ref(), &status, rested) {
            due.push((export.clone(), status));
        }
    }
    due
}

/// True if a status must be written. Numbers, and the messages of conditions, are written only if the last write is some
/// time ago: how long a source has been hanging, or how many inodes a guest holds, changes every second.
fn must_write(before: Option<&VirtiofsExportStatus>, status: &VirtiofsExportStatus, rested: bool) -> bool {
    let Some(before) = before else { return true };
    let without_numbers = |status: &VirtiofsExportStatus| {
        let mut status = VirtiofsExportStatus { recent_recoveries: None, ..status.clone() };
        status.conditions.iter_mut().for_each(|condition| condition.message.clear());
        status
    };
    if rested { before != status } else { without_numbers(before) != without_numbers(status) }
}

/// Name of a session's VM, as far as the node knows it.
fn user(endpoint: &Endpoint, session: &SessionStatus) -> String {
    if let Some(consumer) = &endpoint.consumer {
        return consumer.clone();
    }
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", session.vmm_pid)).unwrap_or_default();
    match comm.trim() {
        "" => session.id.clone(),
        comm => format!("{comm} (pid {})", session.vmm_pid),
    }
}

/// A number from 0 to 1 that differs from agent to agent and from time to time.
fn jitter() -> f64 {
    f64::from(Timestamp::now().subsec_nanosecond() % 1_000_000) / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_wait_and_everything_else_is_written_at_once() {
        let status = |reason: &str, message: &str, recoveries| -> VirtiofsExportStatus {
            let degraded = json!({"type": "Degraded", "status": "True", "reason": reason, "message": message,
                                  "lastTransitionTime": "2026-01-01T00:00:00Z"});
            serde_json::from_value(json!({"sessions": 1, "recentRecoveries": recoveries, "conditions": [degraded]}))
                .unwrap()
        };
        let before = status("SourceHung", "a request has been waiting for 12 s", 1);
        for (what, now, news, news_when_rested) in [
            ("the same", before.clone(), false, false),
            ("more of it", status("SourceHung", "a request has been waiting for 12 s", 2), false, true),
            ("for longer", status("SourceHung", "a request has been waiting for 13 s", 1), false, true),
            ("something else", status("NearLimit", "a request has been waiting for 12 s", 1), true, true),
            ("one more VM", VirtiofsExportStatus { sessions: Some(2), ..before.clone() }, true, true),
        ] {
            assert_eq!(must_write(Some(&before), &now, false), news, "{what}");
            assert_eq!(must_write(Some(&before), &now, true), news_when_rested, "{what}");
        }
        assert!(must_write(None, &before, false));
    }
}
