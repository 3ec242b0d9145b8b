//! VMs in pods, and events around them. The guests count no error.

use std::time::Instant;

use anyhow::{Result, ensure};
use e2e::cluster::sessions::{kill_engine, sessions};
use e2e::cluster::traces::Traces;
use e2e::cluster::{NAMESPACE, VM_IMAGE, VmPod, condition_of, is_true, until};
use e2e::load::Load;
use e2e::suite::World as _;
use serde_json::{Value, json};
use virtiofs_contract::control::{SessionState, SessionStatus};

use crate::world::{OTHERS, VMS, World};

fn is_false(object: &Value, condition: &str) -> bool {
    condition_of(object, condition)["status"] == "False"
}

pub(crate) fn a_vm_uses_a_share_and_leaves_nothing_behind(world: &mut World) -> Result<()> {
    world.serve("data", json!({"access": "ReadWrite", "content": "Shared"}))?;
    // The pods have all rights that the share needs: no feature is degraded.
    let served = world.until_export("data", "not degraded", |export| is_false(export, "Degraded"))?;
    ensure!(served["status"]["preflight"]["inodeFileHandles"] == "Prefer", "{served:#}");
    let before = Traces::now()?;
    let mut guest = world.cluster.boot(&VmPod::new(VMS, "vm", "data"))?;
    println!("a guest in a pod booted in {:.1} s", guest.boot_time().as_secs_f64());
    let mounted = guest.mount("data")?;
    let load = guest.start_work(&Load::writing(&mounted).and_reading(&mounted))?;

    // The engine is killed.
    let session = world.session()?;
    kill_engine(&session)?;
    world.until_session("recovered", |now| {
        now.totals.replacements.recoveries.count > 0 && now.engine_pid.is_some() && now.engine_pid != session.engine_pid
    })?;
    let export =
        world.until_export("data", "reports the recovery", |export| export["status"]["recentRecoveries"] == 1)?;
    ensure!(export["status"]["sessions"] == 1, "{export:#}");

    // The share is edited.
    world.declare("data", json!({"access": "ReadWrite", "content": "Shared", "engine": {"cache": "Metadata"}}))?;
    world.until_applied("data")?;
    let after = world.until_session("reconfigured", |now| now.engine != session.engine)?;
    ensure!(after.id == session.id && after.totals.replacements.hand_overs.count == 1, "{after:#?}");
    let table = world.admin().run(&["get", "vfs,vfe", "-o", "wide"])?;
    println!("{table}");
    ensure!(["AllNodesReady", "Complete"].iter().all(|word| table.contains(word)), "{table}");
    println!("{}", world.admin().run(&["describe", "vfs", "data"])?);
    guest.stop_work(load)?.must_be_clean()?;

    drop(guest);
    world.delete_pod(VMS, "vm")?;
    until("the session to end", || world.explain(), || Ok(sessions()?.is_empty().then_some(())))?;
    world.until_export("data", "no session", |export| export["status"]["sessions"] == 0)?;
    world.until_everything_is_removed(&before)
}

pub(crate) fn a_vm_uses_a_directory_of_a_share_by_a_persistent_volume(world: &mut World) -> Result<()> {
    world.serve("persistent", json!({"content": "Immutable"}))?;
    let claim = json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "part-of-persistent"},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "claimRef": {"namespace": VMS, "name": "part"},
                "csi": {
                    "driver": "csi.virtiofs.dev",
                    "volumeHandle": "part-of-persistent",
                    "readOnly": true,
                    "volumeAttributes": {"share": "persistent", "subPath": "d0"},
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "part", "namespace": VMS},
            "spec": {
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "volumeName": "part-of-persistent",
                "resources": {"requests": {"storage": "1Gi"}},
            },
        },
    ]});
    world.admin().apply(&claim)?;
    let before = Traces::now()?;
    let mut pod = VmPod::new(VMS, "vm", "persistent");
    pod.volume = json!({"persistentVolumeClaim": {"claimName": "part", "readOnly": true}});
    let mut guest = world.cluster.boot(&pod)?;
    let mounted = guest.mount("persistent")?;
    let seen: usize = guest.must(&format!("ls {mounted} | wc -l"))?.trim().parse()?;
    let there = std::fs::read_dir("/srv/persistent/d0")?.count();
    ensure!(
        seen == there && !guest.must(&format!("ls {mounted}"))?.contains("d0"),
        "the guest lists {seen} of {there} files"
    );
    guest.work(&Load::reading(&mounted), 2)?.must_be_clean()?;
    drop(guest);
    world.delete_pod(VMS, "vm")?;
    world.until_everything_is_removed(&before)?;
    run_pod_that_writes_to_its_volume(world, "part")?;
    world.until_everything_is_removed(&before)?;
    world.admin().run(&["-n", VMS, "delete", "pvc", "part", "--timeout=60s"])?;
    world.admin().run(&["delete", "pv", "part-of-persistent", "--timeout=60s"])?;
    Ok(())
}

