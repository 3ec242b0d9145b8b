//! The scheduler places pods with volumes of shares on nodes that serve the shares, if the API server supports the
//! policy.

use anyhow::{Context, Result, ensure};
use e2e::cluster::until;
use serde_json::{Value, json};

use crate::world::World;

const POLICY: &str = "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy";

pub(crate) fn pods_are_scheduled_where_their_shares_are(world: &mut World) -> Result<()> {
    let admin = world.admin();
    let asked = ["--set", "placement.enabled=true", "--set", "workloads.enabled=false"];
    ensure!(
        !world.cluster.chart(&asked)?.contains("MutatingAdmissionPolicy"),
        "the chart has it for an API server without it"
    );
    if !admin.run(&["get", "--raw", "/apis/admissionregistration.k8s.io/v1"])?.contains("mutatingadmissionpolicies") {
        println!("this API server has no MutatingAdmissionPolicy");
        return Ok(());
    }
    let only = ["--show-only", "templates/placement.yaml", "--api-versions", POLICY];
    let documents = world.cluster.chart(&[&asked[..], &only].concat())?;
    admin.apply_text(&documents)?;
    until("the default service account", String::new, || admin.get("serviceaccount", "default"))?;
    let images = json!({"share.virtiofs.dev/images": "true"});
    // The API server applies a new policy with a delay.
    let first = || Ok((selector(world, pod(json!({}), &[&of("images")]), true)? == images).then_some(()));
    until("the policy to be applied", || world.cluster.logs(), first)?;

    for (what, spec, volumes, wanted) in [
        (
            "a selector of its own",
            json!({"nodeSelector": {"kvm": "yes"}}),
            vec![of("images"), of("isos"), of("images")],
            json!({"kvm": "yes", "share.virtiofs.dev/images": "true", "share.virtiofs.dev/isos": "true"}),
        ),
        (
            "its own affinity",
            json!({"nodeSelector": {"share.virtiofs.dev/images": "maybe"}}),
            vec![of("images")],
            json!({"share.virtiofs.dev/images": "maybe"}),
        ),
        ("one invalid name", json!({}), vec![of("Images"), of("images")], images.clone()),
        ("no name at all", json!({}), vec![of("../images"), of("")], Value::Null),
        ("no attributes", json!({}), vec![json!({"driver": "csi.virtiofs.dev"})], Value::Null),
        (
            "another driver",
            json!({}),
            vec![json!({"driver": "other", "volumeAttributes": {"share": "images"}})],
            Value::Null,
        ),
        ("no volume", json!({}), vec![], Value::Null),
        ("already on a node", json!({"nodeName": "n1"}), vec![of("images")], Value::Null),
    ] {
        let volumes: Vec<&Value> = volumes.iter().collect();
        let found = selector(world, pod(spec, &volumes), true)?;
        ensure!(found == wanted, "{what}: {found}");
    }

    ensure!(selector(world, pod(json!({}), &[&of("images")]), false)? == images, "without dry run");
    admin.run(&["delete", "pod", "placed", "--grace-period=0", "--force"])?;
    admin.run_with(&["delete", "-f", "-"], &documents)?;
    Ok(())
}

/// A volume of a share.
fn of(share: &str) -> Value {
    json!({"driver": "csi.virtiofs.dev", "readOnly": true, "volumeAttributes": {"share": share}})
}

fn pod(spec: Value, volumes: &[&Value]) -> Value {
    let volumes: Vec<Value> =
        volumes.iter().enumerate().map(|(n, csi)| json!({"name": format!("v{n}"), "csi": csi})).collect();
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "placed"},
        "spec": {"containers": [{"name": "vm", "image": "vm"}], "volumes": volumes},
    });
    if let (Some(all), Value::Object(more)) = (pod["spec"].as_object_mut(), spec) {
        all.extend(more);
    }
    pod
}

/// The node selector of a pod after admission.
fn selector(world: &World, pod: Value, try_only: bool) -> Result<Value> {
    let dry: &[&str] = if try_only { &["--dry-run=server"] } else { &[] };
    let made = world.admin().run_with(&[&["create", "-o", "json", "-f", "-"], dry].concat(), &pod.to_string())?;
    let mut made: Value = serde_json::from_str(&made).context("reading a pod")?;
    Ok(made["spec"]["nodeSelector"].take())
}
