//! Volumes: a real agent and broker; the test acts as the kubelet.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::cluster::{NodeDaemons, condition_of, until, wait_for};
use e2e::suite::World as _;
use serde_json::{Value, json};
use testkit::guest::{Guest, GuestConfig};
use tonic::Code;

use crate::kubelet::{Kubelet, Pod};
use crate::world::World;

const NODE: &str = "real";

/// A node whose agent serves this test, and a share for namespace `vms`.
struct Stage {
    daemons: NodeDaemons,
    kubelet: Kubelet,
    share: &'static str,
}

impl Stage {
    fn set(world: &mut World, share: &'static str, more: Value) -> Result<Self> {
        world.nodes(share, &[NODE])?;
        let daemons = NodeDaemons::start_with_volumes(&world.cluster, NODE)?;
        let kubelet = Kubelet::of(&daemons)?;
        kubelet.register(world.admin(), NODE)?;
        let mut spec = json!({
            "source": {"hostPath": {"path": daemons.source(share)?}},
            "consumers": {"namespaces": {"matchNames": ["vms"]}},
        });
        if let (Some(spec), Some(more)) = (spec.as_object_mut(), more.as_object()) {
            spec.extend(more.clone());
        }
        world.declare(share, spec)?;
        let stage = Stage { daemons, kubelet, share };
        stage.until_served(world)?;
        Ok(stage)
    }

    fn until_served(&self, world: &World) -> Result<()> {
        until(
            &format!("{} to be served", self.share),
            || format!("{}\n{}", world.explain(), self.daemons.log_tail()),
            || {
                let export = world.exports(self.share)?.remove(NODE);
                Ok(export.filter(|export| condition_of(export, "Ready")["status"] == "True").map(drop))
            },
        )
    }

    fn pod(&self, name: &str) -> Pod {
        Pod::of(name, self.share)
    }

    fn publish(&self, pod: &Pod) -> Result<()> {
        self.kubelet.publish_with_retries(pod).map_err(|error| error.context(self.daemons.log_tail()))
    }

    fn socket(&self, pod: &Pod) -> PathBuf {
        self.kubelet.target(pod).join("virtiofs.sock")
    }

    fn inode(&self, pod: &Pod) -> Result<u64> {
        Ok(fs::symlink_metadata(self.socket(pod)).context("the volume's socket")?.ino())
    }

    /// A guest at the volume's socket, whatever the length of its path.
    fn boot(&self, pod: &Pod) -> Result<Guest> {
        let directory = fs::File::open(self.kubelet.target(pod))?;
        let socket = below(&directory).join("virtiofs.sock");
        Guest::boot(GuestConfig::new(socket).small())
            .with_context(|| format!("a guest of {}\n{}", pod.name, self.daemons.log_tail()))
    }

    /// Number of running engines, including standby engines.
    fn engines(&self) -> Result<usize> {
        let pid = self.daemons.broker_pid()?.cast_signed();
        let named = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "virtiofs-engine")
        };
        Ok(testkit::processes::descendants(pid)?.iter().filter(|pid| named(pid)).count())
    }

    /// Everything in volumes' directories and all state files of volumes.
    fn left(&self) -> Result<Vec<PathBuf>> {
        let kubelet = self.daemons.kubelet_dir();
        let mut left = Vec::new();
        for directory in [kubelet.join("plugins/csi.virtiofs.dev/volumes"), kubelet.join("pods")] {
            collect(&directory, &mut left)?;
        }
        Ok(left)
    }
}

fn below(directory: &fs::File) -> PathBuf {
    use std::os::fd::AsRawFd;
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string())
}

/// Collects files, sockets and directories of volumes below a directory.
fn collect(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    for entry in entries {
        let path = entry?.path();
        let is_directory = fs::symlink_metadata(&path)?.is_dir();
        if !is_directory || path.ends_with("mount") {
            found.push(path.clone());
        }
        if is_directory {
            collect(&path, found)?;
        }
    }
    Ok(())
}

fn hello(guest: &Guest) -> Result<()> {
    let fuse = guest.fuse();
    let node = fuse.lookup(1, "hello").context("looking a file up")?;
    ensure!(node.attr.size > 0, "the file is empty");
    ensure!(guest.violations().is_empty(), "{:?}", guest.violations());
    Ok(())
}

