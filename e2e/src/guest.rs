//! A real Linux guest in QEMU.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::accelerator::Accelerator;
use crate::channel::{Channel, Output};
use crate::initramfs;
use crate::monitor;
use crate::parts::Parts;
use crate::process::{self, Process};

/// Time limit for boot. An emulated guest takes a few seconds on two shared cores; after a minute it hangs.
const BOOT: Duration = Duration::from_secs(90);
/// The kernel command line. `no_timer_check`: an emulated guest on a busy host may miss the ticks with which its kernel
/// tests the timer, and would panic.
const APPEND: &str = "console=ttyS0 panic=-1 loglevel=5 no_timer_check";
/// Time limit of a script on an emulated processor, including a load's last round.
const SCRIPT: Duration = Duration::from_secs(120);

/// A virtiofs device.
#[derive(Debug, Clone)]
pub struct Device {
    /// The name by which the guest mounts it, at most 36 bytes.
    pub tag: String,
    /// The vhost-user socket of its file server.
    pub socket: PathBuf,
}

/// Configuration of a guest.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// Memory in MiB, all of it shared with the file servers.
    pub memory: u32,
    /// Memory in MiB that can be plugged in later.
    pub pluggable: u32,
    /// Number of virtual processors.
    pub processors: u32,
    /// The virtiofs devices.
    pub devices: Vec<Device>,
}

impl Default for GuestSpec {
    fn default() -> Self {
        Self { memory: 512, pluggable: 0, processors: 1, devices: Vec::new() }
    }
}

impl GuestSpec {
    /// Adds a virtiofs device.
    #[must_use]
    pub fn with_device(mut self, tag: &str, socket: &Path) -> Self {
        self.devices.push(Device { tag: tag.to_owned(), socket: socket.to_owned() });
        self
    }
}

/// A running guest that accepts scripts. Its QEMU is killed on drop.
pub struct Guest {
    vmm: Box<dyn Vmm>,
    channel: Channel,
    console: PathBuf,
    boot: Duration,
    accelerator: Accelerator,
    loads: u32,
    dir: TempDir,
}

impl Guest {
    /// Boots a guest and waits until its init accepts scripts. Nothing is mounted yet.
    ///
    /// # Errors
    /// If QEMU does not start or the guest does not boot; the message has the end of both logs.
    pub fn boot(parts: &Parts, spec: &GuestSpec) -> Result<Self> {
        let accelerator = Accelerator::of_this_machine(parts)?;
        let dir = tempfile::Builder::new().prefix("guest-").tempdir().context("making a directory for a guest")?;
        let at = |name: &str| dir.path().join(name);
        initramfs::write(parts, &at("initramfs"))?;

        let start = Instant::now();
        let mut command = Command::new(&parts.qemu);
        command.args(qemu_arguments(spec, accelerator, &parts.kernel, &at("initramfs"), dir.path()));
        let qemu = Process::start(command, &at("qemu.log"), Duration::ZERO)?;
        Self::attach(Box::new(qemu), dir, accelerator, start)
    }

    /// Waits until the guest of a started QEMU accepts scripts. QEMU has its sockets in `dir`.
    pub(crate) fn attach(vmm: Box<dyn Vmm>, dir: TempDir, accelerator: Accelerator, start: Instant) -> Result<Self> {
        let console = dir.path().join("console.log");
        let channel = Channel::open(&dir.path().join("port"), BOOT, || still_running(&*vmm))
            .with_context(|| format!("{}\n{}", vmm.log_tail(), process::tail(&console)))?;
        Ok(Self { vmm, channel, console, boot: start.elapsed(), accelerator, loads: 0, dir })
    }

    /// Time from the start of QEMU until the guest accepted scripts.
    pub fn boot_time(&self) -> Duration {
        self.boot
    }

