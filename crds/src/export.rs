//! From a share to what is asked of a node, and from there back to a share.
//!
//! The operator resolves a share once, so that all nodes serve the same whatever version their agents have; the
//! agent parses what it is asked through the same border as a manifest: [`Share::from_object`].

use std::hash::Hasher;

use kube::ResourceExt;
use kube::core::ObjectMeta;
use serde_json::{Value, json};
use siphasher::sip::SipHasher24;

use crate::Share;
use crate::refusal::Refusal;
use crate::v1alpha1::{
    Consumers, EngineOptions, ExportMode, Nodes, Rollout, VirtiofsExport, VirtiofsExportSpec, VirtiofsShare,
    VirtiofsShareSpec,
};

/// How much of a share's and of a node's name is repeated in an export's, so that a person recognises them.
const SHARE_PART: usize = 28;
const NODE_PART: usize = 22;

/// The name of the export of `share` on `node`: what is left of both names, and a hash of them in full.
///
/// # Guarantees
/// At most 63 characters of `[a-z0-9-]`, whatever is given; equal for equal arguments, in every release.
pub fn export_name(share: &str, node: &str) -> String {
    let mut hasher = SipHasher24::new();
    hasher.write(share.as_bytes());
    // No name holds a zero byte, so no two pairs run into the same text.
    hasher.write_u8(0);
    hasher.write(node.as_bytes());
    let hash = format!("{:010x}", hasher.finish() >> 24);
    let parts = [readable(share, SHARE_PART), readable(node, NODE_PART), hash];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

/// The beginning of a name, of letters, digits and hyphens between them.
fn readable(name: &str, most: usize) -> String {
    let allowed = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
    let start: String = name.chars().take(most).map(allowed).collect();
    start.trim_matches('-').to_owned()
}

/// What a node is to be asked for a share: everything except which node, and how it is doing.
///
/// # Guarantees
/// Pure. Two shares that are to be served alike have equal revisions; `consumers`, which hold at once, are no part of
/// it, nor is what does not reach an agent: `nodes` and `rollout`.
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
        engine: EngineOptions::from(&share.engine),
        staleness: declared.staleness.clone(),
        baseline: None,
    };
    spec.revision = revision(&spec);
    spec
}

/// The name of the values of an export.
fn revision(spec: &VirtiofsExportSpec) -> String {
    let values = json!([spec.source, spec.access, spec.content, spec.socket, spec.engine, spec.staleness]);
    let mut hasher = SipHasher24::new();
    hasher.write(canonical(&values).to_string().as_bytes());
    format!("{:010x}", hasher.finish() >> 24)
}

/// The same with keys in order, so that a revision does not depend on how a build orders them.
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

/// The share that a node is asked to serve, or every reason why it cannot be understood. Who may use it is no part of
/// that: [`VirtiofsExportSpec::consumers`] says so where somebody asks.
pub fn share_of(export: &VirtiofsExport) -> Result<Share, Vec<Refusal>> {
    let spec = &export.spec;
    let declared = VirtiofsShareSpec {
        source: spec.source.clone(),
        access: spec.access,
        content: spec.content,
        nodes: Nodes::default(),
        consumers: Consumers::default(),
        socket: spec.socket.clone(),
        engine: spec.engine.clone(),
        staleness: spec.staleness.clone(),
        rollout: Rollout::default(),
    };
    let mut share = VirtiofsShare::new(&spec.share_name, declared);
    share.metadata = ObjectMeta { name: Some(spec.share_name.clone()), ..ObjectMeta::default() };
    Share::from_object(&share)
        .map_err(|refusals| refusals.into_iter().map(|it| it.of(Some(&export.name_any()))).collect())
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
    fn names_are_short_readable_and_never_the_same() {
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
    fn a_revision_is_of_what_an_agent_acts_on() {
        let base = spec("").revision;
        for same in [
            "  nodes: {selector: {matchLabels: {kvm: 'true'}}}",
            "  rollout: {maxUnavailable: 1}",
            "  consumers: {namespaces: {matchNames: [vms]}}",
            // Said in words what holds anyway.
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
    fn an_agent_reads_out_of_an_export_what_was_declared() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests/good");
        let manifests = crate::read_directory(&folder).unwrap();
        assert!(!manifests.documents.is_empty());
        for document in manifests.documents {
            let export = VirtiofsExport::new("any", export_spec(&document.share, &document.object.spec));
            assert_eq!(share_of(&export), Ok(document.share), "{}", document.origin);
        }
    }

    #[test]
    fn an_export_says_whom_the_share_admits_and_an_older_one_admits_nobody() {
        let admits = spec("  consumers: {namespaces: {matchNames: [vms]}}");
        let names = |spec: &VirtiofsExportSpec| spec.consumers.namespaces.clone().map(|it| it.match_names);
        assert_eq!(names(&admits), Some(vec!["vms".to_owned()]));
        let mut older = serde_json::to_value(&admits).unwrap();
        older.as_object_mut().unwrap().remove("consumers");
        assert_eq!(names(&serde_json::from_value(older).unwrap()), None);
    }

    #[test]
    fn what_cannot_be_understood_is_refused_by_name() {
        let mut export = VirtiofsExport::new("images-n1-0", spec(""));
        export.spec.share_name = "not.a.label".into();
        let refusals = share_of(&export).unwrap_err();
        assert_eq!((refusals[0].field.as_str(), refusals[0].share.as_deref()), ("metadata.name", Some("images-n1-0")));
    }
}
