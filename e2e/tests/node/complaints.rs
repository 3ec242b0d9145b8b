//! Problems that users report of node plugins of other projects, as far as one node can reproduce them.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use e2e::cluster::sessions::{processes_of, sessions};
use e2e::cluster::traces::{Traces, sockets};
use e2e::cluster::{NAMESPACE, VmPod, is_true, until};
use e2e::load::Load;
use e2e::suite::World as _;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::world::{VMS, World};

/// Path of the kubelet's own metrics.
const METRICS: &str = "/api/v1/nodes/node/proxy/metrics";
/// Number of pods that have a volume and are connected, beside a VM.
const USERS: usize = 3;

/// "After some restarts of the kubelet the node has ten thousand mounts."
pub(crate) fn restarts_leave_no_mounts_or_sockets(world: &mut World) -> Result<()> {
    world.serve("many", json!({"access": "ReadWrite"}))?;
    let mut guest = world.cluster.boot(&VmPod::new(VMS, "vm", "many"))?;
    let mounted = guest.mount("many")?;
    let load = guest.start_work(&Load::writing(&mounted).and_reading(&mounted))?;
    let mut others = Vec::new();
    for number in 0..USERS {
        let pod = world.create_pod_with_volume(&format!("holder-{number}"), "many")?;
        others.push(world.connect(&pod)?);
    }
    let (mounts, bound) = (Traces::now()?.mounts(), sockets());
    ensure!(sessions()?.len() == USERS + 1, "{:#?}", sessions()?);

    for _ in 0..3 {
        world.cluster.restart_kubelet()?;
        // A restarted kubelet publishes all volumes of running pods again.
        until(
            "the kubelet to publish all volumes again",
            || world.explain(),
            || Ok((world.published()? > USERS).then_some(())),
        )?;
        world.cluster.until_ready()?;
    }
    for _ in 0..5 {
        let agent = world.daemon("virtiofs-agent")?;
        world.delete_pod(NAMESPACE, agent["metadata"]["name"].as_str().unwrap_or_default())?;
        world.until_other_daemon("virtiofs-agent", &agent)?;
        world.until_driver()?;
    }
    until(
        "the mounts to be unchanged",
        || Traces::now().map(|now| now.mounts().since(&mounts)).unwrap_or_default(),
        || Ok((Traces::now()?.mounts() == mounts).then_some(())),
    )?;
    ensure!(sockets() == bound, "sockets changed from {bound:#?} to {:#?}", sockets());
    ensure!(sessions()?.len() == USERS + 1, "{:#?}", sessions()?);
    guest.stop_work(load)?.must_be_clean()?;
    for other in others {
        ensure!(other.violations().is_empty(), "{:?}", other.violations());
    }
    guest.shutdown()
}

/// "After a reboot pods are stuck in Terminating."
pub(crate) fn pods_recover_or_end_after_a_reboot(world: &mut World) -> Result<()> {
    world.serve("boot", json!({"access": "ReadWrite"}))?;
    let stays = world.create_pod_with_volume("stays", "boot")?;
    world.create_pod_with_volume("goes", "boot")?;
    drop(world.connect(&stays)?);
    let admin = world.admin().clone();
    world.cluster.reboot(|| admin.run(&["-n", VMS, "delete", "pod", "goes", "--wait=false"]).map(drop))?;
    world.until_pod(VMS, "goes", "gone", Value::is_null)?;
    let served = world.until_pod(VMS, "stays", "started again", |pod| {
        let restarts = &pod["status"]["containerStatuses"][0]["restartCount"];
        is_true(pod, "Ready") && restarts.as_u64() > Some(0)
    })?;
    ensure!(served["metadata"]["uid"] == stays["metadata"]["uid"], "the pod was replaced");
    let guest = world.connect(&served)?;
    ensure!(guest.violations().is_empty(), "{:?}", guest.violations());
    drop(guest);
    Ok(())
}

/// "The plugin's pod is Ready, but the node has no driver."
pub(crate) fn the_driver_stays_registered_when_one_of_two_agents_ends(world: &mut World) -> Result<()> {
    world.serve("pair", json!({}))?;
    let copy = |world: &World| -> Result<()> {
        let agents = world.admin().get_in(NAMESPACE, "daemonset", "virtiofs-agent")?;
        let mut spec = agents["spec"]["template"]["spec"].clone();
        spec["nodeName"] = json!("node");
        let metadata = json!({"name": "second-agent", "namespace": NAMESPACE});
        world.admin().apply(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))?;
        world.until_pod(NAMESPACE, "second-agent", "running", |pod| pod["status"]["phase"] == "Running")?;
        until(
            "the second agent to be on standby",
            || world.explain(),
            || {
                let log = world.admin().run(&["-n", NAMESPACE, "logs", "second-agent"])?;
                Ok(log.contains("standing by").then_some(()))
            },
        )
    };
    let works = |world: &World, name: &str| -> Result<()> {
        let began = Instant::now();
        world.until_driver()?;
        world.create_pod_with_volume(name, "pair")?;
        println!("{name}: a pod got its volume after {:.1} s", began.elapsed().as_secs_f64());
        world.delete_pod(VMS, name)
    };
    copy(world)?;
    world.delete_pod(NAMESPACE, "second-agent")?;
    works(world, "the-second-went")?;

    copy(world)?;
    let first = world.daemon("virtiofs-agent")?;
    world.delete_pod(NAMESPACE, first["metadata"]["name"].as_str().unwrap_or_default())?;
    works(world, "the-first-went")?;
    world.delete_pod(NAMESPACE, "second-agent")?;
    world.until_other_daemon("virtiofs-agent", &first)?;
    works(world, "the-second-went-later")?;

    for agent in processes_of("virtiofs-agent") {
        kill(agent, Signal::SIGKILL).context("killing an agent")?;
    }
    works(world, "it-was-killed")?;
    println!("{}", world.publishing_time()?);
    Ok(())
}