pub(crate) fn a_pod_gets_a_share_and_leaves_nothing(world: &mut World) -> Result<()> {
    let mut stage = Stage::set(world, "images", json!({"socket": {"mode": "0660", "group": 6}}))?;
    let pod = stage.pod("a");
    stage.publish(&pod)?;
    let bound = stage.inode(&pod)?;
    let access = fs::metadata(stage.socket(&pod))?;
    ensure!((access.mode() & 0o777, access.gid()) == (0o660, 6), "{:o} {}", access.mode(), access.gid());
    let guest = stage.boot(&pod)?;
    hello(&guest)?;
    // The pod's name is reported as a user of the share.
    world.until_exports("images", "the pod is named", |exports| {
        exports.get(NODE).is_some_and(|export| export["status"]["users"] == json!(["pod vms/a"]))
    })?;

    // Published again, by a restarted kubelet and by a restarted agent.
    for _ in 0..3 {
        stage.publish(&pod)?;
    }
    stage.daemons.kill_agent()?;
    stage.daemons.start_agent()?;
    stage.kubelet.register(world.admin(), NODE)?;
    stage.publish(&pod)?;
    ensure!(stage.inode(&pod)? == bound, "the socket was bound again");
    hello(&guest)?;
    let stats = stage.kubelet.stats(&pod)??;
    let file_system = nix::sys::statvfs::statvfs(&stage.daemons.source("images")?)?;
    let bytes = i64::try_from(file_system.blocks() * file_system.fragment_size())?;
    ensure!(stats.usage.len() == 2 && stats.usage[0].total == bytes, "{bytes}: {stats:?}");
    ensure!(stats.volume_condition.as_ref().is_some_and(|it| !it.abnormal), "{stats:?}");

    // A directory of the share, and a group of the pod.
    fs::create_dir(stage.daemons.source("images")?.join("below"))?;
    fs::write(stage.daemons.source("images")?.join("below/hello"), "from below\n")?;
    let part = Pod { group: Some(107), ..with(stage.pod("b"), "subPath", "below") };
    stage.publish(&part)?;
    ensure!(fs::metadata(stage.socket(&part))?.gid() == 107, "the pod's group has no access");
    hello(&stage.boot(&part)?)?;
    let lost = with(stage.pod("c"), "subPath", "missing");
    let refused = stage.kubelet.publish(&lost)?.err().context("a directory that does not exist was published")?;
    ensure!(refused.code() == Code::Unavailable && refused.message().contains("SourceMissing"), "{refused}");
    ensure!(!stage.kubelet.target(&lost).exists(), "the directory of a volume that was not published remains");

    // When the pods are deleted, all their files are removed, and a connected guest is disconnected.
    stage.kubelet.unpublish(&part)??;
    stage.kubelet.unpublish(&pod)??;
    stage.kubelet.unpublish(&pod)??;
    wait_for("engines to end", || Ok((stage.engines()? == 0).then_some(())))?;
    ensure!(stage.left()? == Vec::<PathBuf>::new(), "{:?}", stage.left()?);
    let gone = stage.kubelet.stats(&pod)?.err().context("a volume that does not exist has statistics")?;
    ensure!(gone.code() == Code::NotFound, "{gone}");
    drop(guest);
    Ok(())
}

fn with(mut pod: Pod, key: &'static str, value: &str) -> Pod {
    pod.attributes.push((key, value.to_owned()));
    pod
}

