//! `virtiofsctl check`.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;

use testkit::host::manifest;

/// What it prints, and whether it succeeds.
fn check(text: &str) -> (String, bool) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("share.yaml");
    fs::write(&file, text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_virtiofsctl")).arg("check").arg(&file).output().unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.success())
}

fn share(more: &str) -> String {
    manifest("images", "/srv/images".as_ref(), more)
}

#[test]
fn a_valid_manifest_shows_its_configuration() {
    let (said, good) = check(&share("  content: Immutable"));
    assert!(good, "{said}");
    for word in
        ["\"images\" is valid", "/srv/images", "Immutable", "ReadOnly", "cache Always", "names cached a day", "0660"]
    {
        assert!(said.contains(word), "{word} in\n{said}");
    }
}

#[test]
fn the_reach_of_file_locks_is_printed_where_several_guests_write() {
    const UNKNOWN: &str = "content Shared, file locks of one VM are unknown to other VMs and to the host";
    for (more, expected) in [
        ("  access: ReadWrite", UNKNOWN),
        ("  access: ReadWrite\n  content: Shared", UNKNOWN),
        ("  access: ReadWrite\n  content: Exclusive", "content Exclusive, one VM at a time"),
        ("  access: ReadOnly", "content Shared"),
        ("  content: Immutable", "content Immutable"),
    ] {
        let (said, good) = check(&share(more));
        let line = said.lines().map(str::trim).find(|line| line.starts_with("content"));
        assert!(good && line == Some(expected), "{more}: {said}");
    }
}

#[test]
fn an_invalid_manifest_is_rejected_with_its_field() {
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
fn an_invalid_document_does_not_affect_others() {
    let (said, good) = check(&(share("") + "---\n" + &manifest("other", "/srv/other".as_ref(), "  content: Frozen")));
    assert!(!good);
    assert!(said.contains("document 1: share \"images\" is valid"), "{said}");
    assert!(said.contains("document 2: spec.content"), "{said}");
}

#[test]
fn an_empty_or_missing_file_is_no_success() {
    let (said, good) = check("");
    assert!(!good && said.contains("no VirtiofsShare"), "{said}");
    let output =
        Command::new(env!("CARGO_BIN_EXE_virtiofsctl")).args(["check", "/nowhere/share.yaml"]).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("/nowhere/share.yaml"), "{output:?}");
}
