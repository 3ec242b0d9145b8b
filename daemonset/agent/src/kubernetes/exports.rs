//! This node's exports, and the desired state that follows from them: plain data and pure functions.

use std::collections::BTreeMap;
use std::time::Instant;

use kube::ResourceExt;
use kube::core::DeserializeGuard;
use kube::runtime::watcher::Event;
use virtiofs_client::report::Problem;
use virtiofs_crds::export::{SHARE_LABEL, controller_of, export_name, share_of};
use virtiofs_crds::{ExportMode, Refusal, VirtiofsExport};

use crate::model::desired::Desired;

/// This node's exports.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exports {
    /// Each by its name, with the time of its last change. Of an export that is rejected now, this is the last version that
    /// was not.
    pub(crate) known: BTreeMap<String, (VirtiofsExport, Instant)>,
    /// Exports whose present version is rejected, by name.
    rejected: BTreeMap<String, Problem>,
    /// True if these were read from an earlier agent's file. There may be others then, and nothing is withdrawn.
    pub(crate) old: bool,
}

impl Exports {
    /// Adds or updates an export, or rejects its new version: it cannot be decoded, because another release has stored what
    /// this one does not know, or the operator has not written it.
    pub(crate) fn put(&mut self, object: DeserializeGuard<VirtiofsExport>, now: Instant) {
        let name = object.name_any();
        match self.accept(object) {
            Ok(export) => {
                self.rejected.remove(&name);
                let same =
                    |(known, _): &&(VirtiofsExport, Instant)| known.spec == export.spec && known.uid() == export.uid();
                let since = self.known.get(&name).filter(same).map_or(now, |(_, since)| *since);
                self.known.insert(name, (export, since));
            }
            Err(problem) => {
                if self.rejected.get(&name) != Some(&problem) {
                    tracing::warn!(export = name, %problem, "export rejected; its last accepted version stays active");
                }
                self.rejected.insert(name, problem);
            }
        }
    }

    fn accept(&self, object: DeserializeGuard<VirtiofsExport>) -> Result<VirtiofsExport, Problem> {
        let export = object.0.map_err(|invalid| {
            let name = invalid.metadata.name.unwrap_or_default();
            let labelled = invalid.metadata.labels.and_then(|mut labels| labels.remove(SHARE_LABEL));
            let share = match self.known.get(&name) {
                Some((last, _)) => Some(last.spec.share_name.clone()),
                None => labelled.filter(|share| self.of(share).is_none()),
            };
            let message = format!("export {name} cannot be decoded: {}; update the agent of this node", invalid.error);
            Problem { share, ..Problem::from(&Refusal::new("", message)) }
        })?;
        match controller_of(&export) {
            Ok(_) => Ok(export),
            Err(refusal) => {
                // An export with another name says nothing about the share.
                let canonical = export.name_any() == export_name(&export.spec.share_name, &export.spec.node_name);
                let share = canonical.then(|| export.spec.share_name.clone());
                Err(Problem { share, ..Problem::from(&refusal) })
            }
        }
    }

    /// Removes an export.
    pub(crate) fn remove(&mut self, name: &str) {
        self.known.remove(name);
        self.rejected.remove(name);
    }

    /// All exports.
    pub(crate) fn all(&self) -> impl Iterator<Item = &VirtiofsExport> {
        self.known.values().map(|(export, _)| export)
    }

    /// The export of a share.
    pub(crate) fn of(&self, share: &str) -> Option<&VirtiofsExport> {
        self.all().find(|export| export.spec.share_name == share)
    }

    /// The desired state. An export that drains is not in it; its sessions continue in the broker. An invalid export keeps the
    /// share of `before`.
    pub(crate) fn desired(&self, before: &Desired) -> Desired {
        let problems = self.rejected.values().cloned().collect();
        let mut desired = Desired { partial: self.old, problems, ..Desired::default() };
        for export in self.all().filter(|export| export.spec.mode == ExportMode::Serve) {
            let name = &export.spec.share_name;
            match share_of(export) {
                Ok(share) => {
                    desired.shares.insert(name.clone(), share);
                }
                Err(refusals) => {
                    let problem = |refusal| Problem { share: Some(name.clone()), ..Problem::from(refusal) };
                    desired.problems.extend(refusals.iter().map(problem));
                    if let Some(share) = before.shares.get(name) {
                        desired.shares.insert(name.clone(), share.clone());
                    }
                }
            }
        }
        desired
    }
}