pub(crate) fn denied_pods_get_a_reason_and_the_share_an_event(world: &mut World) -> Result<()> {
    let stage = Stage::set(world, "secret", json!({}))?;
    let stranger = Pod { namespace: "strangers", ..stage.pod("x") };
    let refused = stage.kubelet.publish(&stranger)?.err().context("a pod of another namespace got the share")?;
    ensure!(refused.code() == Code::PermissionDenied && refused.message().contains("matchNames"), "{refused}");
    let unknown = stage
        .kubelet
        .publish(&Pod::of("y", "no-such-share"))?
        .err()
        .context("a share that does not exist was published")?;
    ensure!(unknown.code() == Code::NotFound && unknown.message().contains("no-such-share"), "{unknown}");
    let wrong = stage
        .kubelet
        .publish(&with(stage.pod("z"), "subpath", "a"))?
        .err()
        .context("an unknown attribute was accepted")?;
    ensure!(wrong.code() == Code::InvalidArgument && wrong.message().contains("subPath"), "{wrong}");
    ensure!(stage.left()? == Vec::<PathBuf>::new(), "{:?}", stage.left()?);
    let event = until(
        "an Event of the share",
        || stage.daemons.log_tail(),
        || {
            let events = world.admin().list("events", &["-n", "default"])?;
            let of = |it: &Value| it["involvedObject"]["name"] == "secret" && it["reason"] == "NotAConsumer";
            Ok(events.into_iter().find(of))
        },
    )?;
    let message = event["message"].as_str().unwrap_or_default();
    ensure!(message.contains("strangers/x") && message.contains(NODE), "{event:#}");
    println!("{message}");

    // Consumers by labels, which are checked at each request.
    world.admin().apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "strangers"}}))?;
    let selector = json!({"matchLabels": {"consumer.virtiofs.dev/secret": "true"}});
    let path = stage.daemons.source("secret")?;
    world.declare(
        "secret",
        json!({"source": {"hostPath": {"path": path}}, "consumers": {"namespaces": {"selector": selector}}}),
    )?;
    world.until_exports("secret", "the selector arrives", |exports| {
        exports.get(NODE).is_some_and(|it| !it["spec"]["consumers"]["namespaces"]["selector"].is_null())
    })?;
    let refused = stage.kubelet.publish(&stranger)?.err().context("a namespace without the label got the share")?;
    ensure!(refused.code() == Code::PermissionDenied, "{refused}");
    world.admin().run(&["label", "namespace", "strangers", "consumer.virtiofs.dev/secret=true"])?;
    stage.publish(&stranger)?;
    hello(&stage.boot(&stranger)?)?;
    stage.kubelet.unpublish(&stranger)??;
    world.admin().run(&["delete", "namespace", "strangers", "--wait=false"]).map(drop)
}

/// Condition of a volume, with its message.
fn condition(stage: &Stage, pod: &Pod) -> Result<Option<(bool, String)>> {
    let condition = stage.kubelet.stats(pod)?.ok().and_then(|stats| stats.volume_condition);
    Ok(condition.map(|it| (it.abnormal, it.message)))
}

/// A lost session is an Event of its pod, once, and the condition of its volume. Other pods are not affected.
fn the_loss_is_reported(stage: &mut Stage, world: &World, pod: &Pod, other: &Pod) -> Result<()> {
    let abnormal = |stage: &Stage| {
        wait_for("the volume to be abnormal", || Ok(condition(stage, pod)?.filter(|(abnormal, _)| *abnormal)))
    };
    let (_, message) = abnormal(stage)?;
    ensure!(message.starts_with("SessionLost: session kept."), "{message}");
    ensure!(condition(stage, other)?.is_some_and(|(abnormal, _)| !abnormal), "a volume without a VM is abnormal");
    let losses = || -> Result<Vec<Value>> {
        let events = world.admin().list("events", &["-n", "vms"])?;
        Ok(events.into_iter().filter(|it| it["reason"] == "SessionLost").collect())
    };
    let event = |stage: &Stage| until("an Event of the pod", || stage.daemons.log_tail(), || Ok(losses()?.pop()));
    let found = event(stage)?;
    let object = &found["involvedObject"];
    ensure!(object["kind"] == "Pod" && object["name"] == *pod.name && object["uid"] == *pod.uid, "{found:#}");
    ensure!(found["type"] == "Warning" && found["source"]["host"] != "", "{found:#}");
    let message = found["message"].as_str().unwrap_or_default();
    ensure!(
        message.contains(NODE) && message.contains("share kept") && message.contains("restart the VM"),
        "{message}"
    );
    println!("{message}");

    // The next agent finds the loss too, and reports it once.
    stage.daemons.kill_agent()?;
    stage.daemons.start_agent()?;
    stage.kubelet.register(world.admin(), NODE)?;
    abnormal(stage)?;
    event(stage)?;
    ensure!(losses()?.len() == 1, "{:#?}", losses()?);
    Ok(())
}

