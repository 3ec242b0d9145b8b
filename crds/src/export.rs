//! From a share to the spec of its exports, and from an export back to a share.
//!
//! The operator resolves a share once, so that all nodes serve the same configuration whatever the version of their
//! agents. An agent validates an export like a manifest, by the schema and its rules.

use std::hash::Hasher;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;
use serde_json::{Value, json};
use siphasher::sip::SipHasher24;

use crate::Share;
use crate::refusal::Refusal;
use crate::schema::{GROUP, KIND};
use crate::v1alpha1::{ExportMode, ResolvedEngine, VirtiofsExport, VirtiofsExportSpec, VirtiofsShareSpec};

/// The label of exports that names their share.
pub const SHARE_LABEL: &str = "virtiofs.dev/share";

/// How many characters of the names of share and node are repeated in the name of an export, for people.
const SHARE_PART: usize = 28;
const NODE_PART: usize = 22;

/// The name of the export of `share` on `node`: the start of both names, and a hash of both in full.
///
/// # Guarantees
/// At most 63 characters of `[a-z0-9-]` for any arguments; equal for equal arguments, in every release.
pub fn export_name(share: &str, node: &str) -> String {
    let mut hasher = SipHasher24::new();
    hasher.write(share.as_bytes());
    // No name contains a zero byte, so different pairs have different input.
    hasher.write_u8(0);
    hasher.write(node.as_bytes());
    let hash = format!("{:010x}", hasher.finish() >> 24);
    let parts = [readable(share, SHARE_PART), readable(node, NODE_PART), hash];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

/// The start of a name, of letters, digits and hyphens between them.
fn readable(name: &str, most: usize) -> String {
    let allowed = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
    let start: String = name.chars().take(most).map(allowed).collect();
    start.trim_matches('-').to_owned()
}

/// The spec of the exports of a share, without the node and its baseline.
///
/// # Guarantees
/// Pure. Shares that are served alike have equal revisions. `consumers` is not part of the revision, because it applies at
/// once, and neither are `nodes` and `rollout`, which do not reach an agent.
pub fn export_spec(share: &Share, declared: &VirtiofsShareSpec) -> VirtiofsExportSpec {
    let mut spec = VirtiofsExportSpec {
        share_name: share.name.to_string(),
        node_name: String::new(),
        consumers: declared.consumers.clone(),
        revision: String::new(),
        mode: ExportMode::Serve,
        source: declared.source.clone(),
        access: share.access,
        content: share.content,
        socket: declared.socket.clone(),
        engine: ResolvedEngine::from(&share.engine),
        staleness: declared.staleness.clone(),
        baseline: None,
    };
    spec.revision = revision(&spec);
    spec
}

/// The revision: a hash of the values of an export.
fn revision(spec: &VirtiofsExportSpec) -> String {
    let values = json!([spec.source, spec.access, spec.content, spec.socket, spec.engine, spec.staleness]);
    let mut hasher = SipHasher24::new();
    hasher.write(canonical(&values).to_string().as_bytes());
    format!("{:010x}", hasher.finish() >> 24)
}

/// The value with sorted keys, so that a revision does not depend on their order in a build.
fn canonical(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_by_key(|(name, _)| *name);
            Value::Array(fields.into_iter().map(|(name, field)| json!([name, canonical(field)])).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(canonical).collect()),
        other => other.clone(),
    }
}

/// The share that an export describes, or every reason why it is rejected, by the name of the export.
pub fn share_of(export: &VirtiofsExport) -> Result<Share, Vec<Refusal>> {
    let named = |refusals: Vec<Refusal>| refusals.into_iter().map(|it| it.of(Some(&export.name_any()))).collect();
    Share::from_export(export).map_err(named)
}

