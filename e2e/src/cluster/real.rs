//! A cluster with one node and all parts of a real node: scheduler, kubelet, containerd. Nothing in it is simulated.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;

use super::containerd::Containerd;
use super::control_plane::{ControlPlane, Nodes};
use super::kubelet::Kubelet;
use super::sessions::{KEEPER_DIR, RUNTIME_DIR, processes_of};
use super::wait::{until, wait_for};
use super::{Kubectl, NAMESPACE, image, is_true, kubelet, tools};
use crate::isolation::{self, SERVICE};
use crate::parts::Parts;

/// The node's name.
const NODE: &str = "node";

/// A cluster in which nothing of this project is installed. Start it in an isolated test. Its daemons are stopped on
/// drop; containers end with the test's init process.
pub struct RealCluster {
    /// kubectl with all permissions.
    pub admin: Kubectl,
    kubelet: Kubelet,
    containerd: Containerd,
    control_plane: ControlPlane,
    tools: PathBuf,
    dir: TempDir,
}

impl RealCluster {
    /// Starts the cluster and waits until the node is ready.
    ///
    /// # Errors
    /// If a program is missing or does not start; its log is in the message.
    pub fn start(parts: &Parts) -> Result<Self> {
        let tools = tools()?;
        let dir = tempfile::Builder::new().prefix("cluster-").tempdir().context("making a directory for a node")?;
        let nodes = Nodes::Real { name: NODE, service: SERVICE };
        let control_plane = ControlPlane::start(&tools, dir.path(), nodes)?;
        let containerd = Containerd::start(dir.path())?;
        for archive in image::write_all(parts, dir.path())? {
            containerd.import(&archive)?;
        }
        let admin = Kubectl::new(tools.join("kubectl"), control_plane.kubeconfig());
        // Requests fail until the API server is up.
        wait_for("the API server", || Ok(admin.run(&["get", "--raw", "/readyz"]).ok().map(drop)))
            .map_err(|error| error.context(control_plane.logs()))?;
        let kubeconfig = control_plane.kubelet_kubeconfig();
        let kubelet = Kubelet::start(&tools, dir.path(), NODE, kubeconfig, &containerd)?;
        let cluster = RealCluster { admin, kubelet, containerd, control_plane, tools, dir };
        cluster.until_ready()?;
        // No pod is admitted before the controllers have created this account.
        until("the default service account", || cluster.logs(), || cluster.admin.get("serviceaccount", "default"))?;
        Ok(cluster)
    }

    /// Waits until the node is ready.
    ///
    /// # Errors
    /// If the node does not become ready in time.
    pub fn until_ready(&self) -> Result<()> {
        let look = || Ok(self.admin.get("node", NODE)?.filter(|node| is_true(node, "Ready")).map(drop));
        until("the node to be ready", || self.logs(), look)
    }

    /// Restarts the kubelet while pods run.
    ///
    /// # Errors
    /// If it does not start.
    pub fn restart_kubelet(&mut self) -> Result<()> {
        self.kubelet.restart()
    }

    /// Upgrades the chart to another image tag of the same image.
    ///
    /// # Errors
    /// If helm fails.
    pub fn upgrade(&self) -> Result<()> {
        let script = format!(
            "from=$(ctr --namespace k8s.io images list -q | grep '^localhost/virtiofs-operator:' | head -n 1)
             ctr --namespace k8s.io images tag --force \"$from\" localhost/virtiofs-operator:next
             helm upgrade virtiofs charts/virtiofs-operator --namespace {NAMESPACE} --reuse-values \\
                 --set image.tag=next"
        );
        self.shell(&script, "").map(drop)
    }

    /// Upgrades the chart with another value, and waits until all pods are replaced.
    ///
    /// # Errors
    /// If helm fails.
    pub fn set(&self, value: &str) -> Result<()> {
        let script = format!(
            "helm upgrade virtiofs charts/virtiofs-operator --namespace {NAMESPACE} --reuse-values --set '{value}' \
                 --wait --timeout 3m"
        );
        self.shell(&script, "").map(drop)
    }

    /// Simulates a power failure: kills everything on the node, empties its tmpfs directories, and boots it again.
    ///
    /// # Errors
    /// If it does not boot, or `meanwhile` fails.
    pub fn reboot(&mut self, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        self.kubelet.stop();
        self.containerd.stop();
        power_off(self.dir.path())?;
        meanwhile()?;
        self.containerd.restart()?;
        self.kubelet.restart()?;
        self.until_ready()
    }

    /// Runs a bash script in this repository as root with `input` as its standard input, and returns its standard
    /// output.
    ///
    /// # Errors
    /// If it fails; the message has its output.
    pub fn shell(&self, script: &str, input: &str) -> Result<String> {
        let path = std::env::join_paths(
            std::iter::once(self.tools.clone())
                .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
        )
        .context("adding the tools to PATH")?;
        let mut child = Command::new("bash")
            .args(["-euo", "pipefail", "-c", script])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
            .env("PATH", path)
            .env("KUBECONFIG", self.admin.kubeconfig())
            // Tools must not read files of the user who runs this.
            .env("HOME", self.dir.path())
            .env("CONTAINERD_ADDRESS", self.containerd.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("running bash")?;
        let mut stdin = child.stdin.take().context("bash has no standard input")?;
        // A program that exits before it has read everything reports an error itself.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().context("waiting for bash")?;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "`{script}` ended with {}\n{stdout}{stderr}", output.status);
        Ok(stdout.into_owned())
    }

    /// Temporary directory for the files of this cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Logs that explain a failure.
    pub fn logs(&self) -> String {
        [self.control_plane.logs(), self.containerd.log_tail(), self.kubelet.log_tail()].join("\n")
    }
}

/// Kills everything that a power failure ends. `dir` is the runtime's state directory.
fn power_off(dir: &Path) -> Result<()> {
    // Kills the shims first: otherwise they would record the end of their containers.
    for pid in processes_of("containerd-shim-runc-v2") {
        kill(pid, Signal::SIGKILL).context("killing a container's shim")?;
    }
    wait_for("all containers to end", || {
        let left = isolation::processes()?;
        for pid in &left {
            // The process may have ended already.
            let _ = kill(*pid, Signal::SIGKILL);
        }
        Ok(left.is_empty().then_some(()))
    })?;
    let run = [RUNTIME_DIR, KEEPER_DIR, "/run/containerd", "/run/netns"].map(Path::new);
    let state = dir.join("containerd-state");
    let volatile: Vec<&Path> = run.into_iter().chain([state.as_path()]).collect();
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading mounts")?;
    let of_pods = |point: &&str| {
        volatile.iter().any(|place| Path::new(point).starts_with(place) && Path::new(point) != *place)
            || Path::new(point).starts_with(Path::new(kubelet::ROOT).join("pods"))
    };
    for point in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).filter(of_pods) {
        umount2(point, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {point}"))?;
    }
    for place in volatile {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let removed = if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
            removed.with_context(|| format!("wiping {}", entry.path().display()))?;
        }
    }
    Ok(())
}
