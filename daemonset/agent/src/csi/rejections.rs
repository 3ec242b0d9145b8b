//! Rejected volume requests: a count, and for the admin a log line and a rate-limited Event of the share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use virtiofs_crds::VirtiofsExport;
use virtiofs_crds::export::controller_of;
use virtiofs_crds::schema::{API_VERSION, KIND};

use crate::model::volume::Volume;

/// The same rejection is reported again after this time.
const REPEAT_AFTER: Duration = Duration::from_secs(300);
/// Maximum of reports for one namespace within that time; more are only counted. One namespace cannot hide rejections of
/// another.
const REPORTS_MAX: usize = 20;

/// Why a request was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    /// The pod's namespace is not among the share's consumers.
    NotAConsumer,
    /// The node does not have this share.
    UnknownShare,
    /// The pod, its namespace or the share has as many volumes on the node as it may have.
    TooManyVolumes,
}

impl Reason {
    /// The name in Events, metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Reason::NotAConsumer => "NotAConsumer",
            Reason::UnknownShare => "UnknownShare",
            Reason::TooManyVolumes => "TooManyVolumes",
        }
    }
}

impl Reason {
    /// For the Event of a share.
    fn text(self) -> &'static str {
        match self {
            Reason::NotAConsumer => "its namespace is not in spec.consumers",
            Reason::UnknownShare => "the node does not have the share",
            Reason::TooManyVolumes => "it, its namespace or the share has as many volumes there as it may have",
        }
    }
}

/// Counts by share and reason. Unknown shares are counted together: anybody can invent names.
#[derive(Clone, Debug, Default)]
pub(crate) struct RejectionCounts(Arc<Mutex<BTreeMap<(String, Reason), u64>>>);

impl RejectionCounts {
    fn count(&self, share: &str, reason: Reason) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry((share.to_owned(), reason)).or_default() += 1;
    }

    /// All counts.
    pub(crate) fn all(&self) -> BTreeMap<(String, Reason), u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Counts and reports rejections.
pub(super) struct Rejections {
    counts: RejectionCounts,
    recorder: Recorder,
    node: String,
    reported: Mutex<Reported>,
}

impl Rejections {
    /// Publishes Events through this client.
    pub(super) fn start(client: &Client, node: &str, counts: RejectionCounts) -> Self {
        let reporter = Reporter { controller: "virtiofs-agent".to_owned(), instance: Some(node.to_owned()) };
        let recorder = Recorder::new(client.clone(), reporter);
        Rejections { counts, recorder, node: node.to_owned(), reported: Mutex::default() }
    }

    /// Records a rejected request; `export` is the share's export on this node, if any.
    pub(super) fn record(&self, export: Option<&VirtiofsExport>, volume: &Volume, reason: Reason) {
        let share = export.map_or("", |export| &export.spec.share_name);
        self.counts.count(share, reason);
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let due = reported.is_due(&volume.namespace, (share.to_owned(), reason), Instant::now());
        drop(reported);
        if !due {
            return;
        }
        let pod = format!("{}/{}", volume.namespace, volume.pod);
        tracing::warn!(share = volume.share, pod, reason = reason.as_str(), "volume request rejected");
        let Some(share) = export.and_then(share_of) else { return };
        let event = Event {
            type_: EventType::Warning,
            reason: reason.as_str().to_owned(),
            note: Some(format!("pod {pod} on node {} was rejected: {}", self.node, reason.text())),
            action: "PublishVolume".to_owned(),
            secondary: None,
        };
        let recorder = self.recorder.clone();
        // The request does not wait for the Event.
        tokio::spawn(async move {
            if let Err(error) = recorder.publish(&event, &share).await {
                tracing::warn!(%error, "Event not published");
            }
        });
    }
}

/// The share of an export.
fn share_of(export: &VirtiofsExport) -> Option<ObjectReference> {
    let owner = controller_of(export).ok()?;
    Some(ObjectReference {
        api_version: Some(API_VERSION.to_owned()),
        kind: Some(KIND.to_owned()),
        name: Some(owner.name.clone()),
        uid: Some(owner.uid.clone()),
        ..ObjectReference::default()
    })
}

/// What was reported for each namespace, and when.
#[derive(Debug, Default)]
struct Reported(BTreeMap<String, Vec<(Instant, Subject)>>);

/// Share and reason; all unknown shares are one.
type Subject = (String, Reason);

impl Reported {
    /// True if it is due to be reported; then it is noted.
    fn is_due(&mut self, namespace: &str, subject: Subject, now: Instant) -> bool {
        self.0.retain(|_, reports| {
            reports.retain(|(at, _)| now.saturating_duration_since(*at) < REPEAT_AFTER);
            !reports.is_empty()
        });
        let reports = self.0.entry(namespace.to_owned()).or_default();
        let due = reports.len() < REPORTS_MAX && reports.iter().all(|(_, reported)| *reported != subject);
        if due {
            reports.push((now, subject));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_rate_limited_by_namespace() {
        let mut reported = Reported::default();
        let start = Instant::now();
        let subject = |number: usize| (format!("share-{number}"), Reason::NotAConsumer);
        assert!(reported.is_due("a", subject(0), start));
        assert!(!reported.is_due("a", subject(0), start));
        assert_eq!(
            (1..2 * REPORTS_MAX).filter(|number| reported.is_due("a", subject(*number), start)).count(),
            REPORTS_MAX - 1
        );
        assert!(reported.is_due("b", subject(0), start), "namespaces are limited separately");
        assert!(reported.is_due("a", subject(0), start + REPEAT_AFTER));
        assert_eq!(reported.0.len(), 1, "old reports are dropped");
    }

    #[test]
    fn unknown_shares_are_counted_together() {
        let counts = RejectionCounts::default();
        counts.count("", Reason::UnknownShare);
        counts.count("", Reason::UnknownShare);
        counts.count("images", Reason::NotAConsumer);
        let all: Vec<_> = counts.all().into_iter().map(|((share, _), count)| (share, count)).collect();
        assert_eq!(all, [(String::new(), 2), ("images".to_owned(), 1)]);
    }
}
