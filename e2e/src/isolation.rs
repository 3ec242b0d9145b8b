//! Isolates a test that is a whole node: it has its own processes, mounts and network. So nothing that it starts or
//! mounts outlives it, however it ends, and two such tests, or a test and a real node, do not affect each other.
//!
//! The program runs three times: outside, as init of the new PID namespace, which reaps orphans, and as the test.

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

/// Environment variable that marks the inside. Its value is the node's cgroup.
const CGROUP: &str = "VIRTIOFS_E2E_CGROUP";
/// Directories that container runtime, kubelet and this project's daemons use on every node, whatever their
/// configuration, and the shared directories.
const NODE_DIRECTORIES: [&str; 8] = [
    "/run/containerd",
    "/run/netns",
    "/run/virtiofs",
    "/run/virtiofs-keeper",
    "/srv",
    "/var/lib/cni",
    "/var/lib/kubelet",
    "/var/log/containers",
];
/// Kernel-wide settings that a kubelet changes.
const KERNEL_SETTINGS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];
/// Address of the API server's service.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// Address of the node.
pub const NODE: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);

/// Runs a test in isolation, and reverts its changes in the kernel. Call it before any thread starts.
pub fn run(test: impl FnOnce() -> Result<bool>) -> ExitCode {
    let result = match std::env::var(CGROUP) {
        Err(_) => run_in_namespaces(),
        Ok(_) if getpid().as_raw() == 1 => run_as_init(),
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

/// The cgroup of all processes of the node. It exists in every hierarchy, as `/name` below its root.
///
/// # Errors
/// If this process is not an isolated test.
pub(crate) fn cgroup() -> Result<String> {
    std::env::var(CGROUP).context("this test does not run in isolation")
}

/// All processes in the node's cgroup.
///
/// # Errors
/// If this process is not an isolated test.
pub(crate) fn processes() -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for path in cgroups(&cgroup()?)? {
        collect(&path, &mut found);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn collect(cgroup: &Path, found: &mut Vec<Pid>) {
    let members = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    // Processes of other PID namespaces appear as 0.
    found.extend(members.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw));
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), found);
        }
    }
}

/// The cgroup of this name in each hierarchy.
fn cgroups(name: &str) -> Result<Vec<PathBuf>> {
    let root = Path::new("/sys/fs/cgroup");
    let own = |hierarchy: &Path| hierarchy.join(name.trim_start_matches('/'));
    if root.join("cgroup.procs").exists() {
        return Ok(vec![own(root)]);
    }
    let entries = fs::read_dir(root).context("listing cgroup hierarchies")?;
    // A hierarchy with two names is a directory and links to it.
    let hierarchies = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(hierarchies.map(|entry| own(&entry.path())).collect())
}

/// Prepares the host, runs this program in new namespaces, and cleans up.
fn run_in_namespaces() -> Result<bool> {
    ensure!(Uid::effective().is_root(), "a node needs root: containers, cgroups, namespaces");
    let host_state = HostState::prepare()?;
    // These files are removed too, whatever happens inside.
    let files = tempfile::Builder::new().prefix("node-").tempdir().context("making a directory for a node")?;
    let mut inside = Command::new("unshare");
    inside.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    inside.arg(std::env::current_exe().context("locating this program")?).args(std::env::args_os().skip(1));
    inside.env(CGROUP, &host_state.cgroup).env("TMPDIR", files.path());
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
            // This kills the init process inside, and with it all others.
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    let status = child.wait().context("waiting for unshare")?;
    Ok(status.success())
}

/// The init process inside: sets up mounts and network, starts the test, and reaps orphans.
fn run_as_init() -> Result<bool> {
    let shared = MsFlags::MS_REC | MsFlags::MS_SHARED;
    // As on any node, later mounts propagate to pods.
    mount(None::<&str>, "/", None::<&str>, shared, None::<&str>).context("sharing mounts")?;
    for path in NODE_DIRECTORIES {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .with_context(|| format!("mounting over {path}"))?;
    }
    ip(&["link", "set", "lo", "up"])?;
    for address in [SERVICE, NODE] {
        ip(&["address", "add", &format!("{address}/32"), "dev", "lo"])?;
    }
    let mut test = Command::new(std::env::current_exe().context("locating this program")?);
    let test = test.args(std::env::args_os().skip(1)).spawn().context("starting the test")?;
    let test = Pid::from_raw(test.id().cast_signed());
    loop {
        match wait().context("waiting for processes")? {
            WaitStatus::Exited(pid, code) if pid == test => return Ok(code == 0),
            WaitStatus::Signaled(pid, signal, _) if pid == test => bail!("the test was killed by {signal}"),
            _ => (),
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("running ip")?;
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Host state outside of namespaces. Restored on drop.
struct HostState {
    cgroup: String,
    /// Directories that did not exist before.
    created: Vec<PathBuf>,
    kernel: Vec<(PathBuf, String)>,
}

impl HostState {
    fn prepare() -> Result<Self> {
        let kernel = KERNEL_SETTINGS.map(|name| Path::new("/proc/sys").join(name)).into_iter();
        let kernel = kernel.filter_map(|path| Some((path.clone(), fs::read_to_string(path).ok()?))).collect();
        let mut host_state =
            HostState { cgroup: format!("/virtiofs-e2e-{}", std::process::id()), created: Vec::new(), kernel };
        for path in NODE_DIRECTORIES.map(Path::new).into_iter().filter(|path| !path.exists()) {
            fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
            host_state.created.push(path.to_owned());
        }
        for cgroup in cgroups(&host_state.cgroup)? {
            fs::create_dir(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        }
        Ok(host_state)
    }
}

impl Drop for HostState {
    fn drop(&mut self) {
        for cgroup in cgroups(&self.cgroup).unwrap_or_default() {
            // Killed processes take a moment to leave the cgroup.
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
            // Writes only changed values: not every setting is writable everywhere.
            if fs::read_to_string(path).is_ok_and(|now| now != *before) {
                let _ = fs::write(path, before);
            }
        }
        for created in &self.created {
            let _ = fs::remove_dir(created);
        }
    }
}

/// Removes a cgroup and its children. True if it no longer exists.
fn remove_cgroup(cgroup: &Path) -> bool {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    fs::remove_dir(cgroup).is_ok() || !cgroup.exists()
}
