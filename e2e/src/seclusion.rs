//! A test that is a whole node keeps to itself: it has processes, mounts and a network of its own. So nothing that it
//! starts or mounts outlives it, however it ends, and two of them, or one beside a real node, do not meet.
//!
//! It runs three times: outside, as the first process inside, which collects orphans, and as the test.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{Pid, Uid, getpid};

/// Says inside that this is inside, and which cgroup is the node's.
const CGROUP: &str = "VIRTIOFS_E2E_CGROUP";
/// Where container runtime, kubelet and this project's own daemons keep things on every node, whatever their configuration;
/// and what is shared.
const OWN: [&str; 8] = [
    "/run/containerd",
    "/run/netns",
    "/run/virtiofs",
    "/run/virtiofs-keeper",
    "/srv",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
];
/// What a kubelet sets for the whole kernel.
const KERNEL: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];
/// The API server's service.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The node.
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);

/// Runs a test by itself, and removes what it left in the kernel. To be called before any thread is started.
pub fn run(test: impl FnOnce() -> Result<bool>) -> ExitCode {
    let result = match std::env::var(CGROUP) {
        Err(_) => outside(),
        Ok(_) if getpid().as_raw() == 1 => first(),
        Ok(_) => test(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("{error:?}");
            ExitCode::FAILURE
        }
    }
}

/// A cgroup for all that the node runs; it is there in every hierarchy, as `/name` from its root.
///
/// # Errors
/// Where this is no such test.
pub(crate) fn cgroup() -> Result<String> {
    std::env::var(CGROUP).context("this test does not keep to itself")
}

/// All processes in that cgroup.
///
/// # Errors
/// Where this is no such test.
pub(crate) fn processes() -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for place in cgroups(&cgroup()?)? {
        collect(&place, &mut found);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn collect(cgroup: &Path, found: &mut Vec<Pid>) {
    let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // Those of other process namespaces are all called 0.
    found.extend(members.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw));
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), found);
        }
    }
}

/// A cgroup of this name in each hierarchy.
fn cgroups(name: &str) -> Result<Vec<PathBuf>> {
    let root = Path::new("/sys/fs/cgroup");
    let own = |hierarchy: &Path| hierarchy.join(name.trim_start_matches('/'));
    if root.join("cgroup.procs").exists() {
        return Ok(vec![own(root)]);
    }
    let entries = fs::read_dir(root).context("looking for cgroups")?;
    // Two names of one hierarchy are a directory and links to it.
    let hierarchies = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(hierarchies.map(|entry| own(&entry.path())).collect())
}

/// Prepares what has to be there before, and cleans up after.
fn outside() -> Result<bool> {
    ensure!(Uid::effective().is_root(), "a node needs root: containers, cgroups, namespaces");
    let traces = Traces::prepare()?;
    // Whatever happens inside, its files go too.
    let files = tempfile::Builder::new().prefix("node-").tempdir().context("making a directory for a node")?;
    let mut inside = Command::new("unshare");
    inside.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    inside.arg(std::env::current_exe().context("looking for this program")?).args(std::env::args_os().skip(1));
    inside.env(CGROUP, &traces.cgroup).env("TMPDIR", files.path());
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("blocking signals")?;
    // SAFETY: runs between fork and exec; both are async-signal-safe and touch no memory of the parent.
    unsafe {
        inside.pre_exec(|| {
            SigSet::empty().thread_set_mask()?;
            Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)
        });
    }
    let mut child = inside.process_group(0).spawn().context("starting unshare")?;
    let pid = Pid::from_raw(child.id().cast_signed());
    thread::spawn(move || {
        if signals.wait().is_ok() {
            // With it dies the first process inside, and with that all others.
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    let status = child.wait().context("waiting for the inside")?;
    Ok(status.success())
}

/// The first process inside: makes the place what it is to be, and collects those whose parents have died.
fn first() -> Result<bool> {
    let shared = MsFlags::MS_REC | MsFlags::MS_SHARED;
    // Of this node, as on any: a mount that comes later reaches pods.
    mount(None::<&str>, "/", None::<&str>, shared, None::<&str>).context("sharing mounts")?;
    for place in OWN {
        mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .with_context(|| format!("mounting over {place}"))?;
    }
    ip(&["link", "set", "lo", "up"])?;
    for address in [SERVICE, NODE] {
        ip(&["address", "add", &format!("{address}/32"), "dev", "lo"])?;
    }
    let mut test = Command::new(std::env::current_exe().context("looking for this program")?);
    let test = test.args(std::env::args_os().skip(1)).spawn().context("starting the test")?;
    let test = Pid::from_raw(test.id().cast_signed());
    loop {
        match wait().context("waiting for processes")? {
            WaitStatus::Exited(pid, code) if pid == test => return Ok(code == 0),
            WaitStatus::Signaled(pid, signal, _) if pid == test => bail!("the test died of {signal}"),
            _ => (),
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("running ip")?;
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// What namespaces do not hold. Dropped, it is as it was.
struct Traces {
    cgroup: String,
    /// Directories that were not there.
    made: Vec<PathBuf>,
    kernel: Vec<(PathBuf, String)>,
}

impl Traces {
    fn prepare() -> Result<Self> {
        let kernel = KERNEL.map(|name| Path::new("/proc/sys").join(name)).into_iter();
        let kernel = kernel.filter_map(|path| Some((path.clone(), fs::read_to_string(path).ok()?))).collect();
        let mut traces = Traces { cgroup: format!("/virtiofs-e2e-{}", std::process::id()), made: Vec::new(), kernel };
        for place in OWN.map(Path::new).into_iter().filter(|place| !place.exists()) {
            fs::create_dir_all(place).with_context(|| format!("making {}", place.display()))?;
            traces.made.push(place.to_owned());
        }
        for cgroup in cgroups(&traces.cgroup)? {
            fs::create_dir(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        }
        Ok(traces)
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        for cgroup in cgroups(&self.cgroup).unwrap_or_default() {
            // Processes that have just been killed take a moment to leave.
            (0..100).find(|_| {
                remove_cgroup(&cgroup) || {
                    thread::sleep(Duration::from_millis(50));
                    false
                }
            });
            if cgroup.exists() {
                println!("{} could not be removed", cgroup.display());
            }
        }
        for (path, before) in &self.kernel {
            // Written only where it was changed: not everything here can be written everywhere.
            if fs::read_to_string(path).is_ok_and(|now| now != *before) {
                let _ = fs::write(path, before);
            }
        }
        for made in &self.made {
            let _ = fs::remove_dir(made);
        }
    }
}

/// Removes a cgroup and those in it. Is it gone?
fn remove_cgroup(cgroup: &Path) -> bool {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    fs::remove_dir(cgroup).is_ok() || !cgroup.exists()
}
