//! The node itself, and pods that have a volume but no VM.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use e2e::cluster::{VM_IMAGE, is_true, volume_of};
use serde_json::{Value, json};
use testkit::guest::{Guest, GuestConfig};

use crate::world::{VMS, World};

/// Precondition of all other tests: an unprivileged pod with uid 107 runs QEMU, reaches the API server, and is deleted.
pub(crate) fn a_pod_runs_and_is_deleted(world: &mut World) -> Result<()> {
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
    world.until_pod("default", "plain", "ready", |pod| is_true(pod, "Ready"))?;
    let version = world.admin().run(&["exec", "plain", "--", "qemu-system-x86_64", "--version"])?;
    ensure!(version.contains("QEMU emulator"), "{version}");
    world.delete_pod("default", "plain")
}

impl World {
    /// Creates a pod with a volume of a share, waits until it runs, and returns it.
    pub(crate) fn create_pod_with_volume(&self, name: &str, share: &str) -> Result<Value> {
        let mut volume = volume_of(share);
        volume["name"] = json!("share");
        self.admin().apply(&json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": VMS},
            "spec": {
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                "securityContext": {"runAsUser": 107, "runAsGroup": 107},
                "containers": [{
                    "name": "holder",
                    "image": VM_IMAGE,
                    "command": ["sh", "-c", "ls /share/virtiofs.sock && exec busybox sleep 3600"],
                    "volumeMounts": [{"name": "share", "mountPath": "/share"}],
                }],
                "volumes": [volume],
            },
        }))?;
        self.until_pod(VMS, name, "running with its volume", |pod| is_true(pod, "Ready"))
    }

    /// Connects to the volume of such a pod, like a VMM in the pod.
    pub(crate) fn connect(&self, pod: &Value) -> Result<Guest> {
        let uid = pod["metadata"]["uid"].as_str().context("the pod has no uid")?;
        let volume = PathBuf::from(format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~csi/share/mount"));
        // The volume's path is too long for a socket address.
        let short = self.cluster.dir().join(&uid[..8]);
        if !short.exists() {
            symlink(&volume, &short).with_context(|| format!("linking {}", volume.display()))?;
        }
        Guest::boot(GuestConfig::new(short.join("virtiofs.sock")).small()).context("connecting to a volume")
    }
}
