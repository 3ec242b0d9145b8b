//! Step 4: what is written to and deleted from the exports. A pure function.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use virtiofs_crds::{ExportMode, VirtiofsExport, VirtiofsExportSpec};

use super::declare::Declared;
use super::health::{baseline, is_drained, is_untouched};
use super::place::{Member, Placement};
use super::rollout::Rollout;

/// What is to be done to the exports of a share.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    /// Exports that there are not yet.
    pub(crate) create: Vec<VirtiofsExportSpec>,
    /// Exports that are to be otherwise.
    pub(crate) update: Vec<(Arc<VirtiofsExport>, VirtiofsExportSpec)>,
    /// Exports that have done their duty.
    pub(crate) delete: Vec<Arc<VirtiofsExport>>,
}

impl Changes {
    /// How many writes that is.
    pub(crate) fn len(&self) -> usize {
        self.create.len() + self.update.len() + self.delete.len()
    }
}

/// Decides what is to be done to the exports; nothing when all are as they should be.
pub(crate) fn changes(declared: Option<&Declared>, placement: &Placement, rollout: &Rollout, now: &Time) -> Changes {
    let mut changes = Changes { delete: placement.orphans.clone(), ..Changes::default() };
    for member in placement.leavers.values() {
        leave(member, &mut changes);
    }
    let Some(declared) = declared else { return changes };
    let on = |node: &str| VirtiofsExportSpec { node_name: node.to_owned(), ..declared.template.clone() };
    changes.create.extend(placement.newcomers.iter().map(|node| on(node)));
    for (node, member) in &placement.members {
        let wanted = wanted(on(node), member, rollout.advance.contains(node), now);
        if wanted != member.export.spec {
            changes.update.push((member.export.clone(), wanted));
        }
    }
    changes
}

/// What an export should say now.
fn wanted(target: VirtiofsExportSpec, member: &Member, advances: bool, now: &Time) -> VirtiofsExportSpec {
    let current = &member.export.spec;
    if current.revision == target.revision {
        // Whatever else somebody has written into it is put right.
        return VirtiofsExportSpec { baseline: current.baseline.clone(), ..target };
    }
    if current.mode == ExportMode::Drain {
        // It was to end and is wanted again: there is nothing that it could do worse than.
        return VirtiofsExportSpec { baseline: None, ..target };
    }
    if advances {
        return VirtiofsExportSpec { baseline: Some(baseline(&member.export, now.clone())), ..target };
    }
    // Whom an admin admits or locks out does not wait for its turn.
    VirtiofsExportSpec { consumers: target.consumers, ..current.clone() }
}

/// An export that is not wanted any more ends when its last session has.
fn leave(member: &Member, changes: &mut Changes) {
    let export = &member.export;
    // On a node that is down nobody will ever answer; where nobody ever did, nobody is served.
    let nobody_there = !member.reachable && is_untouched(export);
    if is_drained(export) || nobody_there {
        changes.delete.push(export.clone());
    } else if export.spec.mode != ExportMode::Drain {
        changes.update.push((export.clone(), VirtiofsExportSpec { mode: ExportMode::Drain, ..export.spec.clone() }));
    }
}
