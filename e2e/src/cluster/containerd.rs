//! containerd with a place of its own, and pods' network.

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

const FAREWELL: Duration = Duration::from_secs(5);
/// Debian's containernetworking-plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// A container runtime. Dropped, it ends; containers belong to their shims and continue.
pub(super) struct Containerd {
    process: Option<Process>,
    socket: PathBuf,
    dir: PathBuf,
}

impl Containerd {
    /// Starts it.
    pub(super) fn start(dir: &Path) -> Result<Self> {
        let (config, socket) = (dir.join("containerd.toml"), dir.join("containerd.sock"));
        write_network(dir)?;
        fs::write(&config, configuration(dir, &socket)?).context("writing containerd's configuration")?;
        let mut containerd = Containerd { process: None, socket, dir: dir.to_owned() };
        containerd.restart()?;
        Ok(containerd)
    }

    /// Ends it.
    pub(super) fn stop(&mut self) {
        self.process = None;
    }

    /// Ends it, as far as it has not ended, and starts another.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.stop();
        let mut command = Command::new("containerd");
        command.arg("--config").arg(self.dir.join("containerd.toml"));
        let process = Process::start(command, &self.dir.join("containerd.log"), FAREWELL)?;
        wait_for("containerd", || {
            ensure!(process.ended()?.is_none(), "containerd ended\n{}", process.log_tail());
            Ok(self.ctr(&["version"]).ok().map(drop))
        })
        .map_err(|error| error.context(process.log_tail()))?;
        self.process = Some(process);
        Ok(())
    }

    /// What the kubelet connects to.
    pub(super) fn endpoint(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Where it listens.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Makes an image known to the kubelet.
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

/// Pods have addresses of their own and reach what the node has; nothing leads outside.
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
    fs::create_dir_all(&networks).context("making a directory for networks")?;
    fs::write(networks.join("pods.conflist"), network.to_string()).context("writing the pods' network")
}

fn configuration(dir: &Path, socket: &Path) -> Result<String> {
    // overlayfs does not stand on overlayfs.
    let on_overlay = statfs(dir).context("looking at a file system")?.filesystem_type() == OVERLAYFS_SUPER_MAGIC;
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
