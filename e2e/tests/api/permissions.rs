//! Who may do what, with real tokens against the real API server.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::world::{How, World, answer};

/// Does this fail, and for a reason that holds these words?
pub(crate) fn refused(what: &str, result: Result<impl Sized>, words: &str) -> Result<()> {
    let Err(error) = result else { anyhow::bail!("{what} was permitted") };
    let text = format!("{error:#}");
    ensure!(text.contains(words), "{what} was refused for another reason: {text}");
    Ok(())
}

pub(crate) fn an_agent_writes_exports_of_its_own_node_only(world: &mut World) -> Result<()> {
    world.served("mine", &["p1", "p2"], json!({}))?;
    let exports = world.exports("mine")?;
    let agent = world.agent("p1")?;
    agent.apply_status(&answer(&exports["p1"], How::Used(1)))?;
    refused(
        "writing another node's status",
        agent.apply_status(&answer(&exports["p2"], How::Used(1))),
        "the agent of node p1 must not write exports of another node",
    )?;
    let nobody = world.cluster.service_account("virtiofs-agent")?;
    refused(
        "writing with a token that is for no node",
        nobody.apply_status(&answer(&exports["p1"], How::Used(2))),
        "does not name a node",
    )?;
    let name = exports["p1"]["metadata"]["name"].as_str().context("an export without a name")?;
    let patch = r#"{"spec":{"access":"ReadWrite"}}"#;
    for (what, arguments) in [
        ("changing an export's spec", vec!["patch", "vfe", name, "--type=merge", "-p", patch]),
        ("deleting an export", vec!["delete", "vfe", name]),
        ("changing a share", vec!["patch", "vfs", "mine", "--type=merge", "-p", patch]),
        ("changing a share's status", vec!["patch", "vfs", "mine", "--subresource=status", "--type=merge", "-p", "{}"]),
        ("reading shares", vec!["get", "vfs"]),
        ("reading secrets", vec!["get", "secrets", "-A"]),
        ("labelling a node", vec!["label", "node", "p1", "share.virtiofs.dev/mine=false", "--overwrite"]),
    ] {
        refused(what, agent.run(&arguments), "orbidden")?;
    }
    let share = world.until_share("mine", "counted", |share| share["status"]["sessions"] == 1)?;
    ensure!(share["spec"]["access"] == "ReadOnly", "{share:#}");
    Ok(())
}

pub(crate) fn the_operator_has_minimal_permissions(world: &mut World) -> Result<()> {
    world.served("theirs", &["o1"], json!({}))?;
    let operator = world.cluster.service_account("virtiofs-operator")?;
    let name = world.exports("theirs")?["o1"]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let spec = r#"{"spec":{"access":"ReadWrite"}}"#;
    let status = r#"{"status":{"sessions":9}}"#;
    for (what, arguments, words) in [
        (
            "changing what a share declares",
            vec!["patch", "vfs", "theirs", "--type=merge", "-p", spec],
            "must not create shares or change their spec",
        ),
        (
            "labelling a node otherwise",
            vec!["label", "node", "o1", "node-role.kubernetes.io/control-plane="],
            "must not change anything of a node but its labels",
        ),
        ("tainting a node", vec!["taint", "node", "o1", "a=b:NoExecute"], "must not change anything of a node"),
        (
            "writing an export's status",
            vec!["patch", "vfe", &name, "--subresource=status", "--type=merge", "-p", status],
            "orbidden",
        ),
        ("deleting a share", vec!["delete", "vfs", "theirs"], "orbidden"),
        ("reading secrets", vec!["get", "secrets", "-A"], "orbidden"),
        ("reading pods elsewhere", vec!["get", "pods", "-n", "kube-system"], "orbidden"),
    ] {
        refused(what, operator.run(&arguments), words)?;
    }
    Ok(())
}

pub(crate) fn only_share_editors_set_consumer_labels(world: &mut World) -> Result<()> {
    let admin = world.admin();
    // Somebody who may do everything to namespaces, and nothing to shares.
    admin.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ServiceAccount",
         "metadata": {"name": "tenant", "namespace": e2e::cluster::NAMESPACE}},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "test-tenant"},
         "rules": [{"apiGroups": [""], "verbs": ["*"],
                    "resources": ["namespaces", "namespaces/status", "namespaces/finalize"]}]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
         "metadata": {"name": "test-tenant"},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "test-tenant"},
         "subjects": [{"kind": "ServiceAccount", "name": "tenant", "namespace": e2e::cluster::NAMESPACE}]},
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "test-vms"}},
    ]}))?;
    let tenant = world.cluster.service_account("tenant")?;
    let label = ["label", "--overwrite", "namespace", "test-vms"];
    let set = |kubectl: &e2e::cluster::Kubectl, value: &str| kubectl.run(&[&label[..], &[value]].concat());
    set(&tenant, "mine=yes")?;
    refused("admitting a namespace", set(&tenant, "consumer.virtiofs.dev/images=true"), "admit a namespace to shares")?;
    let status = ["patch", "namespace", "test-vms", "--subresource=status", "--type=merge", "-p"];
    let admits = r#"{"metadata":{"labels":{"consumer.virtiofs.dev/images":"true"}}}"#;
    let by_status = tenant.run(&[&status[..], &[admits]].concat());
    refused("admitting it by its status", by_status, "admit a namespace to shares")?;
    tenant.run(&[&status[..], &[r#"{"metadata":{"labels":{"mine":"by-status"}}}"#]].concat())?;
    let finalize = |label: &str| -> Result<String> {
        let mut namespace = admin.get("namespace", "test-vms")?.context("the namespace is gone")?;
        namespace["metadata"]["labels"][label] = json!("true");
        let path = "/api/v1/namespaces/test-vms/finalize";
        tenant.run_with(&["replace", "--raw", path, "-f", "-"], &namespace.to_string())
    };
    refused("admitting it by finalizing", finalize("consumer.virtiofs.dev/images"), "admit a namespace to shares")?;
    finalize("mine")?;
    set(admin, "consumer.virtiofs.dev/images=true")?;
    set(&tenant, "mine=still")?;
    // As the namespace controller does, or no namespace would ever go.
    finalize("finalized")?;
    refused("changing it", set(&tenant, "consumer.virtiofs.dev/images=other"), "admit a namespace to shares")?;
    set(&tenant, "consumer.virtiofs.dev/images-")?;
    for object in ["namespace/test-vms", "clusterrolebinding/test-tenant", "clusterrole/test-tenant"] {
        admin.run(&["delete", object, "--wait=false"])?;
    }
    Ok(())
}