/// The exports that a watch has reported, and the list that it is reporting.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    /// The exports.
    pub(crate) exports: Exports,
    listed: Exports,
}

impl Watched {
    /// The exports of an earlier agent's file; nothing has been reported yet.
    pub(crate) fn continuing(exports: Vec<VirtiofsExport>, now: Instant) -> Self {
        let mut watched = Watched { exports: Exports { old: true, ..Exports::default() }, listed: Exports::default() };
        exports.into_iter().for_each(|export| watched.exports.put(DeserializeGuard(Ok(export)), now));
        watched
    }

    /// Adds an event; returns true if the exports may have changed.
    pub(crate) fn apply(&mut self, event: Event<DeserializeGuard<VirtiofsExport>>, now: Instant) -> bool {
        match event {
            Event::Init => self.listed = Exports::default(),
            Event::InitApply(object) => {
                // Its last accepted version, and the time of its last change, are known from before.
                let name = object.name_any();
                if let Some(before) = self.exports.known.get(&name) {
                    self.listed.known.insert(name.clone(), before.clone());
                }
                if let Some(problem) = self.exports.rejected.get(&name) {
                    self.listed.rejected.insert(name, problem.clone());
                }
                self.listed.put(object, now);
            }
            Event::InitDone => {
                self.exports = std::mem::take(&mut self.listed);
                tracing::info!(exports = self.exports.known.len(), "exports received from the API server");
                return true;
            }
            Event::Apply(object) => {
                self.exports.put(object, now);
                return true;
            }
            Event::Delete(object) => {
                self.exports.remove(&object.name_any());
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};
    use virtiofs_config::{Access, EngineConfig};
    use virtiofs_crds::v1alpha1::ResolvedEngine;

    use super::*;

    /// An export of `share` on node n1, changed by `more` in its spec.
    pub(crate) fn export(share: &str, more: Value) -> VirtiofsExport {
        serde_json::from_value(document(share, more)).unwrap()
    }

    fn document(share: &str, more: Value) -> Value {
        let mut export = json!({
            "apiVersion": "virtiofs.dev/v1alpha1",
            "kind": "VirtiofsExport",
            "metadata": {
                "name": export_name(share, "n1"), "uid": "u", "generation": 3, "labels": {SHARE_LABEL: share},
                "ownerReferences": [{
                    "apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsShare", "name": share, "uid": "s", "controller": true,
                }],
            },
            "spec": {
                "shareName": share, "nodeName": "n1", "revision": "r1", "access": "ReadOnly", "content": "Shared",
                "source": {"hostPath": {"path": format!("/srv/{share}")}},
            },
        });
        let mut engine = json!(ResolvedEngine::from(&EngineConfig::stock(Access::ReadOnly)));
        let mut more = more.as_object().unwrap().clone();
        if let Some(Value::Object(changed)) = more.remove("engine") {
            engine.as_object_mut().unwrap().extend(changed);
        }
        export["spec"].as_object_mut().unwrap().extend(more);
        export["spec"]["engine"] = engine;
        export
    }

    fn received(share: &str, more: Value) -> DeserializeGuard<VirtiofsExport> {
        serde_json::from_value(document(share, more)).unwrap()
    }

    /// An export of `share` whose metadata somebody else has written.
    fn foreign(share: &str, field: &str, value: Value) -> DeserializeGuard<VirtiofsExport> {
        let mut export = document(share, json!({}));
        export["metadata"][field] = value;
        serde_json::from_value(export).unwrap()
    }

    fn shares(desired: &Desired) -> Vec<&str> {
        desired.shares.keys().map(String::as_str).collect()
    }

    fn problems(desired: &Desired) -> Vec<(Option<&str>, &str)> {
        desired.problems.iter().map(|it| (it.share.as_deref(), it.field.as_str())).collect()
    }

    #[test]
    fn a_draining_export_is_not_desired() {
        let mut exports = Exports::default();
        let now = Instant::now();
        exports.put(received("a", json!({})), now);
        exports.put(received("b", json!({"mode": "Drain"})), now);
        let desired = exports.desired(&Desired::default());
        assert_eq!(desired.shares.keys().collect::<Vec<_>>(), ["a"]);
        assert!(!desired.partial);
        exports.remove(&export_name("a", "n1"));
        exports.old = true;
        let desired = exports.desired(&desired);
        assert!(desired.shares.is_empty() && desired.partial);
    }

    #[test]
    fn an_invalid_export_keeps_its_last_share() {
        let mut exports = Exports::default();
        exports.put(received("a", json!({})), Instant::now());
        let before = exports.desired(&Desired::default());
        exports.put(received("a", json!({"content": "Immutable", "access": "ReadWrite"})), Instant::now());
        let after = exports.desired(&before);
        assert_eq!(after.shares, before.shares);
        assert_eq!(after.problems[0].share.as_deref(), Some("a"));
        assert!(exports.desired(&Desired::default()).shares.is_empty());
    }

    #[test]
    fn the_time_of_an_export_is_that_of_its_last_change() {
        let (mut exports, start) = (Exports::default(), Instant::now());
        let later = start + std::time::Duration::from_secs(1);
        exports.put(received("a", json!({})), start);
        exports.put(received("a", json!({})), later);
        assert_eq!(exports.known[&export_name("a", "n1")].1, start);
        exports.put(received("a", json!({"revision": "r2"})), later);
        assert_eq!(exports.known[&export_name("a", "n1")].1, later);
    }

    #[test]
    fn an_undecodable_export_does_not_stop_a_list_and_keeps_its_last_version() {
        use Event::{Apply, Delete, Init, InitApply, InitDone};
        let (mut watched, now) = (Watched::default(), Instant::now());
        let odd = |share| received(share, json!({"mode": "Hibernate"}));
        let good = |share| received(share, json!({}));
        let mut run = |events: Vec<Event<_>>| {
            let changes = events.into_iter().filter_map(|event| watched.apply(event, now).then_some(())).count();
            assert_eq!(changes, 1, "a list is one change");
            watched.exports.desired(&Desired::default())
        };
        let desired = run(vec![Init, InitApply(odd("a")), InitApply(good("b")), InitDone]);
        assert_eq!((shares(&desired), problems(&desired)), (vec!["b"], vec![(Some("a"), "")]));
        assert!(desired.problems[0].message.contains("Hibernate"), "{:?}", desired.problems);
        let desired = run(vec![Apply(good("a"))]);
        assert_eq!((shares(&desired), problems(&desired)), (vec!["a", "b"], vec![]));
        let desired = run(vec![Apply(odd("a"))]);
        assert_eq!((shares(&desired), problems(&desired)), (vec!["a", "b"], vec![(Some("a"), "")]));
        let desired = run(vec![Init, InitApply(odd("a")), InitDone]);
        assert_eq!((shares(&desired), problems(&desired)), (vec!["a"], vec![(Some("a"), "")]), "listed again");
        let desired = run(vec![Delete(odd("a"))]);
        assert_eq!((shares(&desired), problems(&desired)), (vec![], vec![]));
    }

    #[test]
    fn an_export_that_the_operator_did_not_write_is_not_served() {
        let now = Instant::now();
        let mut exports = Exports::default();
        exports.put(foreign("a", "ownerReferences", json!([])), now);
        exports.put(foreign("b", "name", json!("b-n1")), now);
        let desired = exports.desired(&Desired::default());
        assert_eq!((shares(&desired), exports.of("a"), exports.of("b")), (vec![], None, None));
        assert_eq!(
            problems(&desired),
            [(Some("a"), "metadata.ownerReferences"), (None, "metadata.name")],
            "another name says nothing about share b"
        );
    }

    #[test]
    fn an_export_that_loses_its_owner_keeps_its_last_version() {
        let now = Instant::now();
        let mut exports = Exports::default();
        exports.put(received("a", json!({})), now);
        let before = exports.desired(&Desired::default());
        let mut taken = document("a", json!({"mode": "Drain"}));
        taken["metadata"]["ownerReferences"] = json!([]);
        exports.put(serde_json::from_value(taken).unwrap(), now);
        let after = exports.desired(&before);
        assert_eq!((&after.shares, problems(&after)), (&before.shares, vec![(Some("a"), "metadata.ownerReferences")]));
        exports.put(received("a", json!({})), now);
        assert_eq!(exports.desired(&after), before);
    }
}
