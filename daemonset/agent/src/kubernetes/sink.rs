//! Writes the status of this node's exports: only what has changed, and numbers alone not all the time.

use std::collections::HashMap;
use std::sync::Arc;
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

use super::answer::{Known, answer};
use super::exports::Exports;
use super::recoveries::Recoveries;
use crate::broker::observer::{Observation, Observer};
use crate::reconcile::Turn;

/// Whom the fields belong to that agents apply. An export has one agent at a time.
const FIELD_MANAGER: &str = "virtiofs-agent";
/// Between two rounds; what happens in between is written together.
const ROUND: Duration = Duration::from_secs(1);
/// Numbers that rise, and messages that repeat them, are written this often while nothing else changes.
const NUMBERS_EVERY: Duration = Duration::from_secs(30);
/// The first and the longest wait after the API server has refused or not answered.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Writes statuses.
pub(crate) struct Sink {
    /// The API server.
    pub(crate) client: Client,
    /// What was asked.
    pub(crate) exports: watch::Receiver<Exports>,
    /// How shares do.
    pub(crate) turns: watch::Receiver<Turn>,
    /// What the broker says.
    pub(crate) observer: Arc<Observer>,
}

/// What was written last.
struct Written {
    at: Instant,
    uid: Option<String>,
    status: VirtiofsExportStatus,
}

impl Sink {
    /// Writes until the loop that turns ends.
    pub(crate) async fn run(mut self) {
        let mut written: HashMap<String, Written> = HashMap::new();
        let mut recoveries = Recoveries::default();
        let mut trouble: Option<Duration> = None;
        loop {
            tokio::select! {
                changed = self.turns.changed() => if changed.is_err() { return },
                changed = self.exports.changed() => if changed.is_err() { return },
            }
            let exports = self.exports.borrow_and_update().clone();
            let turn = self.turns.borrow_and_update().clone();
            let observation = self.observer.observe().await;
            written.retain(|name, _| exports.known.contains_key(name));
            let due = due(&exports, &turn, &observation, &mut recoveries, &written);
            match self.write(due, &mut written).await {
                Ok(()) => {
                    if trouble.take().is_some() {
                        tracing::info!("statuses are written again");
                    }
                    sleep(ROUND).await;
                }
                Err(error) => {
                    if trouble.is_none() {
                        tracing::warn!(%error, "a status cannot be written; trying again");
                    }
                    let wait = trouble.map_or(PATIENCE.0, |wait| (wait * 2).min(PATIENCE.1));
                    trouble = Some(wait);
                    // Agents of a thousand nodes have lost the same API server at the same moment.
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
                // Gone, or another one by now: the watch will tell.
                Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Which exports' status is to be written now.
fn due(
    exports: &Exports,
    turn: &Turn,
    observation: &Observation,
    recoveries: &mut Recoveries,
    written: &HashMap<String, Written>,
) -> Vec<(VirtiofsExport, VirtiofsExportStatus)> {
    // Of a broker that does not answer nothing is known; what was said before stands until the loop says otherwise.
    let endpoints = observation.status.as_ref().map(|status| status.endpoints.as_slice()).unwrap_or_default();
    let report = &turn.report;
    if observation.status.is_err() && !report.silent {
        return Vec::new();
    }
    let (now, time) = (Instant::now(), Time(Timestamp::now()));
    let mut due = Vec::new();
    for (export, since) in exports.known.values() {
        let share = &export.spec.share_name;
        let recovered = observation.totals.get(share).map_or(0, |it| it.totals.replacements.recoveries.count);
        let known = Known {
            report: report.shares.iter().find(|it| it.name == *share),
            staleness: report.staleness.get(share),
            amended: turn.amended.get(share),
            endpoints,
            recent_recoveries: recoveries.count(share, recovered, now),
            asked_since: *since,
            user,
        };
        // What was written a moment ago may not have come back yet.
        let last = written.get(&export.name_any()).filter(|it| it.uid == export.uid());
        let mut current = export.clone();
        if let Some(last) = last {
            current.status = Some(last.status.clone());
        }
        let Some(status) = answer(&current, &known, (now, &time)) else { continue };
        let rested = last.is_none_or(|last| now.saturating_duration_since(last.at) >= NUMBERS_EVERY);
        if is_news(current.status.as_ref(), &status, rested) {
            due.push((export.clone(), status));
        }
    }
    due
}

/// Is a status worth a write? Numbers that nobody acts upon wait until the last write is some time ago, and so does how a
/// condition is told: for how long a source has been hanging, or how many inodes a guest holds, is new every second.
fn is_news(before: Option<&VirtiofsExportStatus>, status: &VirtiofsExportStatus, rested: bool) -> bool {
    let Some(before) = before else { return true };
    let without_numbers = |status: &VirtiofsExportStatus| {
        let mut status = VirtiofsExportStatus { recent_recoveries: None, ..status.clone() };
        status.conditions.iter_mut().for_each(|condition| condition.message.clear());
        status
    };
    if rested { before != status } else { without_numbers(before) != without_numbers(status) }
}

/// A session's VM, as far as the node knows it.
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
    fn what_nobody_acts_upon_waits_and_the_rest_does_not() {
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
            assert_eq!(is_news(Some(&before), &now, false), news, "{what}");
            assert_eq!(is_news(Some(&before), &now, true), news_when_rested, "{what}");
        }
        assert!(is_news(None, &before, false));
    }
}
