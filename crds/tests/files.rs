//! Files and directories: which documents are read, which are ignored, and hostile ones.

use std::fs;
use std::path::Path;

use virtiofs_crds::{Manifests, read_directory, read_files, read_text};

const SHARE: &str = "apiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\n";

fn share(name: &str) -> String {
    format!("{SHARE}metadata: {{name: {name}}}\nspec: {{source: {{hostPath: {{path: /srv/{name}}}}}}}\n")
}

fn read(text: &str) -> Manifests {
    read_text(Path::new("shares.yaml"), text)
}

fn names(read: &Manifests) -> Vec<&str> {
    read.documents.iter().map(|document| document.share.name.as_str()).collect()
}

fn refusals(read: &Manifests) -> Vec<String> {
    read.refusals.iter().map(ToString::to_string).collect()
}

/// The only refusal of a text, which must not declare anything either.
fn refusal(text: &str) -> String {
    let read = read(text);
    assert!(read.documents.is_empty(), "{text}");
    assert_eq!(read.refusals.len(), 1, "{text}: {:?}", read.refusals);
    read.refusals[0].to_string()
}

#[test]
fn documents_of_one_file_are_independent() {
    let bad = share("b").replace("spec:", "sepc: {}\nspec:");
    let read = read(&[share("a"), bad, share("c")].join("---\n"));
    assert_eq!(names(&read), ["a", "c"]);
    assert_eq!(refusals(&read), ["shares.yaml, document 2 (b): sepc: unknown field; did you mean \"spec\"?"]);
    assert_eq!(read.documents[1].origin.to_string(), "shares.yaml, document 3");
}

#[test]
fn empty_documents_are_ignored() {
    assert_eq!(names(&read("")), Vec::<&str>::new());
    let read = read(&format!("# a comment\n---\n---\n# another\n---\n{}---\n", share("a")));
    assert_eq!(names(&read), ["a"]);
    assert_eq!(refusals(&read), Vec::<String>::new());
}

#[test]
fn json_documents_are_read() {
    let text = r#"{"apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsShare",
        "metadata": {"name": "a"}, "spec": {"source": {"hostPath": {"path": "/srv/a"}}}}"#;
    assert_eq!(names(&read(text)), ["a"]);
}

#[test]
fn output_of_kubectl_is_accepted() {
    let text = share("a").replace(
        "metadata: {name: a}",
        "metadata: {name: a, uid: 6f1c, resourceVersion: \"7\", generation: 2, creationTimestamp: \"2026-01-01T00:00:00Z\",\n  labels: {a: b}, annotations: {c: d}, finalizers: [virtiofs.dev/in-use]}\nstatus: {sessions: 3}",
    );
    let read = read(&text);
    assert_eq!(refusals(&read), Vec::<String>::new());
    assert_eq!(names(&read), ["a"]);
    assert_eq!(read.documents[0].object.status, None);
}

#[test]
fn other_kinds_are_ignored_and_misspelled_shares_are_rejected() {
    let read = read(&["apiVersion: v1\nkind: Namespace\nmetadata: {name: vms}\n".to_owned(), share("a")].join("---\n"));
    assert_eq!(names(&read), ["a"]);
    assert_eq!(refusals(&read), Vec::<String>::new());
    assert_eq!(read.ignored[0].what, "v1 Namespace");

    for (from, to, says) in [
        (
            "kind: VirtiofsShare",
            "kind: VirtioFsShare",
            "kind: \"VirtioFsShare\" is not a kind of virtiofs.dev; did you mean VirtiofsShare",
        ),
        (
            "kind: VirtiofsShare",
            "kind: Pod",
            "kind: \"Pod\" is not a kind of virtiofs.dev; the known kind is VirtiofsShare",
        ),
        ("kind: VirtiofsShare\n", "", "kind: is missing; write VirtiofsShare"),
        ("apiVersion: virtiofs.dev/v1alpha1\n", "", "apiVersion: is missing; write virtiofs.dev/v1alpha1"),
        ("/v1alpha1", "/v1", "apiVersion: \"virtiofs.dev/v1\" is unknown; write virtiofs.dev/v1alpha1"),
        ("virtiofs.dev/", "virtiofs.io/", "apiVersion: \"virtiofs.io/v1alpha1\" is unknown"),
        ("virtiofs.dev/v1alpha1", "v1", "apiVersion: \"v1\" is unknown"),
    ] {
        let refused = refusal(&share("a").replace(from, to));
        assert!(refused.starts_with(&format!("shares.yaml, document 1 (a): {says}")), "{refused}");
    }
    assert!(refusal("apiVersion: v1\nkind: List\nitems: []\n").contains("List is not supported"));
    assert!(refusal("- a\n- b\n").contains("is not a mapping"));
    assert!(refusal("just words\n").contains("is not a mapping"));
}

