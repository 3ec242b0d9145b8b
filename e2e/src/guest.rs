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

/// Emulated, on two cores that others use too, a guest takes some seconds; a minute means it hangs.
const BOOT: Duration = Duration::from_secs(90);
/// A guest that is emulated on a busy host may miss the ticks by which its kernel tests its timer, and panics then.
const APPEND: &str = "console=ttyS0 panic=-1 loglevel=5 no_timer_check";
/// Enough for any one script on an emulated processor, a load's last round included.
const SCRIPT: Duration = Duration::from_secs(120);

/// A virtiofs device: the socket its file server listens on, and the name the guest mounts it by.
#[derive(Debug, Clone)]
pub struct Device {
    /// At most 36 bytes.
    pub tag: String,
    /// A vhost-user socket.
    pub socket: PathBuf,
}

/// What a guest is made with.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// MiB of memory, all of it shared with the file servers.
    pub memory: u32,
    /// MiB of memory that can be plugged in later.
    pub pluggable: u32,
    /// Virtual processors.
    pub processors: u32,
    /// Its virtiofs devices.
    pub devices: Vec<Device>,
}

impl Default for GuestSpec {
    fn default() -> Self {
        Self { memory: 512, pluggable: 0, processors: 1, devices: Vec::new() }
    }
}

impl GuestSpec {
    /// The same guest with one more virtiofs device.
    #[must_use]
    pub fn with_device(mut self, tag: &str, socket: &Path) -> Self {
        self.devices.push(Device { tag: tag.to_owned(), socket: socket.to_owned() });
        self
    }
}

/// A guest that is up and takes scripts. Dropped, its QEMU is killed.
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
    /// Boots a guest and waits until its init takes scripts. Nothing is mounted yet.
    ///
    /// # Errors
    /// When QEMU does not start or the guest does not come up; the message carries both their last words.
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

    /// Waits until a guest takes scripts whose QEMU has been started with `dir` to leave its sockets in.
    pub(crate) fn attach(vmm: Box<dyn Vmm>, dir: TempDir, accelerator: Accelerator, start: Instant) -> Result<Self> {
        let console = dir.path().join("console.log");
        let channel = Channel::open(&dir.path().join("port"), BOOT, || still_running(&*vmm))
            .with_context(|| format!("{}\n{}", vmm.log_tail(), process::tail(&console)))?;
        Ok(Self { vmm, channel, console, boot: start.elapsed(), accelerator, loads: 0, dir })
    }

    /// From the start of QEMU until the guest took scripts.
    pub fn boot_time(&self) -> Duration {
        self.boot
    }

    /// What executes its instructions.
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// Runs a shell script in the guest and returns what came of it, whatever its status.
    ///
    /// # Errors
    /// When the guest is gone or does not finish in time.
    pub fn run(&mut self, script: &str) -> Result<Output> {
        self.channel.run(script, SCRIPT).with_context(|| format!("{}\n{}", self.vmm.log_tail(), self.console_tail()))
    }

    /// Runs a shell script that has to succeed, and returns its standard output.
    ///
    /// # Errors
    /// When it does not exit with 0, or as [`Guest::run`].
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
    /// When the guest cannot mount it.
    pub fn mount(&mut self, tag: &str) -> Result<String> {
        let at = format!("/mnt/{tag}");
        self.must(&format!("mkdir -p {at} && mount -t virtiofs {tag} {at}"))?;
        Ok(at)
    }

    /// Puts overlayfs over these directories (topmost first) at `/mnt/<name>`, with what is written going
    /// to the guest's memory, and returns that path.
    ///
    /// # Errors
    /// When the guest cannot mount it.
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
    /// When QEMU does not do it, or the guest does not find the memory.
    pub fn plug_unshared_memory(&mut self, mib: u32) -> Result<()> {
        let blocks = "ls -d /sys/devices/system/memory/memory[0-9]* | wc -l";
        let online = "echo online_movable >/sys/devices/system/memory/auto_online_blocks";
        let before = self.must(&format!("{online} && {blocks}"))?;
        let size = u64::from(mib) << 20;
        self.command("object-add", &json!({"qom-type": "memory-backend-ram", "id": "unshared", "size": size}))?;
        self.command("device_add", &json!({"driver": "pc-dimm", "id": "dimm", "memdev": "unshared"}))?;
        let script = format!(
            "for turn in $(seq 200); do
                 [ $({blocks}) -gt {} ] && ! grep -qs offline /sys/devices/system/memory/memory[0-9]*/state && exit 0
                 sleep 0.1
             done
             exit 1",
            before.trim()
        );
        self.must(&script).map(drop)
    }

    /// Stops the VM: its processors, then its devices.
    ///
    /// # Errors
    /// When QEMU does not do it.
    pub fn pause(&self) -> Result<()> {
        self.command("stop", &json!({}))
    }

    /// Resumes a paused VM.
    ///
    /// # Errors
    /// When QEMU does not do it.
    pub fn resume(&self) -> Result<()> {
        self.command("cont", &json!({}))
    }

    /// Presses the VM's reset button and waits until its init takes scripts again. Nothing is mounted then.
    ///
    /// # Errors
    /// When QEMU does not do it, or the guest does not come up.
    pub fn reset(&mut self) -> Result<()> {
        // Other than here, a reset is the kernel's after a panic, and the VM is to end.
        self.command("set-action", &json!({"reboot": "reset"}))?;
        self.command("system_reset", &json!({}))?;
        self.channel.greeted(Instant::now() + BOOT).with_context(|| self.console_tail())?;
        self.command("set-action", &json!({"reboot": "shutdown"}))
    }

    fn command(&self, name: &str, arguments: &Value) -> Result<()> {
        monitor::execute(&self.dir.path().join("monitor"), name, arguments).with_context(|| self.vmm.log_tail())
    }

    /// A number no load of this guest had before.
    pub(crate) fn next_load(&mut self) -> u32 {
        self.loads += 1;
        self.loads
    }

    /// What the guest's kernel said last.
    pub fn console_tail(&self) -> String {
        process::tail(&self.console)
    }

    /// Unmounts everything, powers the guest off and waits for QEMU's end.
    ///
    /// # Errors
    /// When it does not end by itself.
    pub fn shutdown(mut self) -> Result<()> {
        // The answer may be lost to the power-off; the end of QEMU is what counts.
        let _ = self.run("(umount -a -r; sync; poweroff -f) >/dev/null 2>&1 &");
        match self.vmm.wait_for(BOOT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("QEMU ended with {status}\n{}", self.vmm.log_tail()),
            None => bail!("the guest did not power off\n{}", self.console_tail()),
        }
    }
}

/// Who runs a guest's QEMU. Dropped, QEMU is killed.
pub(crate) trait Vmm {
    /// How it ended, if it has.
    fn ended(&self) -> Result<Option<ExitStatus>>;

    /// Waits for its end; nothing when it is still running after `limit`.
    fn wait_for(&self, limit: Duration) -> Result<Option<ExitStatus>>;

    /// The end of its console.
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

/// QEMU's options for a guest that leaves its console and sockets in `dir`.
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
