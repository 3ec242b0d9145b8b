//! Documents of any content.

use std::path::Path;

use virtiofs_crds::{export::export_spec, read_text};

/// True if the text has a document that is accepted. Each of these can be turned into an export; each error has a message.
fn documents(input: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(input) else { return false };
    let manifests = read_text(Path::new("fuzz.yaml"), text);
    for document in &manifests.documents {
        let _ = export_spec(&document.share, &document.object.spec);
    }
    assert!(manifests.refusals.iter().all(|refusal| !refusal.to_string().is_empty()));
    !manifests.documents.is_empty()
}

#[test]
fn fuzz_manifests() {
    let words: [&[u8]; 12] = [
        b"---\n",
        b"apiVersion: virtiofs.dev/v1alpha1\n",
        b"kind: VirtiofsShare\n",
        b"  access: ReadWrite\n",
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"? ",
        b"!!binary ",
        b"{a: [",
        b"|+\n",
        b"\t",
    ];
    fuzz::run("manifests", &words, documents);
}