/// The reference to the share that controls an export. Every export of the operator has one, and a name that follows from
/// share and node; without either, somebody else has written the export, and it must not be served.
///
/// Whether that share exists is not checked here.
///
/// # Errors
/// The field that the operator writes differently.
pub fn controller_of(export: &VirtiofsExport) -> Result<&OwnerReference, Refusal> {
    let spec = &export.spec;
    let (name, expected) = (export.name_any(), export_name(&spec.share_name, &spec.node_name));
    if name != expected {
        let message =
            format!("{name}: the operator names the export of this share and node {expected}; delete this one");
        return Err(Refusal::new("metadata.name", message).of(Some(&name)));
    }
    let is_share = |owner: &OwnerReference| {
        let group = owner.api_version.split_once('/').map(|(group, _)| group);
        owner.controller == Some(true) && group == Some(GROUP) && owner.kind == KIND && owner.name == spec.share_name
    };
    match export.owner_references() {
        [owner] if is_share(owner) && !owner.uid.is_empty() => Ok(owner),
        _ => {
            let message =
                format!("not only share {} owns the export; the operator did not write it, delete it", spec.share_name);
            Err(Refusal::new("metadata.ownerReferences", message).of(Some(&name)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::manifest::read_text;

    fn document(more: &str) -> crate::Document {
        let text = format!(
            "apiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\nmetadata: {{name: images}}\n\
             spec:\n  source: {{hostPath: {{path: /srv}}}}\n{more}\n"
        );
        let manifests = read_text(Path::new("test"), &text);
        assert!(manifests.refusals.is_empty(), "{:?}", manifests.refusals);
        manifests.documents.into_iter().next().unwrap()
    }

    fn spec(more: &str) -> VirtiofsExportSpec {
        let document = document(more);
        export_spec(&document.share, &document.object.spec)
    }

    #[test]
    fn names_are_short_readable_and_unique() {
        let (share, node) = ("a".repeat(63), format!("{}.example.com", "n".repeat(200)));
        let long = export_name(&share, &node);
        assert!(long.len() <= 63, "{long}");
        assert_ne!(long, export_name(&share, &format!("{node}x")));
        assert_ne!(export_name("a-b", "c"), export_name("a", "b-c"));
        assert_eq!(export_name("images", "n1"), "images-n1-731330bf8d");
        for strange in ["", "-", "...", "ÄÖ", "A_B", "-x-"] {
            let name = export_name("s", strange);
            assert!(crate::ShareName::parse(&name).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_revision_covers_what_an_agent_applies() {
        let base = spec("").revision;
        for same in [
            "  nodes: {selector: {matchLabels: {kvm: 'true'}}}",
            "  rollout: {maxUnavailable: 1}",
            "  consumers: {namespaces: {matchNames: [vms]}}",
            // The default, written down.
            "  engine: {cache: Auto}",
        ] {
            assert_eq!(spec(same).revision, base, "{same}");
        }
        for other in [
            "  access: ReadWrite",
            "  content: Immutable",
            "  socket: {mode: '0600'}",
            "  engine: {cache: Never}",
            "  staleness: {policy: Report}",
        ] {
            assert_ne!(spec(other).revision, base, "{other}");
        }
    }

    #[test]
    fn an_agent_parses_an_export_to_the_share() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests/good");
        let manifests = crate::read_directory(&folder).unwrap();
        assert!(!manifests.documents.is_empty());
        for document in manifests.documents {
            let spec = export_spec(&document.share, &document.object.spec);
            let export = VirtiofsExport::new("any", VirtiofsExportSpec { node_name: "n1".into(), ..spec });
            assert_eq!(share_of(&export), Ok(document.share), "{}", document.origin);
        }
    }

    #[test]
    fn an_export_without_consumers_admits_nobody() {
        let admits = spec("  consumers: {namespaces: {matchNames: [vms]}}");
        let names = |spec: &VirtiofsExportSpec| spec.consumers.namespaces.clone().map(|it| it.match_names);
        assert_eq!(names(&admits), Some(vec!["vms".to_owned()]));
        let mut older = serde_json::to_value(&admits).unwrap();
        older.as_object_mut().unwrap().remove("consumers");
        assert_eq!(names(&serde_json::from_value(older).unwrap()), None);
    }

    #[test]
    fn only_the_operators_exports_have_a_controller() {
        let owner = json!({"apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsShare", "name": "images", "uid": "u",
                           "controller": true, "blockOwnerDeletion": true});
        let change = |field: &str, value: Value| {
            let mut owner = owner.clone();
            owner[field] = value;
            json!([owner])
        };
        let name = export_name("images", "n1");
        for (name, owners, field) in [
            (name.as_str(), json!([owner]), None),
            (name.as_str(), change("apiVersion", json!("virtiofs.dev/v1beta1")), None),
            ("images-n1", json!([owner]), Some("metadata.name")),
            (&export_name("images", "n2"), json!([owner]), Some("metadata.name")),
            (&name, json!([]), Some("metadata.ownerReferences")),
            (&name, json!([owner, owner]), Some("metadata.ownerReferences")),
            (&name, change("controller", json!(false)), Some("metadata.ownerReferences")),
            (&name, change("kind", json!("VirtiofsExport")), Some("metadata.ownerReferences")),
            (&name, change("name", json!("other")), Some("metadata.ownerReferences")),
            (&name, change("apiVersion", json!("example.com/v1")), Some("metadata.ownerReferences")),
            (&name, change("uid", json!("")), Some("metadata.ownerReferences")),
        ] {
            let mut export = VirtiofsExport::new(name, VirtiofsExportSpec { node_name: "n1".into(), ..spec("") });
            export.metadata.owner_references = serde_json::from_value(owners.clone()).unwrap();
            let found = controller_of(&export).map(|owner| owner.uid.as_str());
            assert_eq!(found.as_ref().err().map(|it| it.field.as_str()), field, "{name} {owners}");
        }
    }

    #[test]
    fn an_invalid_export_is_rejected_by_name() {
        let mut export = VirtiofsExport::new("images-n1-0", VirtiofsExportSpec { node_name: "n1".into(), ..spec("") });
        export.spec.share_name = "not.a.label".into();
        let refusals = share_of(&export).unwrap_err();
        assert_eq!((refusals[0].field.as_str(), refusals[0].share.as_deref()), ("spec.shareName", Some("images-n1-0")));
    }
}
