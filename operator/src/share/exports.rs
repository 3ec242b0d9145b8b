//! Step 4: the exports to create, update and delete. A pure function.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use virtiofs_crds::export::SHARE_LABEL;
use virtiofs_crds::{ExportMode, VirtiofsExport, VirtiofsExportSpec, VirtiofsShare};

use super::desired::Desired;
use super::health::{baseline, is_drained, never_reported};
use super::placement::{Member, Placement};
use super::rollout::Rollout;

/// Changes of the exports of a share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    /// Exports to create.
    pub(crate) create: Vec<VirtiofsExportSpec>,
    /// Exports to update, with their new spec.
    pub(crate) update: Vec<(Arc<VirtiofsExport>, VirtiofsExportSpec)>,
    /// Exports to delete.
    pub(crate) delete: Vec<Arc<VirtiofsExport>>,
}

impl Changes {
    /// Number of writes.
    pub(crate) fn len(&self) -> usize {
        self.create.len() + self.update.len() + self.delete.len()
    }
}

/// The changes that bring the exports to the desired state; none if they are in it.
pub(crate) fn changes(desired: Option<&Desired>, placement: &Placement, rollout: &Rollout, now: &Time) -> Changes {
    let mut changes = Changes { delete: placement.orphans.clone(), ..Changes::default() };
    for member in placement.leaving.values() {
        drain(member, &mut changes);
    }
    let Some(desired) = desired else { return changes };
    let on = |node: &str| VirtiofsExportSpec { node_name: node.to_owned(), ..desired.template.clone() };
    changes.create.extend(placement.pending.iter().map(|node| on(node)));
    for (node, member) in &placement.members {
        let spec = next_spec(on(node), member, rollout.advance.contains(node), now);
        if spec != member.export.spec {
            changes.update.push((member.export.clone(), spec));
        }
    }
    changes
}

/// The spec that an export has next, on the way to `target`.
fn next_spec(target: VirtiofsExportSpec, member: &Member, advances: bool, now: &Time) -> VirtiofsExportSpec {
    let current = &member.export.spec;
    if current.revision == target.revision {
        // Changes by other writers are reverted.
        return VirtiofsExportSpec { baseline: current.baseline.clone(), ..target };
    }
    if current.mode == ExportMode::Drain {
        // It was draining and is selected again: there is no state that it could regress from.
        return VirtiofsExportSpec { baseline: None, ..target };
    }
    if advances {
        return VirtiofsExportSpec { baseline: Some(baseline(&member.export, now.clone())), ..target };
    }
    // A change of the consumers does not wait for the roll-out.
    VirtiofsExportSpec { consumers: target.consumers, ..current.clone() }
}

/// What other writers have changed in the metadata of a share's exports, as merge patches that revert it. Each export is
/// owned by its share alone, has the label of the share, and no finalizer, which could keep it for ever.
pub(crate) fn corrections(object: &VirtiofsShare, placement: &Placement) -> Vec<(Arc<VirtiofsExport>, Value)> {
    let members = placement.members.values().chain(placement.leaving.values()).map(|member| &member.export);
    let exports = members.chain(&placement.orphans);
    exports.filter_map(|export| Some((export.clone(), correction(object, export)?))).collect()
}

fn correction(object: &VirtiofsShare, export: &VirtiofsExport) -> Option<Value> {
    let (share, owners) = (object.name_any(), object.controller_owner_ref(&()).map(|owner| vec![owner]));
    let finalizers = foreign_finalizers_removed(&export.metadata);
    let correct = export.metadata.owner_references == owners
        && export.labels().get(SHARE_LABEL) == Some(&share)
        && export.finalizers() == finalizers;
    (!correct).then(|| {
        json!({"metadata": {
            "uid": export.uid(), "ownerReferences": owners, "labels": {SHARE_LABEL: share}, "finalizers": finalizers,
        }})
    })
}

/// The finalizers of an object without those that neither the operator nor the garbage collector uses.
pub(crate) fn foreign_finalizers_removed(metadata: &ObjectMeta) -> Vec<String> {
    let finalizers = metadata.finalizers.iter().flatten();
    finalizers.filter(|it| matches!(it.as_str(), "foregroundDeletion" | "orphan")).cloned().collect()
}

/// Drains an export whose node is not selected any more, and deletes it when its last session has ended.
fn drain(member: &Member, changes: &mut Changes) {
    let export = &member.export;
    // An unreachable node does not confirm, and one that never reported serves nobody.
    let serves_nobody = !member.reachable && never_reported(export);
    if is_drained(export) || serves_nobody {
        changes.delete.push(export.clone());
    } else if export.spec.mode != ExportMode::Drain {
        changes.update.push((export.clone(), VirtiofsExportSpec { mode: ExportMode::Drain, ..export.spec.clone() }));
    }
}
