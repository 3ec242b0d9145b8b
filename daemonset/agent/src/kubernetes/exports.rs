//! This node's exports, and the desired state that follows from them: plain data and a pure function.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use kube::ResourceExt;
use virtiofs_client::report::Problem;
use virtiofs_crds::export::share_of;
use virtiofs_crds::{ExportMode, VirtiofsExport};

use crate::model::desired::Desired;

/// This node's exports.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exports {
    /// Each by its name, with the time of its last change.
    pub(crate) known: BTreeMap<String, (VirtiofsExport, Instant)>,
    /// True if these were read from an earlier agent's file. There may be others then, and nothing is withdrawn.
    pub(crate) old: bool,
}

impl Exports {
    /// Adds or updates an export.
    pub(crate) fn put(&mut self, export: VirtiofsExport, now: Instant) {
        let name = export.name_any();
        let same = |(known, _): &&(VirtiofsExport, Instant)| known.spec == export.spec && known.uid() == export.uid();
        let since = self.known.get(&name).filter(same).map_or(now, |(_, since)| *since);
        self.known.insert(name, (export, since));
    }

    /// Removes an export.
    pub(crate) fn remove(&mut self, export: &VirtiofsExport) {
        self.known.remove(&export.name_any());
    }

    /// All exports.
    pub(crate) fn all(&self) -> impl Iterator<Item = &VirtiofsExport> {
        self.known.values().map(|(export, _)| export)
    }

    /// The desired state. An export that drains is not in it; its sessions continue in the broker. An invalid export keeps the
    /// share of `before`.
    pub(crate) fn desired(&self, before: &Desired) -> Desired {
        let mut desired = Desired { partial: self.old, ..Desired::default() };
        for export in self.all().filter(|export| export.spec.mode == ExportMode::Serve) {
            let name = &export.spec.share_name;
            match share_of(export) {
                Ok(share) => {
                    desired.shares.insert(name.clone(), share);
                }
                Err(refusals) => {
                    desired.problems.extend(refusals.iter().map(|refusal| Problem {
                        file: None::<PathBuf>,
                        share: Some(name.clone()),
                        ..Problem::from(refusal)
                    }));
                    if let Some(share) = before.shares.get(name) {
                        desired.shares.insert(name.clone(), share.clone());
                    }
                }
            }
        }
        desired
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// An export of `share`, changed by `more` in its spec.
    pub(crate) fn export(share: &str, more: Value) -> VirtiofsExport {
        let mut export = json!({
            "apiVersion": "virtiofs.dev/v1alpha1",
            "kind": "VirtiofsExport",
            "metadata": {"name": format!("{share}-n1"), "uid": "u", "generation": 3},
            "spec": {
                "shareName": share, "nodeName": "n1", "revision": "r1", "access": "ReadOnly", "content": "Shared",
                "source": {"hostPath": {"path": format!("/srv/{share}")}},
            },
        });
        export["spec"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(export).unwrap()
    }

    #[test]
    fn a_draining_export_is_not_desired() {
        let mut exports = Exports::default();
        let now = Instant::now();
        exports.put(export("a", json!({})), now);
        exports.put(export("b", json!({"mode": "Drain"})), now);
        let desired = exports.desired(&Desired::default());
        assert_eq!(desired.shares.keys().collect::<Vec<_>>(), ["a"]);
        assert!(!desired.partial);
        exports.remove(&export("a", json!({})));
        exports.old = true;
        let desired = exports.desired(&desired);
        assert!(desired.shares.is_empty() && desired.partial);
    }

    #[test]
    fn an_invalid_export_keeps_its_last_share() {
        let mut exports = Exports::default();
        exports.put(export("a", json!({})), Instant::now());
        let before = exports.desired(&Desired::default());
        exports.put(export("a", json!({"content": "Immutable", "access": "ReadWrite"})), Instant::now());
        let after = exports.desired(&before);
        assert_eq!(after.shares, before.shares);
        assert_eq!(after.problems[0].share.as_deref(), Some("a"));
        assert!(exports.desired(&Desired::default()).shares.is_empty());
    }

    #[test]
    fn the_time_of_an_export_is_that_of_its_last_change() {
        let (mut exports, start) = (Exports::default(), Instant::now());
        let later = start + std::time::Duration::from_secs(1);
        exports.put(export("a", json!({})), start);
        exports.put(export("a", json!({})), later);
        assert_eq!(exports.known["a-n1"].1, start);
        exports.put(export("a", json!({"revision": "r2"})), later);
        assert_eq!(exports.known["a-n1"].1, later);
    }
}