pub(crate) fn volumes_survive_crashes(world: &mut World) -> Result<()> {
    // Events of pods are in their namespace.
    world.admin().apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "vms"}}))?;
    let mut stage = Stage::set(world, "kept", json!({}))?;
    let (stays, goes, lost) = (stage.pod("a"), stage.pod("b"), stage.pod("c"));
    for pod in [&stays, &goes, &lost] {
        stage.publish(pod)?;
    }
    let guest = stage.boot(&stays)?;
    hello(&guest)?;

    // A killed broker loses its sessions. The next one has the same volumes in the same directories.
    stage.daemons.kill_broker()?;
    stage.daemons.start_broker()?;
    for pod in [&stays, &goes, &lost] {
        stage.publish(pod)?;
    }
    the_loss_is_reported(&mut stage, world, &stays, &goes)?;
    drop(guest);
    for pod in [&stays, &goes, &lost] {
        hello(&stage.boot(pod)?)?;
    }
    let restarted = stage.boot(&stays)?;
    wait_for("the volume to be normal: its VM was restarted", || {
        Ok(condition(&stage, &stays)?.filter(|(abnormal, _)| !abnormal))
    })?;
    drop(restarted);

    // The node reboots: nothing runs, and the runtime directory is empty. One pod was deleted meanwhile, and the
    // directory of another one was removed.
    stage.daemons.kill_agent()?;
    stage.daemons.kill_broker()?;
    fs::remove_dir_all(stage.daemons.runtime_dir()).context("wiping the runtime directory")?;
    fs::remove_dir_all(stage.daemons.kubelet_dir().join("pods").join(&lost.uid))?;
    stage.daemons.start_broker()?;
    stage.daemons.start_agent()?;
    stage.kubelet.register(world.admin(), NODE)?;
    stage.kubelet.unpublish(&goes)??;
    stage.publish(&stays)?;
    let guest = stage.boot(&stays)?;
    hello(&guest)?;
    ensure!(!stage.kubelet.target(&goes).exists(), "the directory of a deleted pod remains");
    wait_for("the volume without a pod to be removed", || {
        Ok((stage.left()?.len() == 3).then_some(())) // File, directory and socket of the one that stays.
    })?;

    // The share is deleted while a pod uses it: the session continues until the pod ends, with or without an API
    // server.
    world.admin().run(&["delete", "vfs", "kept", "--wait=false"])?;
    wait_for("the socket to be removed", || Ok((!stage.socket(&stays).exists()).then_some(())))?;
    hello(&guest)?;
    stage.publish(&stays)?;
    let late = stage.kubelet.publish(&stage.pod("d"))?.err().context("a share that is being deleted was published")?;
    ensure!(late.code() == Code::Unavailable, "{late}");
    let without_api_server = world.cluster.is_own();
    let end = |stage: &mut Stage| {
        if without_api_server {
            // Even an agent that starts now does not need it for that.
            stage.daemons.kill_agent()?;
            stage.daemons.start_agent()?;
            stage.kubelet.plugin_info()?;
        }
        hello(&guest)?;
        stage.kubelet.unpublish(&stays)??;
        wait_for("engines to end", || Ok((stage.engines()? == 0).then_some(())))?;
        ensure!(stage.left()? == Vec::<PathBuf>::new(), "{:?}", stage.left()?);
        stage.kubelet.unpublish(&stays)??;
        Ok(())
    };
    match without_api_server {
        true => world.cluster.without_api_server(|| end(&mut stage))?,
        false => end(&mut stage)?,
    }
    drop(guest);
    if world.operator()?.ended()?.is_some() {
        world.ready()?;
    }
    world.until_share("kept", "gone", Value::is_null)?;
    world.admin().run(&["delete", "namespace", "vms", "--wait=false"]).map(drop)
}

pub(crate) fn the_driver_stays_registered(world: &mut World) -> Result<()> {
    let mut stage = Stage::set(world, "listed", json!({}))?;
    let socket = stage.kubelet.registration_socket();
    // A file system may reuse the inode number of a removed file.
    let inode = |socket: &Path| {
        let found = fs::symlink_metadata(socket)?;
        Ok::<_, anyhow::Error>((found.ino(), found.ctime(), found.ctime_nsec()))
    };
    let until_registered = |before: (u64, i64, i64), why: &str| {
        until(
            &format!("the driver to register again: {why}"),
            || stage.daemons.log_tail(),
            || Ok(inode(&socket).ok().filter(|now| *now != before)),
        )
    };
    // Another process has removed the driver's entry.
    let first = inode(&socket)?;
    stage.kubelet.deregister(world.admin(), NODE)?;
    until_registered(first, "its entry was removed")?;
    stage.kubelet.register(world.admin(), NODE)?;

    // A second agent starts, then either ends: killed, stopped, or stopped while on standby.
    for how in ["the serving agent is killed", "the serving agent is stopped", "the agent on standby is stopped"] {
        let before = inode(&socket)?;
        let log = format!("agent-{}.log", how.len());
        let second = stage.daemons.start_another_agent(&log)?;
        wait_for("the second agent to be on standby", || Ok(second.log_tail().contains("standing by").then_some(())))?;
        ensure!(inode(&socket)? == before, "the second agent changed the socket of the first");
        if how.contains("standby") {
            let ended = second.stop()?;
            ensure!(ended.is_some_and(|status| status.success()), "the agent did not end: {ended:?}");
            ensure!(inode(&socket)? == before, "the second agent removed the socket of the first");
        } else {
            let began = Instant::now();
            match how.contains("killed") {
                true => stage.daemons.kill_agent()?,
                false => stage.daemons.stop_agent()?,
            }
            wait_for(how, || Ok(inode(&socket).ok().filter(|now| *now != before)))?;
            println!("{how}: the other agent registers after {:.1} s", began.elapsed().as_secs_f64());
            stage.daemons.replace_agent(second);
        }
        stage.kubelet.register(world.admin(), NODE)?;
        let pod = stage.pod("a");
        stage.publish(&pod)?;
        hello(&stage.boot(&pod)?)?;
    }
    stage.daemons.stop_agent()?;
    ensure!(!socket.exists() && !stage.kubelet.csi_socket().exists(), "a stopped agent leaves its sockets");
    Ok(())
}

