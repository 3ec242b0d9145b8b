//! Step 0: the observed state of a share: the watched objects, and recent writes that no watch has confirmed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt};
use virtiofs_crds::export::export_name;
use virtiofs_crds::{VirtiofsExport, VirtiofsShare};

use super::Context;
use crate::cluster::NodeFacts;

/// The observed state of a share.
pub(crate) struct Observed {
    /// The share.
    pub(crate) object: Arc<VirtiofsShare>,
    /// All nodes.
    pub(crate) nodes: Vec<NodeFacts>,
    /// Its exports.
    pub(crate) exports: Vec<Arc<VirtiofsExport>>,
    /// True if it contains a write that no watch has confirmed.
    pub(crate) unconfirmed: bool,
    /// Time of the observation.
    pub(crate) now: Time,
}

/// A write to an export that the watch may not have confirmed yet.
#[derive(Clone)]
pub(crate) enum Written {
    /// It was created or updated.
    Applied(Arc<VirtiofsExport>),
    /// It was deleted.
    Deleted(Arc<VirtiofsExport>),
}

/// Reads the observed state.
pub(crate) fn observe(context: &Context, object: Arc<VirtiofsShare>) -> Observed {
    let (name, instant) = (object.name_any(), Instant::now());
    let object = match context.shares_written.get(&name, instant) {
        Some(written) if is_newer(written.as_ref(), object.as_ref()) => written,
        _ => object,
    };
    let watched = context.cluster.exports_of(&name);
    let written = context.exports_written.all(instant).into_iter().filter(|it| it.export().spec.share_name == name);
    let Overlaid { exports, unconfirmed, confirmed } = overlay(watched, written);
    // From here on the watch is right about them, also about their deletion.
    confirmed.iter().for_each(|name| context.exports_written.remove(name));
    // The reconcile of exports deletes all others.
    let own = |export: &Arc<VirtiofsExport>| is_own(export, &object.metadata);
    let exports = exports.into_iter().filter(own).collect();
    Observed { nodes: context.cluster.nodes(), exports, unconfirmed, now: Time(Timestamp::now()), object }
}

/// Watched exports with recent writes applied.
struct Overlaid {
    exports: Vec<Arc<VirtiofsExport>>,
    /// True if a write is not confirmed.
    unconfirmed: bool,
    /// Names of exports whose write is confirmed.
    confirmed: Vec<String>,
}

fn overlay(watched: Vec<Arc<VirtiofsExport>>, written: impl Iterator<Item = Written>) -> Overlaid {
    let mut exports: HashMap<String, Arc<VirtiofsExport>> =
        watched.into_iter().map(|export| (export.name_any(), export)).collect();
    let (mut unconfirmed, mut confirmed) = (false, Vec::new());
    for write in written {
        let name = write.export().name_any();
        let seen = exports.get(&name);
        match write {
            Written::Applied(export) if seen.is_none_or(|seen| is_newer(export.as_ref(), seen.as_ref())) => {
                unconfirmed = true;
                exports.insert(name, export);
            }
            Written::Deleted(export) if seen.is_some_and(|seen| seen.uid() == export.uid()) => {
                unconfirmed = true;
                exports.remove(&name);
            }
            _ => confirmed.push(name),
        }
    }
    Overlaid { exports: exports.into_values().collect(), unconfirmed, confirmed }
}

/// True if `a` is a later version than `b`. Resource versions are increasing numbers, which Kubernetes guarantees since
/// 1.35 and has always kept.
fn is_newer<K: Resource>(a: &K, b: &K) -> bool {
    let version = |it: &K| it.meta().resource_version.as_deref().and_then(|text| text.parse::<u64>().ok());
    version(a) > version(b)
}

