//! Step 1: what each node is to serve. Depends on the share alone.

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::Selector;
use virtiofs_crds::export::export_spec;
use virtiofs_crds::v1alpha1::EngineStatus;
use virtiofs_crds::{Refusal, Share, VirtiofsExportSpec, VirtiofsShare};

/// The desired state of a valid share.
#[derive(Clone, Debug)]
pub(crate) struct Desired {
    /// The spec of every export, without the node.
    pub(crate) template: VirtiofsExportSpec,
    /// The configuration of the engines.
    pub(crate) engine: EngineStatus,
    /// Labels that a node must have.
    pub(crate) selector: Selector,
    /// Number of nodes that may change at a time.
    pub(crate) max_unavailable: IntOrString,
    /// Number of recoveries within ten minutes beyond which a roll-out halts.
    pub(crate) max_recoveries: i64,
}

/// The desired state of a share, or every reason why the spec is rejected: this operator may have rules that the API
/// server's schema did not have when the share was written.
pub(crate) fn desired(object: &VirtiofsShare) -> Result<Desired, Vec<Refusal>> {
    let share = Share::from_object(object)?;
    let spec = &object.spec;
    let selector = spec.nodes.selector.as_ref().map(meta::LabelSelector::from).unwrap_or_default();
    let selector =
        Selector::try_from(selector).map_err(|e| vec![Refusal::new("spec.nodes.selector", e.to_string())])?;
    Ok(Desired {
        template: export_spec(&share, spec),
        engine: EngineStatus::from(&share.engine),
        selector,
        max_unavailable: spec.rollout.max_unavailable.clone(),
        max_recoveries: i64::from(spec.rollout.max_recoveries),
    })
}
