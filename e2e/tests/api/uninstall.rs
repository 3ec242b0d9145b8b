//! The chart is not uninstalled while shares are in use, and leaves nothing behind that cannot be deleted.

use anyhow::{Context, Result, bail, ensure};
use e2e::cluster::{NAMESPACE, Operator, until};
use serde_json::{Value, json};

use crate::world::{State, World};

/// The templates of the chart that this test applies.
const TEMPLATES: [&str; 4] = ["--show-only", "templates/operator.yaml", "--show-only", "templates/uninstall.yaml"];

pub(crate) fn uninstall_fails_while_shares_are_in_use(world: &mut World) -> Result<()> {
    if !world.cluster.is_own() {
        println!("skipped: this cluster would start the workloads");
        return Ok(());
    }
    world.served("kept", &["k1"], json!({}))?;
    let documents = world.cluster.chart(&TEMPLATES)?;
    world.admin().apply_text(&documents)?;
    let arguments = arguments_of_hook(world)?;

    world.report_status("kept", "k1", State::Used(2))?;
    refuses(world, &arguments, "share kept on node k1, 2 sessions: vms/vm-0, vms/vm-1")?;
    world.report_status("kept", "k1", State::Serving)?;
    until("the default service account", String::new, || world.admin().get("serviceaccount", "default"))?;
    world.admin().apply(&users())?;
    refuses(world, &arguments, "pod default/vm on node k1, volume inline of share kept, volume claimed of share kept")?;
    ensure!(replicas(world)? == 2 && is_protected(world)?, "the hook changed something");
    world.admin().run(&["patch", "pv", "kept", "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#])?;
    world.admin().run(&["delete", "pod/vm", "pv/kept", "--grace-period=0", "--force"])?;

    // An operator that is still running could add a finalizer again.
    world.admin().apply(&operator_pod())?;
    let hasty = [&arguments[..], &["--wait-seconds=1".to_owned()]].concat();
    refuses(world, &hasty, "have not ended within 1 s")?;
    ensure!(is_protected(world)?, "the hook did not wait");
    ensure!(replicas(world)? == 2, "the hook did not start the operators again");
    // Helm 4 applies server-side: it does not override changes of other field managers.
    world.admin().run_with(&["apply", "--server-side", "-f", "-"], &documents)?;
    world.admin().run(&["delete", "pod/still-there", "-n", NAMESPACE, "--grace-period=0", "--force"])?;

    world.end_operator()?;
    if let Some(output) = run(world, &arguments)? {
        bail!("rejected although no share is in use: {output}");
    }
    ensure!(!world.share("kept")?.is_null() && !is_protected(world)?, "the shares are not kept, or cannot be deleted");
    world.admin().run(&["delete", "vfs", "kept", "--timeout=60s"])?;
    world.admin().run_with(&["delete", "--ignore-not-found", "-f", "-"], &documents)?;
    Ok(())
}

/// The arguments that the chart gives to the hook's container.
fn arguments_of_hook(world: &World) -> Result<Vec<String>> {
    let job = world.admin().run(&["get", "job", "virtiofs-uninstall", "-n", NAMESPACE, "-o", "json"])?;
    let mut job: Value = serde_json::from_str(&job)?;
    Ok(serde_json::from_value(job["spec"]["template"]["spec"]["containers"][0]["args"].take())?)
}

/// Runs the hook. Returns its error output if it refuses.
fn run(world: &World, arguments: &[String]) -> Result<Option<String>> {
    let output = Operator::hook(&world.cluster, arguments)?.output().context("running the hook")?;
    Ok((!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned()))
}

fn refuses(world: &World, arguments: &[String], words: &str) -> Result<()> {
    let output = run(world, arguments)?.with_context(|| format!("the hook succeeded; expected: {words}"))?;
    ensure!(output.contains(words), "{output}");
    Ok(())
}

fn replicas(world: &World) -> Result<i64> {
    let path = "jsonpath={.spec.replicas}";
    let text = world.admin().run(&["get", "deployment", "virtiofs-operator", "-n", NAMESPACE, "-o", path])?;
    text.trim().parse().with_context(|| format!("replicas: {text}"))
}

fn is_protected(world: &World) -> Result<bool> {
    Ok(world.share("kept")?["metadata"]["finalizers"] == json!(["virtiofs.dev/in-use"]))
}

/// A pod on a node with an inline volume and a claimed one.
fn users() -> Value {
    let attributes = json!({"share": "kept"});
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "kept"},
            "spec": {
                "capacity": {"storage": "1Gi"}, "accessModes": ["ReadOnlyMany"], "storageClassName": "",
                "claimRef": {"namespace": "default", "name": "claim"},
                "csi": {"driver": "csi.virtiofs.dev", "volumeHandle": "kept", "volumeAttributes": attributes},
            },
        },
        {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "vm", "namespace": "default"},
            "spec": {
                "nodeName": "k1",
                "containers": [{"name": "vm", "image": "vm"}],
                "volumes": [
                    {"name": "inline", "csi": {
                        "driver": "csi.virtiofs.dev", "readOnly": true, "volumeAttributes": attributes,
                    }},
                    {"name": "claimed", "persistentVolumeClaim": {"claimName": "claim", "readOnly": true}},
                ],
            },
        },
    ]})
}

/// A pod that matches the Deployment's selector.
fn operator_pod() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "still-there", "namespace": NAMESPACE, "labels": {
            "app.kubernetes.io/name": "virtiofs-operator", "app.kubernetes.io/instance": "virtiofs",
        }},
        "spec": {"serviceAccountName": "virtiofs-operator", "containers": [{"name": "operator", "image": "operator"}]},
    })
}
