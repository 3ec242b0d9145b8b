//! VMs in pods: an unprivileged QEMU with uid 107, on volumes of shares.

use std::os::unix::fs::chown;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Kubectl, RealCluster, image};
use crate::accelerator::Accelerator;
use crate::guest::{Guest, GuestSpec, Vmm, qemu_arguments};

/// Uid of QEMU, as in KubeVirt and with libvirt on some distributions.
const QEMU: u32 = 107;
/// Directory in the pod below which a share's volume is mounted.
const VOLUMES: &str = "/run/shares";
/// Interval between two polls of a pod.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// A pod that runs a VM.
#[derive(Debug, Clone)]
pub struct VmPod<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The share of its only volume, and the tag of the guest's device.
    pub share: &'a str,
    /// The volume as in a pod spec: `{"csi": {...}}`.
    pub volume: Value,
    /// The pod's termination grace period in seconds. A `stubborn` VM takes all of it.
    pub grace: u32,
    /// True if QEMU ignores SIGTERM.
    pub stubborn: bool,
}

/// An inline volume of a share, without the volume's name.
pub fn volume_of(share: &str) -> Value {
    json!({"csi": {"driver": "csi.virtiofs.dev", "readOnly": true, "volumeAttributes": {"share": share}}})
}

impl<'a> VmPod<'a> {
    /// A pod with an inline volume of a share.
    pub fn new(namespace: &'a str, name: &'a str, share: &'a str) -> Self {
        VmPod { namespace, name, share, volume: volume_of(share), grace: 5, stubborn: false }
    }

    /// The pod's manifest. The guest's console and sockets are in `dir` on the node.
    fn manifest(&self, dir: &Path) -> Value {
        let socket = Path::new(VOLUMES).join(self.share).join("virtiofs.sock");
        let spec = GuestSpec { memory: 256, ..GuestSpec::default() }.with_device(self.share, &socket);
        let (kernel, initramfs) = (Path::new(image::KERNEL), Path::new(image::INITRAMFS));
        let qemu = qemu_arguments(&spec, Accelerator::Tcg, kernel, initramfs, dir);
        let start = if self.stubborn {
            "trap '' TERM; qemu-system-x86_64 \"$@\" & wait; wait"
        } else {
            "exec qemu-system-x86_64 \"$@\""
        };
        let command: Vec<String> = ["sh", "-c", start, "sh"].map(str::to_owned).into_iter().chain(qemu).collect();
        let mut volume = self.volume.clone();
        volume["name"] = json!("share");
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "namespace": self.namespace},
            "spec": {
                "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": self.grace,
                "restartPolicy": "Never",
                "securityContext": {"runAsUser": QEMU, "runAsGroup": QEMU, "runAsNonRoot": true},
                "containers": [{
                    "name": "vm",
                    "image": image::VM,
                    "command": command,
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "capabilities": {"drop": ["ALL"]},
                        "readOnlyRootFilesystem": true,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "volumeMounts": [
                        {"name": "share", "mountPath": format!("{VOLUMES}/{}", self.share)},
                        {"name": "guest", "mountPath": dir},
                    ],
                }],
                "volumes": [volume, {"name": "guest", "hostPath": {"path": dir, "type": "Directory"}}],
            },
        })
    }
}

impl RealCluster {
    /// Creates a pod with a VM, and waits until its guest accepts scripts. Nothing is mounted yet. The pod is deleted
    /// on drop.
    ///
    /// # Errors
    /// If the pod does not start or the guest does not boot.
    pub fn boot(&self, pod: &VmPod<'_>) -> Result<Guest> {
        let start = Instant::now();
        let dir = self.create(pod)?;
        let vmm = Pod { admin: self.admin.clone(), namespace: pod.namespace.to_owned(), name: pod.name.to_owned() };
        Guest::attach(Box::new(vmm), dir, Accelerator::Tcg, start)
    }

    /// Creates a pod with a VM, which may fail to start, and returns the directory for its guest's console and sockets.
    ///
    /// # Errors
    /// If the API server rejects it.
    pub fn create(&self, pod: &VmPod<'_>) -> Result<TempDir> {
        let dir = tempfile::Builder::new().prefix("vm-").tempdir_in(self.dir());
        let dir = dir.context("creating a directory for a guest")?;
        chown(dir.path(), Some(QEMU), Some(QEMU)).context("changing the owner of a directory to QEMU")?;
        self.admin.apply(&pod.manifest(dir.path()))?;
        Ok(dir)
    }
}

/// A pod whose only container runs QEMU.
struct Pod {
    admin: Kubectl,
    namespace: String,
    name: String,
}

impl Pod {
    fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.admin.run(&[&["-n", &self.namespace], arguments].concat())
    }
}

impl Vmm for Pod {
    fn ended(&self) -> Result<Option<ExitStatus>> {
        let text = self.kubectl(&["get", "pod", &self.name, "--ignore-not-found", "-o", "json"])?;
        if text.is_empty() {
            return Ok(Some(ExitStatus::from_raw(0)));
        }
        let pod: Value = serde_json::from_str(&text).context("reading a pod")?;
        let code = &pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"];
        // A wait status as in wait(2).
        Ok(code.as_i64().and_then(|code| i32::try_from(code).ok()).map(|code| ExitStatus::from_raw(code << 8)))
    }

    fn wait_for(&self, limit: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + limit;
        loop {
            let ended = self.ended()?;
            if ended.is_some() || Instant::now() >= until {
                return Ok(ended);
            }
            sleep(POLL_INTERVAL);
        }
    }

    fn log_tail(&self) -> String {
        let about = self.kubectl(&["describe", "pod", &self.name]).unwrap_or_default();
        let log = self.kubectl(&["logs", &self.name, "--tail=50"]).unwrap_or_default();
        format!("{about}\n{log}")
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // If this fails, the pod remains and the checks for leftovers report it.
        let _ = self.kubectl(&["delete", "pod", &self.name, "--ignore-not-found", "--wait=false"]);
    }
}