#[test]
fn documents_of_one_name_are_all_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let (one, two) = (directory.path().join("1.yaml"), directory.path().join("2.yaml"));
    fs::write(&one, [share("a"), share("b")].join("---\n")).unwrap();
    fs::write(&two, share("b")).unwrap();
    let read = read_directory(directory.path()).unwrap();
    assert_eq!(names(&read), ["a"]);
    let both = format!(
        "\"b\" is declared in {}, document 2 and in {}, document 1; keep one of them",
        one.display(),
        two.display()
    );
    assert_eq!(read.refusals.len(), 2);
    for (refusal, place) in read.refusals.iter().zip([&one, &two]) {
        assert_eq!((refusal.field.as_str(), refusal.message.as_str()), ("metadata.name", both.as_str()));
        assert_eq!(refusal.origin.as_ref().map(|origin| &origin.file), Some(place));
        assert_eq!(refusal.share.as_deref(), Some("b"));
    }
}

#[test]
fn a_directory_is_read_by_name_and_not_deeply() {
    let directory = tempfile::tempdir().unwrap();
    for (file, name) in
        [("b.yaml", "b"), ("a.yml", "a"), ("c.json", "c"), (".d.yaml", "d"), ("e.yaml~", "e"), ("f.txt", "f")]
    {
        fs::write(directory.path().join(file), share(name)).unwrap();
    }
    fs::create_dir(directory.path().join("g.yaml")).unwrap();
    fs::write(directory.path().join("g.yaml/g.yaml"), share("g")).unwrap();
    assert_eq!(names(&read_directory(directory.path()).unwrap()), ["a", "b", "c"]);
    assert!(read_directory(&directory.path().join("none")).is_err());
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    let read = read_files([&file]);
    assert_eq!(refusals(&read), [format!("{}: No such file or directory (os error 2)", file.display())]);
    fs::write(&file, [b'a', b':', 0xff]).unwrap();
    assert_eq!(refusals(&read_files([&file])), [format!("{}: is not UTF-8 text at byte 2", file.display())]);
    assert_eq!(
        refusals(&read_files([directory.path()])),
        [format!("{}: is not a regular file", directory.path().display())]
    );
}

#[test]
fn a_huge_file_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, "# ".to_owned() + &"x".repeat(2 << 20)).unwrap();
    assert!(refusals(&read_files([&file]))[0].contains("is larger than 1048576 bytes"));
}

#[test]
fn yaml_errors_name_the_line() {
    let broken = read(&[share("a"), "spec: [\n".to_owned()].join("---\n"));
    assert_eq!(names(&broken), ["a"]);
    assert!(refusals(&broken)[0].starts_with("shares.yaml, document 2: is not valid YAML: "), "{:?}", broken.refusals);
    assert!(refusals(&broken)[0].contains("line "), "{:?}", broken.refusals);
    assert!(refusal(&share("a").replace("spec:", "kind: Pod\nspec:")).contains("duplicate mapping key `kind`"));
}

#[test]
fn expanding_documents_are_rejected() {
    let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let inner = vec![format!("*a{}", level - 1); 10].join(", ");
        laughs += &format!("a{level}: &a{level} [{inner}]\n");
    }
    assert!(refusal(&laughs).contains("is not valid YAML"));
    assert!(refusal(&"[".repeat(100_000)).contains("is not valid YAML"));
    let deep = format!(
        "{}a: 1\n",
        (0..500).map(|depth| format!("{}k:\n", " ".repeat(depth))).collect::<String>() + &" ".repeat(500)
    );
    assert!(refusal(&deep).contains("is not valid YAML"));
    let many = share("a") + &(0..5000).map(|field| format!("f{field}: 1\n")).collect::<String>();
    let many = read(&many).refusals;
    assert_eq!((many.len(), many[20].message.as_str()), (21, "and 4980 more; correct these first"));
    let long = share("a").replace("/srv/a", &"/x".repeat(400_000));
    assert!(refusal(&long).len() < 1000, "a message never repeats a huge value");
}

#[test]
fn harmless_aliases_are_followed() {
    let text = "apiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\nmetadata: {name: &name a}\nspec: {source: {hostPath: {path: /srv/a}}, nodes: {selector: {matchLabels: {share: *name}}}}\n";
    assert_eq!(refusals(&read(text)), Vec::<String>::new());
}
