//! What the documentation shows must be true.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use virtiofs_contract::preflight::Reason;

fn document(name: &str) -> String {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", ".."].iter().collect();
    std::fs::read_to_string(root.join(name)).unwrap()
}

/// The manifests in a text, each up to the end of its code block or here-document.
fn manifests(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(first) = lines.find(|line| line.starts_with("apiVersion: virtiofs.dev/")) {
        let rest = lines.by_ref().take_while(|line| !matches!(*line, "```" | "EOF"));
        found.push(std::iter::once(first).chain(rest).collect::<Vec<_>>().join("\n"));
    }
    found
}

#[test]
fn manifests_in_the_documentation_are_accepted() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["README.md", "docs/MANUAL.md"] {
        let found = manifests(&document(name));
        assert!(!found.is_empty(), "no manifest in {name}");
        for (number, manifest) in found.iter().enumerate() {
            let file = folder.path().join(format!("{number}.yaml"));
            std::fs::write(&file, manifest).unwrap();
            let output = Command::new(env!("CARGO_BIN_EXE_virtiofs-agent")).arg("check").arg(&file).output().unwrap();
            assert!(output.status.success(), "{name}:\n{manifest}\n{}", String::from_utf8_lossy(&output.stdout));
        }
    }
}

#[test]
fn every_reason_is_in_the_manual() {
    let schema = serde_json::to_value(schemars::schema_for!(Reason)).unwrap();
    let reasons = schema["oneOf"].as_array().unwrap();
    assert!(!reasons.is_empty());
    let manual = document("docs/MANUAL.md");
    for reason in reasons.iter().map(|it| it["const"].as_str().unwrap()) {
        assert!(manual.contains(&format!("| `{reason}` |")), "{reason} has no row in docs/MANUAL.md");
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    for name in ["README.md", "CONTRIBUTING.md", "docs/MANUAL.md", "docs/ARCHITECTURE.md"] {
        let folder = Path::new(name).parent().unwrap();
        for link in document(name).split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let local = !link.is_empty() && !link.contains("://");
            let target: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", ".."].iter().collect();
            assert!(!local || target.join(folder).join(link).exists(), "{name} links to {link}, which is not there");
        }
    }
}
