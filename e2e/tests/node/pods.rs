//! The node by itself.

use anyhow::{Result, ensure};
use e2e::cluster::VM_IMAGE;
use serde_json::json;

use crate::world::World;

/// The ground that all else stands on: an unprivileged pod of uid 107 runs QEMU, reaches the API server, and goes.
pub(crate) fn a_pod_runs_and_goes(world: &mut World) -> Result<()> {
    world.admin().apply(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "plain"},
        "spec": {"containers": [{
            "name": "plain",
            "image": VM_IMAGE,
            "command": ["sh", "-c", "echo | busybox nc -w 5 $KUBERNETES_SERVICE_HOST 443 && exec busybox sleep 600"],
            "securityContext": {"runAsUser": 107, "capabilities": {"drop": ["ALL"]}},
        }], "terminationGracePeriodSeconds": 0},
    }))?;
    world.until_pod("plain", "ready", |pod| e2e::cluster::is_true(pod, "Ready"))?;
    let version = world.admin().run(&["exec", "plain", "--", "qemu-system-x86_64", "--version"])?;
    ensure!(version.contains("QEMU emulator"), "{version}");
    world.admin().run(&["delete", "pod", "plain", "--timeout=60s"])?;
    Ok(())
}
