//! Who was refused, and how the admin gets to know: a count, a log line, and an Event of the share, not more often than is
//! good for anybody.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, ResourceExt};
use virtiofs_crds::VirtiofsExport;
use virtiofs_crds::schema::API_VERSION;

use crate::volume::Volume;

/// The same is told again after this time.
const AGAIN_AFTER: Duration = Duration::from_secs(300);
/// So many are told of one namespace within that time; more are counted. What somebody does in one does not hide what
/// happens in another.
const TOLD_MOST: usize = 20;

/// Why somebody was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reason {
    /// The pod's namespace is not among the share's consumers.
    NotAConsumer,
    /// There is no such share on the node.
    UnknownShare,
}

impl Reason {
    /// The word in Events, metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Reason::NotAConsumer => "NotAConsumer",
            Reason::UnknownShare => "UnknownShare",
        }
    }
}

/// How often, by share and reason. Shares that do not exist have one line together: anybody can make names up.
#[derive(Clone, Debug, Default)]
pub(crate) struct RefusalCounts(Arc<Mutex<BTreeMap<(String, Reason), u64>>>);

impl RefusalCounts {
    fn count(&self, share: &str, reason: Reason) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry((share.to_owned(), reason)).or_default() += 1;
    }

    /// All counts.
    pub(crate) fn all(&self) -> BTreeMap<(String, Reason), u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Tells of refusals.
pub(super) struct Refusals {
    counts: RefusalCounts,
    recorder: Recorder,
    node: String,
    told: Mutex<Told>,
}

impl Refusals {
    /// Events are published through this client.
    pub(super) fn start(client: &Client, node: &str, counts: RefusalCounts) -> Self {
        let reporter = Reporter { controller: "virtiofs-agent".to_owned(), instance: Some(node.to_owned()) };
        let recorder = Recorder::new(client.clone(), reporter);
        Refusals { counts, recorder, node: node.to_owned(), told: Mutex::default() }
    }

    /// A pod was refused a share; `export` is what this node has of that.
    pub(super) fn refuse(&self, export: Option<&VirtiofsExport>, volume: &Volume, reason: Reason) {
        let share = export.map_or("", |export| &export.spec.share_name);
        self.counts.count(share, reason);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let due = told.is_due(&volume.namespace, (share.to_owned(), reason), Instant::now());
        drop(told);
        if !due {
            return;
        }
        let pod = format!("{}/{}", volume.namespace, volume.pod);
        tracing::warn!(share = volume.share, pod, reason = reason.as_str(), "a pod was refused a share");
        let Some(share) = export.and_then(share_of) else { return };
        let event = Event {
            type_: EventType::Warning,
            reason: reason.as_str().to_owned(),
            note: Some(format!(
                "pod {pod} on node {} was refused: its namespace is not among spec.consumers",
                self.node
            )),
            action: "PublishVolume".to_owned(),
            secondary: None,
        };
        let recorder = self.recorder.clone();
        // Nobody who waits for a volume waits for that.
        tokio::spawn(async move {
            if let Err(error) = recorder.publish(&event, &share).await {
                tracing::warn!(%error, "an Event cannot be published");
            }
        });
    }
}

/// The share that an export is of.
fn share_of(export: &VirtiofsExport) -> Option<ObjectReference> {
    let owner = export.owner_references().iter().find(|owner| owner.kind == "VirtiofsShare")?;
    Some(ObjectReference {
        api_version: Some(API_VERSION.to_owned()),
        kind: Some("VirtiofsShare".to_owned()),
        name: Some(owner.name.clone()),
        uid: Some(owner.uid.clone()),
        ..ObjectReference::default()
    })
}

/// What was told of each namespace, and when.
#[derive(Debug, Default)]
struct Told(BTreeMap<String, Vec<(Instant, About)>>);

/// Share and reason; shares that do not exist are one.
type About = (String, Reason);

impl Told {
    /// Is it to be told now? Then it is noted.
    fn is_due(&mut self, namespace: &str, about: About, now: Instant) -> bool {
        self.0.retain(|_, told| {
            told.retain(|(at, _)| now.saturating_duration_since(*at) < AGAIN_AFTER);
            !told.is_empty()
        });
        let told = self.0.entry(namespace.to_owned()).or_default();
        let due = told.len() < TOLD_MOST && told.iter().all(|(_, told)| *told != about);
        if due {
            told.push((now, about));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_told_once_in_a_while_and_not_too_much_of_any_namespace() {
        let mut told = Told::default();
        let start = Instant::now();
        let about = |number: usize| (format!("share-{number}"), Reason::NotAConsumer);
        assert!(told.is_due("a", about(0), start));
        assert!(!told.is_due("a", about(0), start));
        assert_eq!((1..2 * TOLD_MOST).filter(|number| told.is_due("a", about(*number), start)).count(), TOLD_MOST - 1);
        assert!(told.is_due("b", about(0), start), "another namespace hides nothing of this one");
        assert!(told.is_due("a", about(0), start + AGAIN_AFTER));
        assert_eq!(told.0.len(), 1, "what was told long ago is forgotten");
    }

    #[test]
    fn names_that_somebody_made_up_are_counted_together() {
        let counts = RefusalCounts::default();
        counts.count("", Reason::UnknownShare);
        counts.count("", Reason::UnknownShare);
        counts.count("images", Reason::NotAConsumer);
        let all: Vec<_> = counts.all().into_iter().map(|((share, _), count)| (share, count)).collect();
        assert_eq!(all, [(String::new(), 2), ("images".to_owned(), 1)]);
    }
}
