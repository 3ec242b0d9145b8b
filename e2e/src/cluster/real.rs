//! A cluster of one node, with everything that a node has: scheduler, kubelet, containerd. Nothing in it is simulated.

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
use crate::parts::Parts;
use crate::seclusion::{self, SERVICE};

/// The node's name.
const NODE: &str = "node";

/// A cluster without anything of ours in it. To be started by a test that keeps to itself. Dropped, its daemons end;
/// containers end with the test's first process.
pub struct RealCluster {
    /// Everything is permitted through this.
    pub admin: Kubectl,
    kubelet: Kubelet,
    containerd: Containerd,
    control_plane: ControlPlane,
    tools: PathBuf,
    dir: TempDir,
}

impl RealCluster {
    /// Starts it, and waits until the node is ready.
    ///
    /// # Errors
    /// When a program is missing or does not start; its log is in the message.
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
        // Until it answers, a failure is what is to be expected.
        wait_for("the API server", || Ok(admin.run(&["get", "--raw", "/readyz"]).ok().map(drop)))
            .map_err(|error| error.context(control_plane.logs()))?;
        let kubeconfig = control_plane.kubelet_kubeconfig();
        let kubelet = Kubelet::start(&tools, dir.path(), NODE, kubeconfig, &containerd)?;
        let cluster = RealCluster { admin, kubelet, containerd, control_plane, tools, dir };
        cluster.until_ready()?;
        // Controllers make it some time after the namespace, and no pod is admitted before.
        until("the default service account", || cluster.logs(), || cluster.admin.get("serviceaccount", "default"))?;
        Ok(cluster)
    }

    /// Waits until the node is ready.
    ///
    /// # Errors
    /// When it does not become so.
    pub fn until_ready(&self) -> Result<()> {
        let look = || Ok(self.admin.get("node", NODE)?.filter(|node| is_true(node, "Ready")).map(drop));
        until("the node to be ready", || self.logs(), look)
    }

    /// Ends the kubelet and starts another, under all that runs.
    ///
    /// # Errors
    /// When it does not start.
    pub fn restart_kubelet(&mut self) -> Result<()> {
        self.kubelet.restart()
    }

    /// Upgrades the chart to another image, which is the same under another name.
    ///
    /// # Errors
    /// When helm fails.
    pub fn upgrade(&self) -> Result<()> {
        let script = format!(
            "from=$(ctr --namespace k8s.io images list -q | grep '^localhost/virtiofs-operator:' | head -n 1)
             ctr --namespace k8s.io images tag --force \"$from\" localhost/virtiofs-operator:next
             helm upgrade virtiofs charts/virtiofs-operator --namespace {NAMESPACE} --reuse-values \\
                 --set image.tag=next"
        );
        self.shell(&script, "").map(drop)
    }

    /// The node goes down, with all that runs on it and all that is not on a disk, and comes up again.
    ///
    /// # Errors
    /// When it does not come up, or what is done meanwhile fails.
    pub fn reboot(&mut self, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        self.kubelet.stop();
        self.containerd.stop();
        power_off(self.dir.path())?;
        meanwhile()?;
        self.containerd.restart()?;
        self.kubelet.restart()?;
        self.until_ready()
    }

    /// Runs a script in this repository with all rights and with `input` as standard input, and
    /// returns what it prints.
    ///
    /// # Errors
    /// When it fails; the message has its output.
    pub fn shell(&self, script: &str, input: &str) -> Result<String> {
        let path = std::env::join_paths(
            std::iter::once(self.tools.clone())
                .chain(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())),
        )
        .context("putting the tools on the path")?;
        let mut child = Command::new("bash")
            .args(["-euo", "pipefail", "-c", script])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
            .env("PATH", path)
            .env("KUBECONFIG", self.admin.kubeconfig())
            // Reads no file of the user who runs this.
            .env("HOME", self.dir.path())
            .env("CONTAINERD_ADDRESS", self.containerd.socket())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("running bash")?;
        let mut stdin = child.stdin.take().context("bash has no standard input")?;
        // A program that ends without reading all of it says itself why.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().context("waiting for bash")?;
        let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "`{script}` ended with {}\n{said}{complained}", output.status);
        Ok(said.into_owned())
    }

    /// Files of this cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What explains a failure.
    pub fn logs(&self) -> String {
        [self.control_plane.logs(), self.containerd.log_tail(), self.kubelet.log_tail()].join("\n")
    }
}

/// What a power failure does to a node whose runtime has its state in `dir`.
fn power_off(dir: &Path) -> Result<()> {
    // Shims first: they would record the death of their containers.
    for pid in processes_of("containerd-shim-runc-v2") {
        kill(pid, Signal::SIGKILL).context("killing a container's shim")?;
    }
    wait_for("all containers to be dead", || {
        let left = seclusion::processes()?;
        for pid in &left {
            // One that has just died is what was wanted.
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
