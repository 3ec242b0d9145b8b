//! The chart, against a real API server.

use anyhow::{Context, Result};

use crate::world::World;

/// Values that make templates say something else.
const VALUES: &[&[&str]] = &[
    &[],
    &["allowedSources={/srv/vm,/var/lib/containers}", "kubeletDir=/var/lib/k0s/kubelet"],
    &["broker.sandbox=Namespace", "broker.moreCapabilities={MKNOD,SETFCAP,SYS_RESOURCE}", "allowedSources={/srv}"],
    &["crds.enabled=false", "admission.enabled=false", "flowControl.enabled=false"],
    &["operator.replicas=1", "operator.priorityClassName=", "nodeSelector.kvm=yes", "operator.nodeSelector.infra=yes"],
    &["image.pullSecrets[0].name=registry", "image.tag=1.2.3", "image.pullPolicy=Always", "log.format=text"],
    &["dashboard.enabled=true", "workloads.enabled=false"],
];

pub(crate) fn the_api_server_accepts_the_chart(world: &mut World) -> Result<()> {
    for values in VALUES {
        let options: Vec<&str> = values.iter().flat_map(|value| ["--set", *value]).collect();
        let documents = world.cluster.chart(&options)?;
        world.admin().try_text(&documents).with_context(|| format!("with {values:?}"))?;
    }
    Ok(())
}
