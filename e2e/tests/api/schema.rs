//! The API server enforces what `check` and `up` enforce.

use std::fs;

use anyhow::{Result, ensure};

use crate::permissions::refused;
use crate::world::{World, in_tree, share};

const NAMESPACE_GIVEN: &str = "namespace-given.yaml";

pub(crate) fn the_api_server_validates_like_check(world: &mut World) -> Result<()> {
    let admin = world.admin();
    let good = in_tree("crds/tests/manifests/good");
    admin.run(&["create", "--dry-run=server", "--validate=strict", "-f", &good.display().to_string()])?;
    let mut arguments = vec!["create".to_owned(), "--dry-run=server".to_owned(), "--validate=strict".to_owned()];
    for entry in fs::read_dir(in_tree("crds/tests/manifests/bad"))? {
        let path = entry?.path();
        // kubectl itself removes a namespace from a cluster-scoped object.
        let is_tried = fs::read_to_string(&path)?.contains("kind: VirtiofsShare") && !path.ends_with(NAMESPACE_GIVEN);
        if is_tried {
            arguments.extend(["-f".to_owned(), path.display().to_string()]);
        }
    }
    let tried = arguments.len() / 2;
    let accepted = admin.run_expecting_failure(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(tried > 50 && accepted.is_empty(), "of {tried} manifests the API server accepts\n{accepted}");
    Ok(())
}

/// The API server accepts the manifests of the documentation, except KubeVirt's kinds, which it does not have.
pub(crate) fn documented_manifests_are_accepted(world: &mut World) -> Result<()> {
    let text = fs::read_to_string(in_tree("docs/KUBEVIRT.md"))?;
    let blocks: Vec<&str> = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let known: Vec<&str> = blocks.into_iter().filter(|block| !block.contains("kubevirt.io/v1")).collect();
    ensure!(known.len() == 2, "{} YAML blocks instead of 2; the page has changed", known.len());
    let admin = world.admin();
    admin.apply(&serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "documented"}}))?;
    // Other tests have a namespace with the name in the documentation, and this test deletes its own.
    let documents = known.join("---\n").replace("namespace: vms", "namespace: documented");
    let created = admin.run_with(&["create", "--dry-run=server", "--validate=strict", "-f", "-"], &documents);
    admin.run(&["delete", "namespace", "documented", "--wait=false"])?;
    let created = created?;
    for object in ["virtiofsshare.virtiofs.dev/images", "persistentvolume/vms-images", "persistentvolumeclaim/images"] {
        ensure!(created.contains(object), "no {object} in\n{created}");
    }
    Ok(())
}

pub(crate) fn sources_and_nodes_are_immutable(world: &mut World) -> Result<()> {
    world.served("fixed", &["f1"], serde_json::json!({}))?;
    let moved = share("fixed", serde_json::json!({"source": {"hostPath": {"path": "/srv/elsewhere"}}}));
    let refusal = world.admin().apply(&moved).expect_err("a source was moved").to_string();
    ensure!(refusal.contains("/srv/fixed cannot be changed; declare another share"), "{refusal}");
    let export = world.exports("fixed")?.remove("f1").unwrap_or_default();
    let name = export["metadata"]["name"].as_str().unwrap_or_default();
    // Only the operator may write exports.
    let operator = world.cluster.service_account("virtiofs-operator")?;
    for (field, value) in [("nodeName", "f2"), ("shareName", "other")] {
        let patch = format!("{{\"spec\":{{\"{field}\":\"{value}\"}}}}");
        let changed = operator.run(&["patch", "vfe", name, "--type=merge", "-p", &patch]);
        refused(&format!("changing {field} of an export"), changed, "create another export")?;
    }
    Ok(())
}