    /// The accelerator that executes the guest's instructions.
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// Runs a shell script in the guest and returns its result, whatever its exit status.
    ///
    /// # Errors
    /// If the guest has ended or does not finish in time.
    pub fn run(&mut self, script: &str) -> Result<Output> {
        self.channel.run(script, SCRIPT).with_context(|| format!("{}\n{}", self.vmm.log_tail(), self.console_tail()))
    }

    /// Runs a shell script that has to exit with 0, and returns its standard output.
    ///
    /// # Errors
    /// If it does not exit with 0; otherwise as [`Guest::run`].
    pub fn must(&mut self, script: &str) -> Result<String> {
        let output = self.run(script)?;
        ensure!(
            output.status == 0,
            "`{script}` ended with {} in the guest\n{}{}\n{}",
            output.status,
            output.stdout,
            output.stderr,
            self.console_tail()
        );
        Ok(output.stdout)
    }

    /// Mounts a virtiofs device on `/mnt/<tag>` and returns that path.
    ///
    /// # Errors
    /// If the guest cannot mount it.
    pub fn mount(&mut self, tag: &str) -> Result<String> {
        let at = format!("/mnt/{tag}");
        self.must(&format!("mkdir -p {at} && mount -t virtiofs {tag} {at}"))?;
        Ok(at)
    }

    /// Mounts overlayfs over these directories (topmost first) at `/mnt/<name>`, with the upper layer in the guest's
    /// memory, and returns that path.
    ///
    /// # Errors
    /// If the guest cannot mount it.
    pub fn overlay(&mut self, name: &str, lower: &[String]) -> Result<String> {
        let (at, above) = (format!("/mnt/{name}"), format!("/run/{name}"));
        self.must(&format!(
            "mkdir -p {at} {above} && mount -t tmpfs tmpfs {above} && mkdir {above}/upper {above}/work && \
             mount -t overlay -o lowerdir={},upperdir={above}/upper,workdir={above}/work overlay {at}",
            lower.join(":")
        ))?;
        Ok(at)
    }

    /// Plugs in memory that QEMU cannot share (`memory-backend-ram`), as much as the spec allows. The guest uses it for
    /// movable pages: page cache and programs, but not its kernel's structures.
    ///
    /// # Errors
    /// If QEMU rejects the command, or the guest does not find the memory.
    pub fn plug_unshared_memory(&mut self, mib: u32) -> Result<()> {
        let blocks = "ls -d /sys/devices/system/memory/memory[0-9]* | wc -l";
        let online = "echo online_movable >/sys/devices/system/memory/auto_online_blocks";
        let before = self.must(&format!("{online} && {blocks}"))?;
        let size = u64::from(mib) << 20;
        self.command("object-add", &json!({"qom-type": "memory-backend-ram", "id": "unshared", "size": size}))?;
        self.command("device_add", &json!({"driver": "pc-dimm", "id": "dimm", "memdev": "unshared"}))?;
        let script = format!(
            "for attempt in $(seq 200); do
                 [ $({blocks}) -gt {} ] && ! grep -qs offline /sys/devices/system/memory/memory[0-9]*/state && exit 0
                 sleep 0.1
             done
             exit 1",
            before.trim()
        );
        self.must(&script).map(drop)
    }

    /// Stops the VM: first its processors, then its devices.
    ///
    /// # Errors
    /// If QEMU rejects the command.
    pub fn pause(&self) -> Result<()> {
        self.command("stop", &json!({}))
    }

    /// Resumes a paused VM.
    ///
    /// # Errors
    /// If QEMU rejects the command.
    pub fn resume(&self) -> Result<()> {
        self.command("cont", &json!({}))
    }

    /// Resets the VM and waits until its init accepts scripts again. Nothing is mounted then.
    ///
    /// # Errors
    /// If QEMU rejects the command, or the guest does not boot.
    pub fn reset(&mut self) -> Result<()> {
        // By default a reset (the kernel's after a panic) ends QEMU.
        self.command("set-action", &json!({"reboot": "reset"}))?;
        self.command("system_reset", &json!({}))?;
        self.channel.wait_until_ready(Instant::now() + BOOT).with_context(|| self.console_tail())?;
        self.command("set-action", &json!({"reboot": "shutdown"}))
    }