/// True if the operator wrote the export for this share: it has the name that follows from share and node, and the share is
/// an owner. A share that is being deleted waits for exports without an owner as well: `--cascade=orphan` removes it.
pub(crate) fn is_own(export: &VirtiofsExport, share: &ObjectMeta) -> bool {
    let spec = &export.spec;
    let of_share = share.name.as_deref() == Some(&spec.share_name)
        && export.name_any() == export_name(&spec.share_name, &spec.node_name);
    let owners = export.owner_references();
    let owned = owners.iter().any(|owner| Some(&owner.uid) == share.uid.as_ref());
    of_share && (owned || (owners.is_empty() && share.deletion_timestamp.is_some()))
}

impl Written {
    fn export(&self) -> &Arc<VirtiofsExport> {
        match self {
            Written::Applied(export) | Written::Deleted(export) => export,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use virtiofs_config::{Access, EngineConfig};
    use virtiofs_crds::v1alpha1::ResolvedEngine;

    use super::*;

    fn export(name: &str, version: &str) -> Arc<VirtiofsExport> {
        let export = json!({
            "apiVersion": "virtiofs.dev/v1alpha1",
            "kind": "VirtiofsExport",
            "metadata": {"name": name, "uid": name, "resourceVersion": version},
            "spec": {"shareName": "s", "nodeName": "n", "revision": "1", "access": "ReadOnly", "content": "Shared",
                     "source": {"hostPath": {"path": "/srv"}}, "engine": ResolvedEngine::from(&EngineConfig::stock(Access::ReadOnly))},
        });
        Arc::new(serde_json::from_value(export).unwrap())
    }

    #[test]
    fn a_share_has_the_exports_that_were_made_for_it() {
        let (owned, owned_too) = (json!([{"uid": "s"}]), json!([{"uid": "x"}, {"uid": "s"}]));
        let (other, none) = (json!([{"uid": "x"}]), json!([]));
        let canonical = export_name("s", "n");
        for (name, owners, deleting, own) in [
            (canonical.as_str(), &owned, false, true),
            (&canonical, &owned_too, false, true),
            (&canonical, &other, false, false),
            (&canonical, &none, false, false),
            (&canonical, &none, true, true),
            (&canonical, &other, true, false),
            ("s-n", &owned, false, false),
            ("s-n", &none, true, false),
        ] {
            let mut export = (*export(name, "1")).clone();
            let owner = json!({"apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsShare", "name": "s"});
            let full = |uid: &Value| {
                let mut owner = owner.clone();
                owner["uid"] = uid["uid"].clone();
                owner
            };
            let owners: Vec<Value> = owners.as_array().unwrap().iter().map(full).collect();
            export.metadata.owner_references = serde_json::from_value(json!(owners)).unwrap();
            let share = ObjectMeta {
                name: Some("s".into()),
                uid: Some("s".into()),
                deletion_timestamp: deleting.then_some(Time(Timestamp::UNIX_EPOCH)),
                ..ObjectMeta::default()
            };
            assert_eq!(is_own(&export, &share), own, "{name} {owners:?} {deleting}");
        }
    }

    #[test]
    fn a_write_counts_until_the_watch_confirms_it() {
        use Written::{Applied, Deleted};
        // watched version, write -> resulting version, unconfirmed, confirmed
        for (watched, written, seen, unconfirmed, confirmed) in [
            (None, Applied(export("a", "9")), Some("9"), true, false),
            (Some("8"), Applied(export("a", "9")), Some("9"), true, false),
            (Some("9"), Applied(export("a", "9")), Some("9"), false, true),
            (Some("10"), Applied(export("a", "9")), Some("10"), false, true),
            (Some("8"), Deleted(export("a", "8")), None, true, false),
            (None, Deleted(export("a", "8")), None, false, true),
        ] {
            let known = watched.map(|version| export("a", version)).into_iter().collect();
            let overlaid = overlay(known, std::iter::once(written));
            let found = overlaid.exports.first().and_then(|it| it.resource_version());
            assert_eq!(
                (found.as_deref(), overlaid.unconfirmed, overlaid.confirmed.len()),
                (seen, unconfirmed, usize::from(confirmed)),
                "{watched:?}"
            );
        }
    }
}
