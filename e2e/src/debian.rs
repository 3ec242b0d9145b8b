//! A Debian host with systemd, as users have it: a VM whose root file system was made by set-up, with the programs of
//! this project in an overlay.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::accelerator::Accelerator;
use crate::channel::{Channel, Output};
use crate::parts::Parts;
use crate::process::{self, Process};
use crate::stock::wait_for_socket;

/// Time limit from the start of QEMU until systemd has started its units: half a minute if emulated, more under load.
const BOOT: Duration = Duration::from_secs(600);
/// Time limit of a script.
const SCRIPT: Duration = Duration::from_secs(300);
/// Memory of the VM, in MiB.
const MEMORY: u32 = 1536;
const APPEND: &str = "console=ttyS0 panic=-1 no_timer_check root=rootfs rootfstype=virtiofs rw apparmor=1 \
                      security=apparmor systemd.show_status=false";
/// Script that prints what explains a failed step: failed units and the journal.
const EXPLAIN: &str = "systemctl --failed --no-legend; /root/virtiofs-operator/target/release/virtiofsctl status 2>&1 | head -40; \
                       journalctl --no-pager --boot --lines 120 --output short-monotonic";

/// A running host. Its VM is killed on drop.
pub struct Debian {
    channel: RefCell<Channel>,
    console: PathBuf,
    qemu: Process,
    _server: Process,
    _dir: TempDir,
}

impl Debian {
    /// Boots a host from the root file system at `root` and waits until systemd has started its services.
    /// `/root/virtiofs-operator` of the host is like a checkout of this project after `make build`, and `/usr/bin` has
    /// the test guest `workload`.
    ///
    /// # Errors
    /// If a part is missing or the host does not boot; the message has its output.
    pub fn boot(parts: &Parts, root: &Path) -> Result<Self> {
        let accelerator = Accelerator::of_this_machine(parts)?;
        let dir = tempfile::Builder::new().prefix("host-").tempdir().context("making a directory for a host")?;
        let at = |name: &str| dir.path().join(name);
        fill_layer(parts, &at("additions"))?;
        let layers = [at("additions"), parts.modules.clone(), root.to_owned()];
        let server = serve_root(parts, &layers, dir.path())?;
        let mut command = Command::new(&parts.qemu);
        command.args(arguments(accelerator, parts, dir.path()));
        let qemu = Process::start(command, &at("qemu.log"), Duration::ZERO)?;
        let console = at("console.log");
        let alive = || match qemu.ended()? {
            Some(status) => bail!("QEMU ended with {status}"),
            None => Ok(()),
        };
        let channel = Channel::open(&at("port"), BOOT, alive)
            .with_context(|| [qemu.log_tail(), server.log_tail(), process::tail(&console)].join("\n"))?;
        Ok(Self { channel: RefCell::new(channel), console, qemu, _server: server, _dir: dir })
    }

    /// Runs a bash script as root and returns its output, whatever its exit status.
    ///
    /// # Errors
    /// If the host has ended or does not finish in time.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.channel.borrow_mut().run(script, SCRIPT).with_context(|| self.console_tail())
    }

    /// Runs a bash script that has to exit with 0, and returns its standard output.
    ///
    /// # Errors
    /// If it does not exit with 0; otherwise as [`Debian::run`].
    pub fn must(&self, script: &str) -> Result<String> {
        let Output { status, stdout, stderr } = self.run(script)?;
        ensure!(status == 0, "`{script}` ended with {status} on the host\n{stdout}{stderr}");
        Ok(stdout)
    }

    /// Runs a script repeatedly until it exits with 0, and returns its standard output.
    ///
    /// # Errors
    /// If it still fails after `limit`, with its last output; otherwise as [`Debian::run`].
    pub fn until(&self, what: &str, limit: Duration, script: &str) -> Result<String> {
        let until = Instant::now() + limit;
        loop {
            let Output { status, stdout, stderr } = self.run(script)?;
            if status == 0 {
                return Ok(stdout);
            }
            ensure!(Instant::now() < until, "timed out after {limit:?} waiting for {what}\n{stdout}{stderr}");
        }
    }

    /// State of the host, to explain a failed test.
    pub fn explain(&self) -> String {
        match self.channel.borrow_mut().run(EXPLAIN, SCRIPT) {
            Ok(output) => format!("---- on the host:\n{}{}", output.stdout, output.stderr),
            Err(error) => format!("{error:#}\n{}", self.console_tail()),
        }
    }

    fn console_tail(&self) -> String {
        format!("{}\n{}", self.qemu.log_tail(), process::tail(&self.console))
    }
}

