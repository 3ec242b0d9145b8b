//! containerd with directories of its own, and the pods' network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};
use serde_json::json;

use super::image::PAUSE;
use super::wait::wait_for;
use crate::process::Process;

const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Directory of Debian's package containernetworking-plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// A container runtime. Stopped on drop; containers belong to their shims and continue.
pub(super) struct Containerd {
    process: Option<Process>,
    socket: PathBuf,
    dir: PathBuf,
}

impl Containerd {
    /// Starts containerd.
    pub(super) fn start(dir: &Path) -> Result<Self> {
        let (config, socket) = (dir.join("containerd.toml"), dir.join("containerd.sock"));
        write_network(dir)?;
        fs::write(&config, configuration(dir, &socket)?).context("writing containerd's configuration")?;
        let mut containerd = Containerd { process: None, socket, dir: dir.to_owned() };
        containerd.restart()?;
        Ok(containerd)
    }

    /// Stops containerd.
    pub(super) fn stop(&mut self) {
        self.process = None;
    }

    /// Stops containerd if it runs, and starts it again.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.stop();
        let mut command = Command::new("containerd");
        command.arg("--config").arg(self.dir.join("containerd.toml"));
        let process = Process::start(command, &self.dir.join("containerd.log"), STOP_TIMEOUT)?;
        wait_for("containerd", || {
            ensure!(process.ended()?.is_none(), "containerd ended\n{}", process.log_tail());
            Ok(self.ctr(&["version"]).ok().map(drop))
        })
        .map_err(|error| error.context(process.log_tail()))?;
        self.process = Some(process);
        Ok(())
    }

    /// The CRI endpoint that the kubelet connects to.
    pub(super) fn endpoint(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Path of containerd's socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Imports an image archive for the kubelet.
    pub(super) fn import(&self, archive: &Path) -> Result<()> {
        self.ctr(&["images", "import", &archive.display().to_string()]).map(drop)
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(&self.socket).args(["--namespace", "k8s.io"]).args(arguments);
        let output = ctr.output().context("running ctr")?;
        ensure!(output.status.success(), "ctr {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub(super) fn log_tail(&self) -> String {
        self.process.as_ref().map(Process::log_tail).unwrap_or_default()
    }
}

/// Writes the pods' network configuration: pods have addresses of their own and reach the node, and nothing else.
fn write_network(dir: &Path) -> Result<()> {
    let network = json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [{
        "type": "bridge",
        "bridge": "pods0",
        "isGateway": true,
        "ipam": {
            "type": "host-local",
            "dataDir": dir.join("addresses"),
            "ranges": [[{"subnet": "10.0.2.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }]});
    let networks = dir.join("cni");
    fs::create_dir_all(&networks).context("creating the directory of network configurations")?;
    fs::write(networks.join("pods.conflist"), network.to_string()).context("writing the pods' network configuration")
}

fn configuration(dir: &Path, socket: &Path) -> Result<String> {
    // overlayfs cannot use overlayfs as its upper layer.
    let on_overlay =
        statfs(dir).context("reading the type of a file system")?.filesystem_type() == OVERLAYFS_SUPER_MAGIC;
    let snapshotter = if on_overlay { "native" } else { "overlayfs" };
    let dir = dir.display();
    // Lowering the OOM score needs CAP_SYS_RESOURCE, which not every root has.
    Ok(format!(
        r#"version = 2
root = "{dir}/containerd"
state = "{dir}/containerd-state"
[grpc]
address = "{}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{PLUGINS}"
conf_dir = "{dir}/cni"
"#,
        socket.display()
    ))
}
