//! Events of pods whose volumes' sessions were lost: their guests hang until somebody restarts the VMs.

use std::collections::BTreeSet;
use std::hash::Hasher;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use siphasher::sip::SipHasher24;
use tokio::sync::watch;
use virtiofs_contract::control::LostSession;

use super::registry::Registry;
use crate::model::pass::Pass;
use crate::model::volume::Volume;

/// Pause after the API server did not take an Event.
const AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Publishes the Events.
pub(super) struct LossEvents {
    client: Client,
    node: String,
    registry: Arc<Registry>,
    /// Endpoints and sessions whose Events exist, or are refused: another request would be, too.
    published: BTreeSet<(String, LostSession)>,
}

impl LossEvents {
    pub(super) fn new(client: Client, node: &str, registry: Arc<Registry>) -> Self {
        LossEvents { client, node: node.to_owned(), registry, published: BTreeSet::new() }
    }

    /// Publishes an Event for each loss of a volume. Ends with the reconcile loop.
    pub(super) async fn run(mut self, mut passes: watch::Receiver<Pass>) {
        while passes.changed().await.is_ok() {
            let due = self.due(Instant::now(), &passes.borrow_and_update());
            for (volume, session) in due {
                if let Err(error) = self.publish(&volume, &session).await {
                    tracing::warn!(pod = volume.pod, session = session.session, %error, "Event not published");
                    if is_transient(&error) {
                        tokio::time::sleep(AGAIN_AFTER).await;
                        break;
                    }
                }
                self.published.insert((volume.endpoint_name(), session));
            }
        }
    }

    /// Losses without an Event, with the volumes.
    fn due(&mut self, now: Instant, pass: &Pass) -> Vec<(Volume, LostSession)> {
        let mut recent = BTreeSet::new();
        let mut due = Vec::new();
        for volume in self.registry.all() {
            let endpoint = volume.endpoint_name();
            for session in pass.losses.recent(now, |name| name == endpoint) {
                let key = (endpoint.clone(), session.clone());
                if !self.published.contains(&key) {
                    due.push((volume.clone(), session.clone()));
                }
                recent.insert(key);
            }
        }
        // Nothing else is due again.
        self.published.retain(|key| recent.contains(key));
        due
    }

    /// # Errors
    /// The API server cannot be reached, or rejects the Event. An Event that exists is none: an earlier agent published it.
    async fn publish(&self, volume: &Volume, session: &LostSession) -> Result<(), kube::Error> {
        let event = event(&self.node, volume, session, Timestamp::now());
        let events = Api::<Event>::namespaced(self.client.clone(), &volume.namespace);
        match events.create(&PostParams::default(), &event).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(()),
            created => created.map(drop),
        }
    }
}

/// False if the API server has refused the Event, for example because the namespace is being removed.
fn is_transient(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code >= 500 || status.code == 429,
        _ => true,
    }
}

/// The Event. Its name follows from pod and loss, so that no agent publishes it twice.
fn event(node: &str, volume: &Volume, session: &LostSession, now: Timestamp) -> Event {
    let mut hasher = SipHasher24::new();
    for part in [&volume.pod_uid, &session.session, &session.at.to_string()] {
        hasher.write(part.as_bytes());
        hasher.write_u8(0);
    }
    let note = format!(
        "volume {} lost share {}: session {} ended with the broker of node {node} and could not be restored. The guest's \
         mount hangs: restart the VM",
        volume.volume_id, volume.share, session.session
    );
    Event {
        metadata: ObjectMeta {
            name: Some(format!("virtiofs-session-lost-{:016x}", hasher.finish())),
            namespace: Some(volume.namespace.clone()),
            ..ObjectMeta::default()
        },
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(volume.pod.clone()),
            namespace: Some(volume.namespace.clone()),
            uid: Some(volume.pod_uid.clone()),
            ..ObjectReference::default()
        }),
        type_: Some("Warning".to_owned()),
        reason: Some("SessionLost".to_owned()),
        action: Some("RestoreSession".to_owned()),
        note: Some(note.chars().take(NOTE_MAX).collect()),
        reporting_controller: Some("virtiofs-agent".to_owned()),
        reporting_instance: Some(node.to_owned()),
        event_time: Some(MicroTime(now)),
        ..Event::default()
    }
}

