//! Step 1: what a share asks of every node. Needs nothing but the share.

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::Selector;
use virtiofs_crds::export::export_spec;
use virtiofs_crds::v1alpha1::EngineStatus;
use virtiofs_crds::{Refusal, Share, VirtiofsExportSpec, VirtiofsShare};

/// A share that makes sense.
#[derive(Clone, Debug)]
pub(crate) struct Declared {
    /// What is asked of each node; which node is left open.
    pub(crate) template: VirtiofsExportSpec,
    /// The configuration of the engines.
    pub(crate) engine: EngineStatus,
    /// Labels that a node must have.
    pub(crate) selector: Selector,
    /// How many nodes may be changing at a time.
    pub(crate) max_unavailable: IntOrString,
    /// How many recoveries within ten minutes are too many for a change to go on.
    pub(crate) max_recoveries: i64,
}

/// Reads a share, or says every reason why it makes no sense: this operator may know rules that the API server's
/// schema did not have when the share was written.
pub(crate) fn declare(object: &VirtiofsShare) -> Result<Declared, Vec<Refusal>> {
    let share = Share::from_object(object)?;
    let spec = &object.spec;
    let selector = spec.nodes.selector.as_ref().map(meta::LabelSelector::from).unwrap_or_default();
    let selector =
        Selector::try_from(selector).map_err(|e| vec![Refusal::new("spec.nodes.selector", e.to_string())])?;
    Ok(Declared {
        template: export_spec(&share, spec),
        engine: EngineStatus::from(&share.engine),
        selector,
        max_unavailable: spec.rollout.max_unavailable.clone(),
        max_recoveries: i64::from(spec.rollout.max_recoveries),
    })
}