/// "The driver was removed before its users, and they never end": helm refuses to uninstall.
pub(crate) fn uninstall_waits_for_users(world: &mut World) -> Result<()> {
    world.serve("used", json!({"access": "ReadWrite"}))?;
    let mut guest = world.cluster.boot(&VmPod::new(VMS, "vm", "used"))?;
    let mounted = guest.mount("used")?;
    let refused = world.cluster.shell("helm uninstall virtiofs --namespace virtiofs-system --timeout 90s", "");
    let refused = format!("{:#}", refused.err().context("helm uninstalled the driver while a VM used it")?);
    println!("{}", refused.trim());
    guest.work(&Load::writing(&mounted).and_reading(&mounted), 2)?.must_be_clean()?;
    world.until_driver()?;
    guest.shutdown()
}

/// The same on a drained node: its daemons end before a VM that takes long to end.
pub(crate) fn a_vm_that_ends_slowly_ends_without_the_daemons(world: &mut World) -> Result<()> {
    world.serve("slow", json!({"access": "ReadWrite"}))?;
    let before = Traces::now()?;
    let mut slow = VmPod::new(VMS, "slow", "slow");
    // Longer than any other step here.
    (slow.grace, slow.stubborn) = (600, true);
    let mut guest = world.cluster.boot(&slow)?;
    guest.mount("slow")?;
    world.admin().run(&["-n", VMS, "delete", "pod", "slow", "--wait=false"])?;
    for name in ["virtiofs-agent", "virtiofs-broker"] {
        let pod = world.daemon(name)?;
        world.delete_pod(NAMESPACE, pod["metadata"]["name"].as_str().unwrap_or_default())?;
    }
    ensure!(
        world.admin().get_in(VMS, "pod", "slow")?["metadata"]["deletionTimestamp"].is_string(),
        "the VM ended too early"
    );
    drop(guest);
    for vm in processes_of("qemu-system-x86_64") {
        kill(vm, Signal::SIGKILL).context("ending the VM")?;
    }
    world.until_pod(VMS, "slow", "gone", Value::is_null)?;
    world.until_everything_is_removed(&before)
}

/// Without users, helm uninstalls the chart, and everything on the node is removed.
pub(crate) fn uninstall_leaves_nothing_behind(world: &mut World) -> Result<()> {
    world.admin().run(&["delete", "vfs", "--all", "--timeout=60s"])?;
    world.cluster.shell("helm uninstall virtiofs --namespace virtiofs-system --wait --timeout 90s", "")?;
    until("the driver to be removed", || world.explain(), || Ok((!world.has_driver()?).then_some(())))?;
    for program in ["virtiofs-agent", "virtiofs-broker", "virtiofs-keeper", "virtiofs-engine"] {
        until(&format!("{program} to end"), || world.explain(), || Ok(processes_of(program).is_empty().then_some(())))?;
    }
    for left in ["plugins/csi.virtiofs.dev/csi.sock", "plugins_registry/csi.virtiofs.dev-reg.sock@localhost"] {
        let left = Path::new("/var/lib/kubelet").join(left);
        ensure!(fs::symlink_metadata(&left).is_err(), "{} still exists", left.display());
    }
    Ok(())
}

impl World {
    /// Number of volumes that this kubelet has had published.
    fn published(&self) -> Result<usize> {
        // A restarted kubelet does not answer immediately.
        let page = self.admin().run(&["get", "--raw", METRICS]).unwrap_or_default();
        Ok(publishing(&page, "csi_operations_seconds_count") as usize)
    }

    /// Average duration of a publication, by the kubelet's own metrics.
    fn publishing_time(&self) -> Result<String> {
        let page = self.admin().run(&["get", "--raw", METRICS])?;
        let (count, seconds) =
            (publishing(&page, "csi_operations_seconds_count"), publishing(&page, "csi_operations_seconds_sum"));
        Ok(format!(
            "NodePublishVolume, called {count} times by this kubelet: {:.0} ms on average",
            seconds * 1000.0 / count
        ))
    }
}

/// The sum of a kubelet metric over all successful calls of `NodePublishVolume`.
fn publishing(page: &str, metric: &str) -> f64 {
    let lines = page.lines().filter(|line| {
        line.starts_with(metric)
            && ["NodePublishVolume", "csi.virtiofs.dev", "\"OK\""].iter().all(|word| line.contains(word))
    });
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}
