//! `virtiofs-agent check`, as a person at a shell sees it.

#![allow(clippy::unwrap_used)]

mod host;

use std::fs;
use std::process::Command;

use host::{AGENT, manifest};

/// What it prints, and whether it is content.
fn check(text: &str) -> (String, bool) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("share.yaml");
    fs::write(&file, text).unwrap();
    let output = Command::new(AGENT).arg("check").arg(&file).output().unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.success())
}

fn share(more: &str) -> String {
    manifest("images", "/srv/images".as_ref(), more)
}

#[test]
fn a_good_manifest_shows_what_follows_from_it() {
    let (said, good) = check(&share("  content: Immutable"));
    assert!(good, "{said}");
    for word in
        ["\"images\" is good", "/srv/images", "Immutable", "ReadOnly", "cache Always", "names kept a day", "0660"]
    {
        assert!(said.contains(word), "{word} in\n{said}");
    }
}

#[test]
fn a_bad_manifest_is_refused_with_its_field_and_what_would_be_right() {
    for (text, field, hint) in [
        (share("  access: Sometimes"), "spec.access", "ReadOnly"),
        (share("  content: Frozen"), "spec.content", "Immutable"),
        (share("  acess: ReadOnly"), "spec.acess", "access"),
        (share("  socket: {mode: \"0999\"}"), "spec.socket.mode", "octal"),
        (share("  engine: {cache: Allways}"), "spec.engine.cache", "Always"),
        (share("  engine: {openFiles: 3}"), "spec.engine.openFiles", "1024"),
        (manifest("Images", "/srv".as_ref(), ""), "metadata.name", "a-z"),
        (manifest("images", "srv/images".as_ref(), ""), "spec.source.hostPath", "absolute"),
        (manifest("images", "/srv/../etc".as_ref(), ""), "spec.source.hostPath", ".."),
        (manifest("images", "/proc".as_ref(), ""), "spec.source.hostPath", "/proc"),
        (share("").replace("v1alpha1", "v1"), "apiVersion", "virtiofs.dev/v1alpha1"),
        (share("").replace("VirtiofsShare", "VirtioShare"), "kind", "VirtiofsShare"),
        ("[".to_owned(), "document 1", "YAML"),
        ("- a\n- b\n".to_owned(), "document 1", "mapping"),
        (share("") + "---\n" + &share(""), "metadata.name", "keep one of them"),
    ] {
        let (said, good) = check(&text);
        assert!(!good && said.contains(field) && said.contains(hint), "{field}, {hint} in\n{said}of\n{text}");
    }
}

#[test]
fn the_second_document_is_named_and_the_first_stays_good() {
    let (said, good) = check(&(share("") + "---\n" + &manifest("other", "/srv/other".as_ref(), "  content: Frozen")));
    assert!(!good);
    assert!(said.contains("document 1: share \"images\" is good"), "{said}");
    assert!(said.contains("document 2: spec.content"), "{said}");
}

#[test]
fn nothing_to_check_and_no_such_file_are_no_success() {
    let (said, good) = check("");
    assert!(!good && said.contains("no VirtiofsShare"), "{said}");
    let output = Command::new(AGENT).args(["check", "/nowhere/share.yaml"]).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("/nowhere/share.yaml"), "{output:?}");
}