    fn command(&self, name: &str, arguments: &Value) -> Result<()> {
        monitor::execute(&self.dir.path().join("monitor"), name, arguments).with_context(|| self.vmm.log_tail())
    }

    /// A new number for a load of this guest.
    pub(crate) fn next_load(&mut self) -> u32 {
        self.loads += 1;
        self.loads
    }

    /// The end of the guest's console.
    pub fn console_tail(&self) -> String {
        process::tail(&self.console)
    }

    /// Unmounts everything, powers the guest off and waits until QEMU ends.
    ///
    /// # Errors
    /// If the guest does not power off in time, or QEMU fails.
    pub fn shutdown(mut self) -> Result<()> {
        // The power-off may lose the answer; only the end of QEMU counts.
        let _ = self.run("(umount -a -r; sync; poweroff -f) >/dev/null 2>&1 &");
        match self.vmm.wait_for(BOOT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("QEMU ended with {status}\n{}", self.vmm.log_tail()),
            None => bail!("the guest did not power off\n{}", self.console_tail()),
        }
    }
}

/// The process or pod that runs a guest's QEMU. QEMU is killed on drop.
pub(crate) trait Vmm {
    /// Its exit status, if it has ended.
    fn ended(&self) -> Result<Option<ExitStatus>>;

    /// Waits until it ends; `None` if it still runs after `limit`.
    fn wait_for(&self, limit: Duration) -> Result<Option<ExitStatus>>;

    /// The end of its output.
    fn log_tail(&self) -> String;
}

impl Vmm for Process {
    fn ended(&self) -> Result<Option<ExitStatus>> {
        self.ended()
    }

    fn wait_for(&self, limit: Duration) -> Result<Option<ExitStatus>> {
        self.wait_for(limit)
    }

    fn log_tail(&self) -> String {
        self.log_tail()
    }
}

fn still_running(vmm: &dyn Vmm) -> Result<()> {
    match vmm.ended()? {
        Some(status) => bail!("QEMU ended with {status}"),
        None => Ok(()),
    }
}

/// QEMU's options for a guest whose console and sockets are in `dir`.
pub(crate) fn qemu_arguments(
    spec: &GuestSpec,
    accelerator: Accelerator,
    kernel: &Path,
    initramfs: &Path,
    dir: &Path,
) -> Vec<String> {
    let at = |name: &str| dir.join(name).display().to_string();
    let mut arguments: Vec<String> = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        .into_iter()
        .chain(accelerator.options())
        .map(str::to_owned)
        .collect();
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    option("-machine", "q35,memory-backend=ram".to_owned());
    option("-smp", spec.processors.to_string());
    option(
        "-m",
        match spec.pluggable {
            0 => spec.memory.to_string(),
            more => format!("{},slots=1,maxmem={}M", spec.memory, spec.memory + more),
        },
    );
    option("-object", format!("memory-backend-memfd,id=ram,size={}M,share=on", spec.memory));
    option("-kernel", kernel.display().to_string());
    option("-initrd", initramfs.display().to_string());
    option("-append", APPEND.to_owned());
    option("-serial", format!("file:{}", at("console.log")));
    option("-qmp", format!("unix:{},server=on,wait=off", at("monitor")));
    option("-device", "virtio-serial-pci".to_owned());
    option("-chardev", format!("socket,id=port,path={},server=on,wait=off", at("port")));
    option("-device", "virtserialport,chardev=port,name=virtiofs.e2e".to_owned());
    for (number, device) in spec.devices.iter().enumerate() {
        option("-chardev", format!("socket,id=fs{number},path={}", device.socket.display()));
        option("-device", format!("vhost-user-fs-pci,chardev=fs{number},tag={},queue-size=1024", device.tag));
    }
    arguments
}
