//! Step 0: what is known about a share: what the watches have brought, and what was written since.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::{Resource, ResourceExt};
use virtiofs_crds::{VirtiofsExport, VirtiofsShare};

use super::Context;
use crate::cluster::NodeFacts;

/// What is known about a share.
pub(crate) struct Observed {
    /// The share.
    pub(crate) object: Arc<VirtiofsShare>,
    /// All nodes.
    pub(crate) nodes: Vec<NodeFacts>,
    /// Its exports.
    pub(crate) exports: Vec<Arc<VirtiofsExport>>,
    /// Is something in here that no watch has confirmed?
    pub(crate) ahead: bool,
    /// When this was.
    pub(crate) now: Time,
}

/// A write to an export that a watch may not have brought back yet.
#[derive(Clone)]
pub(crate) enum Written {
    /// It is so now.
    Applied(Arc<VirtiofsExport>),
    /// It is gone.
    Deleted(Arc<VirtiofsExport>),
}

/// Reads what is known.
pub(crate) fn observe(context: &Context, object: Arc<VirtiofsShare>) -> Observed {
    let (name, instant) = (object.name_any(), Instant::now());
    let object = match context.shares_written.get(&name, instant) {
        Some(written) if is_newer(written.as_ref(), object.as_ref()) => written,
        _ => object,
    };
    let watched = context.cluster.exports_of(&name);
    let written = context.exports_written.all(instant).into_iter().filter(|it| it.export().spec.share_name == name);
    let Overlaid { exports, ahead, confirmed } = overlay(watched, written);
    // From here on the watch is right about them, their deletion included.
    confirmed.iter().for_each(|name| context.exports_written.forget(name));
    // What another share of this name has left is for the garbage collector.
    let own = |export: &Arc<VirtiofsExport>| is_owned(export, &object);
    let exports = exports.into_iter().filter(own).collect();
    Observed { nodes: context.cluster.nodes(), exports, ahead, now: Time(Timestamp::now()), object }
}

/// Exports as watched, with what was written since.
struct Overlaid {
    exports: Vec<Arc<VirtiofsExport>>,
    /// Is there something in them that no watch has brought?
    ahead: bool,
    /// Names of those whose write a watch has brought.
    confirmed: Vec<String>,
}

fn overlay(watched: Vec<Arc<VirtiofsExport>>, written: impl Iterator<Item = Written>) -> Overlaid {
    let mut exports: HashMap<String, Arc<VirtiofsExport>> =
        watched.into_iter().map(|export| (export.name_any(), export)).collect();
    let (mut ahead, mut confirmed) = (false, Vec::new());
    for write in written {
        let name = write.export().name_any();
        let seen = exports.get(&name);
        match write {
            Written::Applied(export) if seen.is_none_or(|seen| is_newer(export.as_ref(), seen.as_ref())) => {
                ahead = true;
                exports.insert(name, export);
            }
            Written::Deleted(export) if seen.is_some_and(|seen| seen.uid() == export.uid()) => {
                ahead = true;
                exports.remove(&name);
            }
            _ => confirmed.push(name),
        }
    }
    Overlaid { exports: exports.into_values().collect(), ahead, confirmed }
}

/// Is `a` a later state than `b`? Resource versions are numbers that grow, as Kubernetes promises since 1.35 and has
/// always kept.
fn is_newer<K: Resource>(a: &K, b: &K) -> bool {
    let version = |it: &K| it.meta().resource_version.as_deref().and_then(|text| text.parse::<u64>().ok());
    version(a) > version(b)
}

fn is_owned(export: &VirtiofsExport, share: &VirtiofsShare) -> bool {
    export.owner_references().iter().any(|owner| Some(&owner.uid) == share.metadata.uid.as_ref())
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
    use serde_json::json;

    use super::*;

    fn export(name: &str, version: &str) -> Arc<VirtiofsExport> {
        let export = json!({
            "apiVersion": "virtiofs.dev/v1alpha1",
            "kind": "VirtiofsExport",
            "metadata": {"name": name, "uid": name, "resourceVersion": version},
            "spec": {"shareName": "s", "nodeName": "n", "revision": "1", "access": "ReadOnly", "content": "Shared",
                     "source": {"hostPath": {"path": "/srv"}}},
        });
        Arc::new(serde_json::from_value(export).unwrap())
    }

    #[test]
    fn what_was_written_counts_until_the_watch_has_brought_it() {
        use Written::{Applied, Deleted};
        // watched version, written -> seen version, ahead, confirmed
        for (watched, written, seen, ahead, confirmed) in [
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
                (found.as_deref(), overlaid.ahead, overlaid.confirmed.len()),
                (seen, ahead, usize::from(confirmed)),
                "{watched:?}"
            );
        }
    }
}