/// Runs a pod whose container is root and writes to its volume's directory, which the kubelet allows unless the pod
/// says
/// `readOnly`, and changes the owner of the files. The pod ends nevertheless.
fn run_pod_that_writes_to_its_volume(world: &World, claim: &str) -> Result<()> {
    let write = "cd /share && busybox mkdir d && echo x >d/f && busybox chown -R 107 d && busybox chmod 1700 d";
    world.admin().apply(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "litter", "namespace": VMS},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "litter",
                "image": VM_IMAGE,
                "command": ["sh", "-c", format!("{write} && exec busybox sleep 3600")],
                "volumeMounts": [{"name": "share", "mountPath": "/share"}],
            }],
            "volumes": [{"name": "share", "persistentVolumeClaim": {"claimName": claim}}],
        },
    }))?;
    world.until_pod(VMS, "litter", "running", |pod| is_true(pod, "Ready"))?;
    let look = ["-n", VMS, "exec", "litter", "--", "busybox", "stat", "-c", "%U %a", "/share/d"];
    let written = || Ok(world.admin().run(&look).ok().filter(|seen| seen.contains("1700")));
    until("the pod to write", || world.explain(), written)?;
    world.delete_pod(VMS, "litter")
}

/// An upgrade to another image replaces all daemons but the keeper. Then the broker is replaced by a restart of its roll-out, by
/// another value of the chart, and by the deletion of its pod. The guest counts no error, and its session continues.
pub(crate) fn the_daemons_are_replaced_under_a_vm(world: &mut World) -> Result<()> {
    world.serve("kept", json!({"access": "ReadWrite"}))?;
    let mut guest = world.cluster.boot(&VmPod::new(VMS, "vm", "kept"))?;
    let mounted = guest.mount("kept")?;
    let load = guest.start_work(&Load::writing(&mounted).and_reading(&mounted))?;
    let session = world.session()?;
    let (agent, broker) = (world.daemon("virtiofs-agent")?, world.daemon("virtiofs-broker")?);
    let keeper = world.daemon("virtiofs-keeper")?;
    let operators = world.daemons("virtiofs-operator")?;

    world.cluster.upgrade()?;
    world.until_other_daemon("virtiofs-agent", &agent)?;
    until(
        "all operators to be replaced",
        || world.explain(),
        || {
            let now = world.daemons("virtiofs-operator")?;
            let old = |pod: &Value| operators.iter().any(|it| it["metadata"]["uid"] == pod["metadata"]["uid"]);
            Ok((!now.is_empty() && now.iter().all(|pod| !old(pod) && is_true(pod, "Ready"))).then_some(()))
        },
    )?;
    world.until_driver()?;
    world.until_other_daemon("virtiofs-broker", &broker)?;
    let same = world.daemon("virtiofs-keeper")?;
    ensure!(same["metadata"]["uid"] == keeper["metadata"]["uid"], "the keeper was replaced");
    let served = |it: &SessionStatus| it.id == session.id && it.state == SessionState::Serving;
    let handed_over = |times: u64| {
        let made = move |it: &SessionStatus| it.totals.replacements.hand_overs.count == times;
        world.until_session("handed over", move |it| served(it) && made(it))
    };
    handed_over(1)?;

    // The next broker stands by, and no engine ends before it is replaced.
    let broker = world.daemon("virtiofs-broker")?;
    world.admin().run(&["-n", NAMESPACE, "rollout", "restart", "daemonset/virtiofs-broker"])?;
    let broker = world.until_other_daemon("virtiofs-broker", &broker)?;
    handed_over(2)?;
    world.cluster.set("allowedSources={/srv,/opt}")?;
    let broker = world.until_other_daemon("virtiofs-broker", &broker)?;
    let replaced = handed_over(3)?;
    let counts = &replaced.totals.replacements;
    ensure!(counts.recoveries.count == 0 && counts.aborted == 0, "{counts:?}");
    println!("three roll-outs: {:?}", counts.hand_overs);

    let begin = Instant::now();
    world.delete_pod(NAMESPACE, broker["metadata"]["name"].as_str().unwrap_or_default())?;
    world.until_other_daemon("virtiofs-broker", &broker)?;
    world.until_session("served after the deletion of the broker", served)?;
    println!("served {:?} after the deletion of the broker's pod", begin.elapsed());

    // Both work: a change is applied.
    world.declare("kept", json!({"access": "ReadWrite", "engine": {"cache": "Metadata"}}))?;
    world.until_applied("kept")?;
    guest.stop_work(load)?.must_be_clean()?;
    guest.shutdown()
}

pub(crate) fn a_pod_of_another_namespace_sees_the_reason(world: &mut World) -> Result<()> {
    world.serve("private", json!({}))?;
    let pod = VmPod::new(OTHERS, "intruder", "private");
    let _dir = world.cluster.create(&pod)?;
    let seen = until(
        "an Event of the pod with the reason",
        || world.explain(),
        || {
            let events = world.admin().run(&["-n", OTHERS, "get", "events", "-o", "jsonpath={.items[*].message}"])?;
            Ok(events.contains("PermissionDenied").then_some(events))
        },
    )?;
    ensure!(seen.contains("private") && seen.contains(OTHERS), "{seen}");
    println!("{seen}");
    until(
        "an Event of the share that names the pod",
        || world.explain(),
        || {
            let about = "--field-selector=involvedObject.kind=VirtiofsShare,reason=NotAConsumer";
            let events = world.admin().run(&["-n", "default", "get", "events", about])?;
            Ok(events.contains(&format!("{OTHERS}/intruder")).then_some(()))
        },
    )?;
    ensure!(sessions()?.is_empty(), "a VM is connected");
    world.delete_pod(OTHERS, "intruder")?;
    Ok(())
}