/// Fills the upper layer of the root file system with the files of this project.
fn fill_layer(parts: &Parts, layer: &Path) -> Result<()> {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("host");
    let checkout = Path::new("root/virtiofs-operator");
    for program in ["virtiofs-agent", "virtiofs-broker", "virtiofs-keeper", "virtiofs-engine", "virtiofsctl"] {
        copy(&parts.binary(program)?, &layer.join(checkout).join("target/release").join(program))?;
    }
    for unit in ["virtiofs-agent.service", "virtiofs-broker.service", "virtiofs-keeper.service"] {
        let unit = Path::new("deploy/systemd").join(unit);
        copy(&tree.join(&unit), &layer.join(checkout).join(&unit))?;
    }
    let packages = tree.join("target/packages");
    for (folder, revision) in [(checkout.join("target/packages"), "-1"), (PathBuf::from("root/next"), "-2")] {
        for package in packages_of(&packages, revision)? {
            copy(&packages.join(&package), &layer.join(&folder).join(&package))?;
        }
    }
    copy(&tree.join("target/debug/workload"), &layer.join("usr/bin/workload"))?;
    copy(&own.join("shell"), &layer.join("usr/lib/virtiofs-e2e/shell"))?;
    copy(&own.join("shell.service"), &layer.join("usr/lib/systemd/system/virtiofs-e2e.service"))?;
    let wanted = layer.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wanted).context("enabling the shell")?;
    symlink("/usr/lib/systemd/system/virtiofs-e2e.service", wanted.join("virtiofs-e2e.service"))
        .context("enabling the shell")
}

/// The files of packages of this revision.
fn packages_of(directory: &Path, revision: &str) -> Result<Vec<PathBuf>> {
    let of = |package: &str| package.contains(&format!("{revision}_")) || package.contains(&format!("{revision}."));
    let entries = fs::read_dir(directory).with_context(|| format!("{}: run `make host`", directory.display()))?;
    let names: Vec<_> = entries.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<_>>()?;
    let names: Vec<PathBuf> =
        names.into_iter().filter(|name| name.to_str().is_some_and(of)).map(PathBuf::from).collect();
    ensure!(names.len() == 2, "{}: no .deb and .rpm of revision {revision}, but {names:?}", directory.display());
    Ok(names)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file has a parent directory")?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn serve_root(parts: &Parts, layers: &[PathBuf], dir: &Path) -> Result<Process> {
    let (root, socket) = (dir.join("root"), dir.join("root.sock"));
    fs::create_dir(&root).context("making a directory for the root")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("host/serve-root");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private"]).arg(script);
    command.arg(root).arg(&parts.virtiofsd).arg(&socket).args(layers);
    let server = Process::start(command, &dir.join("virtiofsd.log"), Duration::from_secs(5))?;
    wait_for_socket(&server, &socket)?;
    Ok(server)
}

fn arguments(accelerator: Accelerator, parts: &Parts, dir: &Path) -> Vec<String> {
    let at = |name: &str| dir.join(name).display().to_string();
    let mut arguments: Vec<String> = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        .into_iter()
        .chain(accelerator.options())
        .map(str::to_owned)
        .collect();
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    option("-machine", "q35,memory-backend=ram".to_owned());
    // QEMU 7.2 emulates two processors incorrectly if one patches kernel code that the other executes, as static keys
    // do: the guest kernel occasionally panics with int3.
    option("-smp", "1".to_owned());
    option("-m", MEMORY.to_string());
    option("-object", format!("memory-backend-memfd,id=ram,size={MEMORY}M,share=on"));
    option("-kernel", parts.kernel.display().to_string());
    option("-append", APPEND.to_owned());
    option("-serial", format!("file:{}", at("console.log")));
    option("-device", "virtio-serial-pci".to_owned());
    option("-chardev", format!("socket,id=port,path={},server=on,wait=off", at("port")));
    option("-device", "virtserialport,chardev=port,name=virtiofs.e2e".to_owned());
    option("-chardev", format!("socket,id=root,path={}", at("root.sock")));
    option("-device", "vhost-user-fs-pci,chardev=root,tag=rootfs,queue-size=1024".to_owned());
    arguments
}