/// Number of volumes that are measured.
const VOLUMES: usize = 200;

pub(crate) fn volumes_are_published_quickly(world: &mut World) -> Result<()> {
    let stage = Stage::set(world, "many", json!({}))?;
    let pods: Vec<Pod> = (0..VOLUMES).map(|number| stage.pod(&number.to_string())).collect();
    let mut took = Vec::new();
    for pod in &pods {
        let began = Instant::now();
        stage.kubelet.publish(pod)?.with_context(|| stage.daemons.log_tail())?;
        took.push(began.elapsed());
        ensure!(stage.socket(pod).exists(), "published without a socket");
    }
    took.sort();
    let milliseconds = |at: usize| took.get(at).map_or(0.0, |it: &Duration| it.as_secs_f64() * 1e3);
    println!(
        "{VOLUMES} volumes, from the request to a listening socket: median {:.1} ms, p99 {:.1} ms, worst {:.1} ms",
        milliseconds(VOLUMES / 2),
        milliseconds(VOLUMES * 99 / 100),
        milliseconds(VOLUMES - 1)
    );
    for pod in &pods {
        stage.kubelet.unpublish(pod)??;
    }
    ensure!(stage.left()? == Vec::<PathBuf>::new(), "{:?}", stage.left()?);
    Ok(())
}

/// Specs of csi-sanity that need a controller, which this driver does not have.
const NEEDS_A_CONTROLLER: &str =
    "Controller|should remove target path|should fail when volume does not exist on the specified path";

/// Minimum number of specs that have to pass.
const SPECS: usize = 13;

pub(crate) fn csi_sanity_passes(world: &mut World) -> Result<()> {
    let stage = Stage::set(world, "sane", json!({}))?;
    let tools = std::env::var_os("KUBERNETES_TOOLS").context("KUBERNETES_TOOLS")?;
    let scratch = stage.daemons.runtime_dir();
    let output = std::process::Command::new(Path::new(&tools).join("csi-sanity"))
        .arg("-csi.endpoint")
        .arg(stage.kubelet.csi_socket())
        .arg("-csi.mountdir")
        .arg(scratch.join("sanity-mount"))
        .arg("-csi.stagingdir")
        .arg(scratch.join("sanity-staging"))
        .args(["-ginkgo.no-color", "-ginkgo.skip", NEEDS_A_CONTROLLER])
        .output()
        .context("running csi-sanity")?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "csi-sanity: {}\n{said}\n{}", output.status, stage.daemons.log_tail());
    let summary = said.lines().rev().find(|line| line.contains("Passed")).unwrap_or_default();
    println!("csi-sanity: {summary}");
    // Guards against specs that are skipped unexpectedly.
    let passed = passed_specs(summary).with_context(|| format!("no summary in the output of csi-sanity:\n{said}"))?;
    ensure!(passed >= SPECS, "csi-sanity: {passed} specs passed, not {SPECS} or more:\n{said}");
    Ok(())
}

/// The number of passed specs in a line like `SUCCESS! -- 14 Passed | 0 Failed | 1 Pending | 77 Skipped`.
fn passed_specs(summary: &str) -> Option<usize> {
    let before = summary.split("Passed").next()?;
    before.split_whitespace().next_back()?.parse().ok()
}
