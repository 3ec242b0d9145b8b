//! The kubelet of a real node.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::json;

use super::containerd::Containerd;
use crate::isolation;
use crate::process::Process;

const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// The root directory of every kubelet. An isolated test has its own directory mounted there.
pub(super) const ROOT: &str = "/var/lib/kubelet";

/// A kubelet that can be restarted. Stopped on drop; pods continue.
pub(super) struct Kubelet {
    process: Option<Process>,
    program: PathBuf,
    kubeconfig: PathBuf,
    name: &'static str,
    dir: PathBuf,
}

impl Kubelet {
    /// Starts the kubelet of the node `name`.
    pub(super) fn start(
        tools: &Path,
        dir: &Path,
        name: &'static str,
        kubeconfig: PathBuf,
        containerd: &Containerd,
    ) -> Result<Self> {
        let open_files = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of open files")?.1;
        let configuration = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": isolation::NODE,
            // The network namespace belongs to this test only.
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": isolation::cgroup()?,
            "clusterDNS": ["10.0.0.10"],
            "containerRuntimeEndpoint": containerd.endpoint(),
            // A full disk of the test machine must not evict images or pods.
            "evictionHard": {"memory.available": "50Mi"},
            "imageGCHighThresholdPercent": 100,
            "failCgroupV1": false,
            "failSwapOn": false,
            "maxOpenFiles": open_files.min(1_000_000),
            "podLogsDir": dir.join("pod-logs"),
            "resolvConf": "",
        });
        fs::write(dir.join("kubelet.json"), configuration.to_string())
            .context("writing the kubelet's configuration")?;
        let program = tools.join("kubelet");
        let mut kubelet = Kubelet { process: None, program, kubeconfig, name, dir: dir.to_owned() };
        kubelet.run()?;
        Ok(kubelet)
    }

    /// Stops the kubelet.
    pub(super) fn stop(&mut self) {
        self.process = None;
    }

    /// Stops the kubelet if it runs, and starts it again.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.stop();
        self.run()
    }

    fn run(&mut self) -> Result<()> {
        let mut kubelet = Command::new(&self.program);
        kubelet.arg("--config").arg(self.dir.join("kubelet.json"));
        kubelet.arg("--kubeconfig").arg(&self.kubeconfig);
        kubelet.arg("--root-dir").arg(ROOT).arg("--cert-dir").arg(self.dir.join("kubelet-pki"));
        kubelet.args(["--hostname-override", self.name, "--node-ip", &isolation::NODE.to_string(), "-v=2"]);
        self.process = Some(Process::start(kubelet, &self.dir.join("kubelet.log"), STOP_TIMEOUT)?);
        Ok(())
    }

    pub(super) fn log_tail(&self) -> String {
        self.process.as_ref().map(Process::log_tail).unwrap_or_default()
    }
}
