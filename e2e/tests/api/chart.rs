//! The chart against a real API server.

use anyhow::{Context, Result};

use crate::permissions::refused;
use crate::world::World;

/// Values that change what the templates render.
const VALUES: &[&[&str]] = &[
    &[],
    &["allowedSources={/srv/vm,/var/lib/containers,/var/lib/kubelet-data}", "kubeletDir=/var/lib/k0s/kubelet"],
    &["allowedSources={/var/lib/kubelet-data,/var/runner,/var/run/media}"],
    &["broker.sandbox=Namespace", "broker.moreCapabilities={MKNOD,SETFCAP,SYS_RESOURCE}", "allowedSources={/srv}"],
    &["crds.enabled=false", "admission.enabled=false", "flowControl.enabled=false"],
    &["operator.replicas=1", "operator.priorityClassName=", "nodeSelector.kvm=yes", "operator.nodeSelector.infra=yes"],
    &["image.pullSecrets[0].name=registry", "image.tag=1.2.3", "image.pullPolicy=Always", "log.format=text"],
    &["resourceQuota.enabled=true", "resourceQuota.pods=20", "operator.tolerations[0].operator=Exists"],
    &["dashboard.enabled=true", "workloads.enabled=false"],
    &["metrics.tlsSecret=virtiofs-metrics", "metrics.authorization=true"],
    &["networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.team=monitoring"],
    &["networkPolicy.enabled=false"],
    &["broker.updateStrategy=OnDelete", "keeper.image.repository=example.com/keeper", "keeper.image.tag=1.2.3"],
    &["agent.maxUnavailable=3"],
];

/// Invalid values, with words of the error message.
const INVALID: &[(&str, &[&str])] = &[
    ("kubletDir=/var", &["additional properties 'kubletDir' not allowed"]),
    ("allowedSources=/srv", &["/allowedSources", "want array"]),
    ("allowedSources={srv}", &["allowedSources[0]: \"srv\" is not absolute", "such as /srv/vm"]),
    ("allowedSources={/srv,/}", &["allowedSources[1]", "use directories"]),
    ("allowedSources={/srv/vm/}", &["is not normalized; write \"/srv/vm\""]),
    ("allowedSources={/srv/../etc}", &["write \"/etc\""]),
    ("allowedSources={/run}", &["allowedSources[0]: /run overlaps /run/virtiofs"]),
    ("allowedSources={/srv,/var/run}", &["allowedSources[1]: /var/run overlaps /run/virtiofs"]),
    ("allowedSources={/var/run/virtiofs/engines}", &["overlaps /run/virtiofs"]),
    ("allowedSources={/var}", &["allowedSources[0]: /var overlaps /var/lib/kubelet"]),
    ("allowedSources={/var/lib/kubelet/pods}", &["overlaps /var/lib/kubelet"]),
    ("allowedSources={/proc/1/root}", &["overlaps /proc"]),
    ("allowedSources={/srv,/srv}", &["items at 0 and 1 are equal"]),
    ("kubeletDir=var/lib/kubelet", &["kubeletDir: \"var/lib/kubelet\" is not absolute"]),
    ("broker.sandbox=chroot", &["/broker/sandbox", "'Chroot', 'Namespace'"]),
    ("broker.moreCapabilities={CAP_MKNOD}", &["/broker/moreCapabilities/0", "'MKNOD'"]),
    ("broker.resources.limits.memory=1Gi", &["broker.resources.limits.memory", "end all engines", "remove it"]),
    ("metrics.authorization=true", &["metrics.authorization: clients would send", "set metrics.tlsSecret"]),
    ("networkPolicy.metricsFrom=monitoring", &["/networkPolicy/metricsFrom", "want array"]),
    ("volumes.perPod=0", &["/volumes/perPod", "want 1"]),
    ("broker.updateStrategy=Recreate", &["/broker/updateStrategy", "'RollingUpdate', 'OnDelete'"]),
    ("operator.replicas=0", &["/operator/replicas", "want 1"]),
    ("agent.maxUnavailable=0%", &["/agent/maxUnavailable", "'0%'"]),
    ("image.pullSecrets={registry}", &["/image/pullSecrets/0", "want object"]),
    ("image.tag=2", &["/image/tag", "want string"]),
    ("log.format=xml", &["/log/format", "'text', 'json'"]),
    ("workloads=false", &["/workloads", "want object"]),
    ("alerts.runbooks=https://example.com", &["/alerts/runbooks", "'/$'"]),
    ("podMonitor.interval=soon", &["/podMonitor/interval", "'soon'"]),
];

pub(crate) fn the_api_server_accepts_the_chart(world: &mut World) -> Result<()> {
    for values in VALUES {
        let options: Vec<&str> = values.iter().flat_map(|value| ["--set", *value]).collect();
        let documents = world.cluster.chart(&options)?;
        world.admin().try_text(&documents).with_context(|| format!("with {values:?}"))?;
    }
    Ok(())
}

pub(crate) fn invalid_values_are_rejected(world: &mut World) -> Result<()> {
    for (value, words) in INVALID {
        for word in *words {
            refused(value, world.cluster.chart(&["--set", value]), word)?;
        }
    }
    Ok(())
}