/// Most characters of a note that the API server takes; names are ASCII.
const NOTE_MAX: usize = 1024;

#[cfg(test)]
mod tests {
    use virtiofs_client::fixtures::{endpoint, listening, status};
    use virtiofs_contract::control::EndpointStatus;

    use super::*;
    use crate::fixtures::volume;

    fn lost(at: u64, session: &str) -> LostSession {
        LostSession { at, session: session.into() }
    }

    #[tokio::test]
    async fn each_loss_of_a_volume_is_due_until_it_is_published() {
        let scratch = tempfile::tempdir().unwrap();
        let registry = Arc::new(Registry::open(scratch.path().join("volumes")).unwrap());
        let (one, two) = (volume("images", "one"), volume("images", "two"));
        for volume in [&one, &two] {
            registry.put(volume).unwrap();
        }
        let client = Client::try_from(kube::Config::new("http://127.0.0.1:9".parse().unwrap())).unwrap();
        let mut events = LossEvents::new(client, "n1", registry.clone());
        let now = Instant::now();
        let mut pass = Pass::default();
        let of = |name: &str, lost| EndpointStatus { lost, ..listening(endpoint(name)) };
        let endpoints = vec![of(&one.endpoint_name(), vec![lost(7, "s-1")]), of("images", vec![lost(7, "s-2")])];
        pass.losses.update(now, 7, &status(1, endpoints));

        assert_eq!(events.due(now, &pass), [(one.clone(), lost(7, "s-1"))], "the share's own endpoint has no pod");
        assert_eq!(events.due(now, &pass).len(), 1, "the API server may be away");
        events.published.insert((one.endpoint_name(), lost(7, "s-1")));
        assert_eq!(events.due(now, &pass), []);
        let endpoints = vec![of(&one.endpoint_name(), vec![lost(9, "s-1")])];
        pass.losses.update(now, 9, &status(2, endpoints));
        assert_eq!(events.due(now, &pass), [(one.clone(), lost(9, "s-1"))], "lost again");
        registry.remove(&one.target_path).unwrap();
        assert_eq!(events.due(now, &pass), [], "the pod is gone");
        assert!(events.published.is_empty());
    }

    #[test]
    fn refused_events_are_not_repeated() {
        let answered = |code| kube::Error::Api(kube::core::Status::failure("m", "r").with_code(code).boxed());
        let repeated: Vec<_> =
            [403, 404, 409, 429, 500, 503].into_iter().filter(|it| is_transient(&answered(*it))).collect();
        assert_eq!(repeated, [429, 500, 503]);
        assert!(is_transient(&kube::Error::Service("connection refused".into())));
    }

    #[test]
    fn event_is_of_the_pod_and_has_one_name() {
        let volume = volume("images", "one");
        let of = |volume: &Volume, session: &LostSession| event("n1", volume, session, Timestamp::UNIX_EPOCH);
        let event = of(&volume, &lost(7, "s-1"));
        let regarding = event.regarding.as_ref().unwrap();
        assert_eq!(
            (regarding.kind.as_deref(), regarding.name.as_deref(), regarding.uid.as_deref()),
            (Some("Pod"), Some("vm-1"), Some("u"))
        );
        assert_eq!(event.metadata.namespace, regarding.namespace, "the API server requires it");
        assert_eq!(event, of(&volume, &lost(7, "s-1")));
        for (volume, session) in [
            (volume.clone(), lost(8, "s-1")),
            (volume.clone(), lost(7, "s-2")),
            (Volume { pod_uid: "other".into(), ..volume.clone() }, lost(7, "s-1")),
        ] {
            assert_ne!(of(&volume, &session).metadata.name, event.metadata.name);
        }
        let long = Volume { share: "x".repeat(2000), ..volume };
        assert_eq!(of(&long, &lost(7, "s-1")).note.unwrap().len(), NOTE_MAX);
    }
}
