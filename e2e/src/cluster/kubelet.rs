//! A kubelet.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::json;

use super::containerd::Containerd;
use crate::process::Process;
use crate::seclusion;

const FAREWELL: Duration = Duration::from_secs(10);
/// Where every kubelet keeps things; a test that keeps to itself has a directory of its own there.
pub(super) const ROOT: &str = "/var/lib/kubelet";

/// A kubelet that can be stopped and started again. Dropped, it ends; pods continue.
pub(super) struct Kubelet {
    process: Option<Process>,
    program: PathBuf,
    kubeconfig: PathBuf,
    name: &'static str,
    dir: PathBuf,
}

impl Kubelet {
    /// Starts it as the node `name`.
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
            "address": seclusion::NODE,
            // The network is this test's alone.
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": seclusion::cgroup()?,
            "clusterDNS": ["10.0.0.10"],
            "containerRuntimeEndpoint": containerd.endpoint(),
            // A full disk of the test machine evicts no image and no pod.
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

    /// Ends it.
    pub(super) fn stop(&mut self) {
        self.process = None;
    }

    /// Ends it, as far as it has not ended, and starts another.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.stop();
        self.run()
    }

    fn run(&mut self) -> Result<()> {
        let mut kubelet = Command::new(&self.program);
        kubelet.arg("--config").arg(self.dir.join("kubelet.json"));
        kubelet.arg("--kubeconfig").arg(&self.kubeconfig);
        kubelet.arg("--root-dir").arg(ROOT).arg("--cert-dir").arg(self.dir.join("kubelet-pki"));
        kubelet.args(["--hostname-override", self.name, "--node-ip", &seclusion::NODE.to_string(), "-v=2"]);
        self.process = Some(Process::start(kubelet, &self.dir.join("kubelet.log"), FAREWELL)?);
        Ok(())
    }

    pub(super) fn log_tail(&self) -> String {
        self.process.as_ref().map(Process::log_tail).unwrap_or_default()
    }
}
