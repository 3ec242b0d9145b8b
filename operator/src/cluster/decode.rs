//! Objects that cannot be decoded, because another release or another writer has stored what this one does not know. One
//! such object must not stop a list or a watch: its last decodable version stays, and the log names it.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use kube::core::DeserializeGuard;
use kube::runtime::reflector::{ObjectRef, Store};
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt};

use crate::metrics::Metrics;

/// Decodes the events of a watch.
pub(super) struct Decoder<K: Resource<DynamicType = ()> + 'static> {
    /// The last decodable version of each object.
    known: Store<K>,
    /// Names of the objects that cannot be decoded now.
    undecodable: BTreeSet<String>,
    metrics: Arc<Metrics>,
}

impl<K: Resource<DynamicType = ()> + Clone + Debug + 'static> Decoder<K> {
    /// A decoder that finds last decodable versions in `known`.
    pub(super) fn new(known: Store<K>, metrics: Arc<Metrics>) -> Self {
        Decoder { known, undecodable: BTreeSet::new(), metrics }
    }

    /// The event with its object decoded; none if there is no decodable version of it.
    pub(super) fn decode(&mut self, event: Event<DeserializeGuard<K>>) -> Option<Event<K>> {
        let event = match event {
            Event::Init => {
                // The list names those that still are.
                self.undecodable.clear();
                Some(Event::Init)
            }
            Event::InitDone => Some(Event::InitDone),
            Event::InitApply(object) => self.object(object).map(Event::InitApply),
            Event::Apply(object) => self.object(object).map(Event::Apply),
            Event::Delete(object) => {
                let last = self.object(object);
                last.as_ref().map(ResourceExt::name_any).map(|name| self.undecodable.remove(&name));
                last.map(Event::Delete)
            }
        };
        let count = i64::try_from(self.undecodable.len()).unwrap_or(i64::MAX);
        self.metrics.undecodable.with_label_values(&[K::kind(&()).as_ref()]).set(count);
        event
    }

    /// The object, or its last decodable version.
    fn object(&mut self, object: DeserializeGuard<K>) -> Option<K> {
        let name = object.name_any();
        let reference = ObjectRef::new(&name);
        let reference = match object.namespace() {
            Some(namespace) => reference.within(&namespace),
            None => reference,
        };
        match object.0 {
            Ok(object) => {
                self.undecodable.remove(&name);
                Some(object)
            }
            Err(invalid) => {
                if self.undecodable.insert(name.clone()) {
                    let error = invalid.error;
                    tracing::warn!(kind = %K::kind(&()), name, error, "cannot decode an object; its last version stays");
                }
                self.known.get(&reference).map(|last| (*last).clone())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kube::runtime::reflector::store;
    use serde_json::{Value, json};
    use virtiofs_config::{Access, EngineConfig};
    use virtiofs_crds::VirtiofsExport;
    use virtiofs_crds::v1alpha1::ResolvedEngine;

    use super::*;

    fn export(name: &str, mode: Value) -> DeserializeGuard<VirtiofsExport> {
        let object = json!({
            "apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsExport", "metadata": {"name": name},
            "spec": {"shareName": "s", "nodeName": "n", "revision": "1", "access": "ReadOnly", "content": "Shared",
                     "source": {"hostPath": {"path": "/srv"}}, "mode": mode, "engine": ResolvedEngine::from(&EngineConfig::stock(Access::ReadOnly))},
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn an_undecodable_object_does_not_stop_a_list_and_keeps_its_last_version() {
        let (known, mut writer) = store();
        let metrics = Arc::new(Metrics::new().unwrap());
        let mut decoder = Decoder::new(known.clone(), metrics.clone());
        let mut run = |events: Vec<Event<DeserializeGuard<VirtiofsExport>>>| {
            events.into_iter().filter_map(|event| decoder.decode(event)).for_each(|it| writer.apply_watcher_event(&it));
            let mut names: Vec<String> = known.state().iter().map(|it| it.name_any()).collect();
            names.sort();
            names
        };
        let undecodable =
            || metrics.text().unwrap().contains("virtiofs_operator_undecodable_objects{kind=\"VirtiofsExport\"} 1");
        let odd = |name| export(name, json!("Hibernate"));
        let good = |name| export(name, json!("Serve"));
        assert_eq!(
            run(vec![Event::Init, Event::InitApply(odd("a")), Event::InitApply(good("b")), Event::InitDone]),
            ["b"]
        );
        assert!(undecodable());
        assert_eq!(run(vec![Event::Apply(good("a"))]), ["a", "b"]);
        assert!(!undecodable());
        assert_eq!(run(vec![Event::Apply(odd("a"))]), ["a", "b"]);
        assert_eq!(run(vec![Event::Init, Event::InitApply(odd("a")), Event::InitDone]), ["a"], "listed again");
        assert!(undecodable());
        assert_eq!(run(vec![Event::Delete(odd("a"))]), Vec::<String>::new());
        assert!(!undecodable());
    }
}
