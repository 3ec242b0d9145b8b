//! Permissions, with real tokens against the real API server.

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Kubectl, NAMESPACE};
use serde_json::json;

use crate::world::{State, World, share, status_of};

/// Checks that `result` is an error whose text contains `words`.
pub(crate) fn refused(what: &str, result: Result<impl Sized>, words: &str) -> Result<()> {
    let Err(error) = result else { anyhow::bail!("{what} was permitted") };
    let text = format!("{error:#}");
    ensure!(text.contains(words), "{what} was rejected for another reason: {text}");
    Ok(())
}

pub(crate) fn an_agent_writes_exports_of_its_own_node_only(world: &mut World) -> Result<()> {
    world.served("mine", &["p1", "p2"], json!({}))?;
    let exports = world.exports("mine")?;
    let agent = world.agent("p1")?;
    agent.apply_status(&status_of(&exports["p1"], State::Used(1)))?;
    refused(
        "writing another node's status",
        agent.apply_status(&status_of(&exports["p2"], State::Used(1))),
        "the agent of node p1 must not write exports of another node",
    )?;
    let nobody = world.cluster.service_account("virtiofs-agent")?;
    refused(
        "writing with a token that is for no node",
        nobody.apply_status(&status_of(&exports["p1"], State::Used(2))),
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
        ("reading pods", vec!["get", "pods", "-A"]),
        ("running a pod", vec!["run", "any", "--image=any", "-n", NAMESPACE]),
        ("a token of the operator", vec!["create", "token", "virtiofs-operator", "-n", NAMESPACE]),
        ("a token of another node's agent", vec!["create", "token", "virtiofs-agent", "-n", NAMESPACE]),
        ("reading leases", vec!["get", "leases", "-n", NAMESPACE]),
        ("labelling a node", vec!["label", "node", "p1", "share.virtiofs.dev/mine=false", "--overwrite"]),
    ] {
        refused(what, agent.run(&arguments), "orbidden")?;
    }
    let report = |node: &str, controller: &str| {
        let event = json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": {"generateName": "loss-", "namespace": "default"},
            "regarding": {"apiVersion": "v1", "kind": "Pod", "name": "any", "namespace": "default"},
            "type": "Warning", "reason": "SessionLost", "action": "RestoreSession", "note": "any",
            "reportingController": controller, "reportingInstance": node, "eventTime": "2026-01-01T00:00:00.000000Z",
        });
        agent.run_with(&["create", "--validate=false", "-f", "-"], &event.to_string())
    };
    report("p1", "virtiofs-agent").context("an Event of its own")?;
    for (node, controller) in [("p2", "virtiofs-agent"), ("p1", "kubelet")] {
        refused("an Event in the name of another", report(node, controller), "must name it as its reporter")?;
    }
    let share = world.until_share("mine", "counted", |share| share["status"]["sessions"] == 1)?;
    ensure!(share["spec"]["access"] == "ReadOnly", "{share:#}");
    Ok(())
}

