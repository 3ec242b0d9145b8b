//! A Debian host with systemd, as users have it: a VM whose root is the one that set-up made, with the programs of this
//! project laid over it.

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

/// From the start of QEMU until systemd has started its units: half a minute emulated, and more beside other work.
const BOOT: Duration = Duration::from_secs(600);
/// For any one script.
const SCRIPT: Duration = Duration::from_secs(300);
/// MiB of memory.
const MEMORY: u32 = 1536;
const APPEND: &str = "console=ttyS0 panic=-1 no_timer_check root=rootfs rootfstype=virtiofs rw apparmor=1 \
                      security=apparmor systemd.show_status=false";
/// What explains a failed step: units that failed, and what was logged.
const EXPLAIN: &str = "systemctl --failed --no-legend; /root/virtiofs-operator/target/release/virtiofsctl status 2>&1 | head -40; \
                       journalctl --no-pager --boot --lines 120 --output short-monotonic";

/// A host that is up. Dropped, its VM is killed.
pub struct Debian {
    channel: RefCell<Channel>,
    console: PathBuf,
    qemu: Process,
    _server: Process,
    _dir: TempDir,
}

impl Debian {
    /// Boots a host from the root at `root` and waits until its services are started. In it, `/root/virtiofs-operator`
    /// is like a checkout of this project in which `make build` has run, and `/usr/bin` has the test's guest `workload`.
    ///
    /// # Errors
    /// When a part is missing or the host does not come up; the message has what it printed.
    pub fn boot(parts: &Parts, root: &Path) -> Result<Self> {
        let accelerator = Accelerator::of_this_machine(parts)?;
        let dir = tempfile::Builder::new().prefix("host-").tempdir().context("making a directory for a host")?;
        let at = |name: &str| dir.path().join(name);
        lay_out(parts, &at("additions"))?;
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

    /// Runs a bash script as root and returns what came of it, whatever its status.
    ///
    /// # Errors
    /// When the host is gone or does not finish in time.
    pub fn run(&self, script: &str) -> Result<Output> {
        self.channel.borrow_mut().run(script, SCRIPT).with_context(|| self.last_words())
    }

    /// Runs a bash script that has to succeed, and returns its standard output.
    ///
    /// # Errors
    /// When it does not exit with 0, or as [`Debian::run`].
    pub fn must(&self, script: &str) -> Result<String> {
        let Output { status, stdout, stderr } = self.run(script)?;
        ensure!(status == 0, "`{script}` ended with {status} on the host\n{stdout}{stderr}");
        Ok(stdout)
    }

    /// Runs a script again and again until it succeeds, and returns its standard output.
    ///
    /// # Errors
    /// When it still fails after `limit`, with what it printed last; or as [`Debian::run`].
    pub fn until(&self, what: &str, limit: Duration, script: &str) -> Result<String> {
        let until = Instant::now() + limit;
        loop {
            let Output { status, stdout, stderr } = self.run(script)?;
            if status == 0 {
                return Ok(stdout);
            }
            ensure!(Instant::now() < until, "still not so after {limit:?}: {what}\n{stdout}{stderr}");
        }
    }

    /// State of the host, printed when a test fails.
    pub fn explain(&self) -> String {
        match self.channel.borrow_mut().run(EXPLAIN, SCRIPT) {
            Ok(output) => format!("---- on the host:\n{}{}", output.stdout, output.stderr),
            Err(error) => format!("{error:#}\n{}", self.last_words()),
        }
    }

    fn last_words(&self) -> String {
        format!("{}\n{}", self.qemu.log_tail(), process::tail(&self.console))
    }
}

/// The layer that has what this test adds to the root.
fn lay_out(parts: &Parts, layer: &Path) -> Result<()> {
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
    copy(&tree.join("target/debug/workload"), &layer.join("usr/bin/workload"))?;
    copy(&own.join("shell"), &layer.join("usr/lib/virtiofs-e2e/shell"))?;
    copy(&own.join("shell.service"), &layer.join("usr/lib/systemd/system/virtiofs-e2e.service"))?;
    let wanted = layer.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wanted).context("enabling the shell")?;
    symlink("/usr/lib/systemd/system/virtiofs-e2e.service", wanted.join("virtiofs-e2e.service"))
        .context("enabling the shell")
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file is in a directory")?;
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
    // QEMU 7.2 emulates two processors wrongly when one changes the kernel's code under the other, as static keys do: the
    // kernel panics on an int3 once in some runs.
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