/// Neither a user with every permission on the API group nor a cluster admin creates, changes or deletes an export.
pub(crate) fn only_the_operator_writes_exports(world: &mut World) -> Result<()> {
    world.served("closed", &["c1"], json!({}))?;
    let export = world.exports("closed")?.remove("c1").unwrap_or_default();
    let name = export["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    world.admin().apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ServiceAccount",
         "metadata": {"name": "editor", "namespace": NAMESPACE}},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "test-editor"},
         "rules": [{"apiGroups": ["virtiofs.dev"], "verbs": ["*"], "resources": ["*"]}]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
         "metadata": {"name": "test-editor"},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "test-editor"},
         "subjects": [{"kind": "ServiceAccount", "name": "editor", "namespace": NAMESPACE}]},
    ]}))?;
    let editor = world.cluster.service_account("editor")?;
    let created = |kubectl: &Kubectl| {
        // Equal to an export of the operator except for the directory.
        let mut foreign = export.clone();
        foreign["metadata"] = json!({
            "name": "closed-elsewhere", "ownerReferences": export["metadata"]["ownerReferences"],
            "labels": export["metadata"]["labels"],
        });
        foreign["spec"]["source"] = json!({"hostPath": {"path": "/root"}});
        kubectl.apply(&foreign)
    };
    let patch = |patch: &'static str| vec!["patch", "vfe", name.as_str(), "--type=merge", "-p", patch];
    let words = "exports are written by system:serviceaccount:virtiofs-system:virtiofs-operator only";
    for kubectl in [&editor, world.admin()] {
        refused("creating an export", created(kubectl), words)?;
        for arguments in [
            patch(r#"{"spec":{"access":"ReadWrite"}}"#),
            patch(r#"{"spec":{"consumers":{"namespaces":{"matchNames":["mine"]}}}}"#),
            patch(r#"{"metadata":{"finalizers":["example.com/keep"]}}"#),
            patch(r#"{"metadata":{"ownerReferences":null}}"#),
            patch(r#"{"metadata":{"labels":{"virtiofs.dev/share":"other"}}}"#),
            patch(r#"{"metadata":{"annotations":{"a":"b"}}}"#),
            vec!["delete", "vfe", &name],
        ] {
            refused(&arguments.join(" "), kubectl.run(&arguments), words)?;
        }
        let status =
            ["patch", "vfe", &name, "--subresource=status", "--type=merge", "-p", r#"{"status":{"sessions":9}}"#];
        let words = "exports are written by system:serviceaccount:virtiofs-system:virtiofs-agent only";
        refused("writing a status", kubectl.run(&status), words)?;
        // A storage migration writes every object back unchanged.
        let stored = serde_json::to_string(&world.admin().get("vfe", &name)?.context("the export does not exist")?)?;
        kubectl.run_with(&["replace", "-f", "-"], &stored)?;
    }
    // The controller manager deletes the exports of a deleted share, and removes owner references.
    world.admin().run(&["annotate", "vfs", "closed", "virtiofs.dev/force-delete=true"])?;
    world.admin().run(&["delete", "vfs", "closed", "--cascade=orphan", "--timeout=60s"])?;
    world.until_exports("closed", "gone", |exports| exports.is_empty())?;
    for object in ["clusterrolebinding/test-editor", "clusterrole/test-editor"] {
        world.admin().run(&["delete", object, "--wait=false"])?;
    }
    Ok(())
}

/// A user with all permissions in a namespace whose pods use a share knows the share's name and nothing else of it.
pub(crate) fn a_namespace_admin_reaches_no_share(world: &mut World) -> Result<()> {
    world.served("given", &["v1"], json!({"consumers": {"namespaces": {"matchNames": ["test-tenant"]}}}))?;
    let subject = json!({"kind": "ServiceAccount", "name": "namespace-admin", "namespace": NAMESPACE});
    world.admin().apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "test-tenant"}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "namespace-admin", "namespace": NAMESPACE}},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
         "metadata": {"name": "all", "namespace": "test-tenant"},
         "rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
         "metadata": {"name": "all", "namespace": "test-tenant"},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "all"},
         "subjects": [subject]},
    ]}))?;
    let tenant = world.cluster.service_account("namespace-admin")?;
    // Requests that are permitted, so that the rejections below are meaningful.
    tenant.run(&["-n", "test-tenant", "create", "configmap", "mine"])?;
    let export = world.exports("given")?["v1"]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let another = share("another", json!({"source": {"hostPath": {"path": "/etc"}}})).to_string();
    let create = tenant.run_with(&["create", "-f", "-"], &another);
    refused("declaring a share", create, "orbidden")?;
    let consumers = r#"{"spec":{"consumers":{"namespaces":{"matchNames":["other"]}}}}"#;
    for (what, arguments) in [
        ("reading shares", vec!["get", "vfs"]),
        ("reading exports", vec!["get", "vfe", &export]),
        ("changing the consumers of a share", vec!["patch", "vfs", "given", "--type=merge", "-p", consumers]),
        ("deleting a share", vec!["delete", "vfs", "given"]),
        ("deleting an export", vec!["delete", "vfe", &export]),
        ("reading persistent volumes", vec!["get", "pv"]),
        ("reading secrets of the chart", vec!["get", "secrets", "-n", NAMESPACE]),
        ("running a pod beside the agents", vec!["run", "any", "--image=any", "-n", NAMESPACE]),
        ("a token of an agent", vec!["create", "token", "virtiofs-agent", "-n", NAMESPACE]),
    ] {
        refused(what, tenant.run(&arguments), "orbidden")?;
    }
    // The role permits this; the admission policy rejects it.
    let admitted = tenant.run(&["label", "namespace", "test-tenant", "consumer.virtiofs.dev/images=true"]);
    refused("admitting its namespace by a label", admitted, "admit a namespace to shares")?;
    world.admin().run(&["delete", "namespace", "test-tenant", "--wait=false"])?;
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
        (
            "annotating a node",
            vec!["annotate", "node", "o1", "example.com/a=b"],
            "must not change anything of a node but its labels",
        ),
        (
            "setting a finalizer of a node",
            vec!["patch", "node", "o1", "--type=merge", "-p", r#"{"metadata":{"finalizers":["example.com/keep"]}}"#],
            "must not change anything of a node but its labels",
        ),
        (
            "labelling a share",
            vec!["label", "vfs", "theirs", "a=b"],
            "must not change anything in the metadata of a share but its finalizer",
        ),
        (
            "forcing the deletion of a share",
            vec!["annotate", "vfs", "theirs", "virtiofs.dev/force-delete=true"],
            "must not change anything in the metadata of a share but its finalizer",
        ),
        (
            "setting another finalizer of a share",
            vec!["patch", "vfs", "theirs", "--type=merge", "-p", r#"{"metadata":{"finalizers":["example.com/keep"]}}"#],
            "must not change anything in the metadata of a share but its finalizer",
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
    // A user with all permissions on namespaces and none on shares.
    admin.apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ServiceAccount",
         "metadata": {"name": "tenant", "namespace": NAMESPACE}},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "test-tenant"},
         "rules": [{"apiGroups": [""], "verbs": ["*"],
                    "resources": ["namespaces", "namespaces/status", "namespaces/finalize"]}]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
         "metadata": {"name": "test-tenant"},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "test-tenant"},
         "subjects": [{"kind": "ServiceAccount", "name": "tenant", "namespace": NAMESPACE}]},
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "test-vms"}},
    ]}))?;
    let tenant = world.cluster.service_account("tenant")?;
    let label = ["label", "--overwrite", "namespace", "test-vms"];
    let set = |kubectl: &Kubectl, value: &str| kubectl.run(&[&label[..], &[value]].concat());
    set(&tenant, "mine=yes")?;
    refused("admitting a namespace", set(&tenant, "consumer.virtiofs.dev/images=true"), "admit a namespace to shares")?;
    let status = ["patch", "namespace", "test-vms", "--subresource=status", "--type=merge", "-p"];
    let admits = r#"{"metadata":{"labels":{"consumer.virtiofs.dev/images":"true"}}}"#;
    let by_status = tenant.run(&[&status[..], &[admits]].concat());
    refused("admitting it by its status", by_status, "admit a namespace to shares")?;
    tenant.run(&[&status[..], &[r#"{"metadata":{"labels":{"mine":"by-status"}}}"#]].concat())?;
    let finalize = |label: &str| -> Result<String> {
        let mut namespace = admin.get("namespace", "test-vms")?.context("the namespace does not exist")?;
        namespace["metadata"]["labels"][label] = json!("true");
        let path = "/api/v1/namespaces/test-vms/finalize";
        tenant.run_with(&["replace", "--raw", path, "-f", "-"], &namespace.to_string())
    };
    refused("admitting it by finalizing", finalize("consumer.virtiofs.dev/images"), "admit a namespace to shares")?;
    finalize("mine")?;
    set(admin, "consumer.virtiofs.dev/images=true")?;
    set(&tenant, "mine=still")?;
    // The namespace controller does this; otherwise no namespace could be deleted.
    finalize("finalized")?;
    refused("changing it", set(&tenant, "consumer.virtiofs.dev/images=other"), "admit a namespace to shares")?;
    set(&tenant, "consumer.virtiofs.dev/images-")?;
    for object in ["namespace/test-vms", "clusterrolebinding/test-tenant", "clusterrole/test-tenant"] {
        admin.run(&["delete", object, "--wait=false"])?;
    }
    Ok(())
}
