//! The table of manifests under `tests/manifests`: accepted and rejected ones, with the expected messages.
//!
//! A bad manifest starts with comments that state the expected result:
//!
//! ```text
//! # field: spec.engine.cache          the field that the refusal names
//! # says: did you mean Always?        part of its message
//! # api-server: Unsupported value     the same of an API server, where its words differ; `-`: it accepts it
//! ```

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests too")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use kube_cel::Validator;
use serde_json::Value;
use virtiofs_crds::{Manifests, Refusal, VirtiofsShare, read_files, schema, validate};

fn manifests(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manifests").join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// What a manifest's own comments expect of it.
fn expectation(file: &Path, key: &str) -> Option<String> {
    let text = fs::read_to_string(file).unwrap();
    let prefix = format!("# {key}: ");
    text.lines().find_map(|line| line.strip_prefix(&prefix).map(str::to_owned))
}

fn read(file: &Path) -> Manifests {
    read_files([file])
}

/// The documents of a file as they stand there, whatever is wrong with them.
fn raw(file: &Path) -> Vec<Value> {
    serde_saphyr::from_multiple(&fs::read_to_string(file).unwrap()).unwrap()
}

/// Every rule of a schema and the schemas in it.
fn rules(schema: &Value) -> BTreeSet<String> {
    let own = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    let mut found: BTreeSet<String> = own.map(|rule| rule["rule"].as_str().unwrap().to_owned()).collect();
    let fields = schema["properties"].as_object().into_iter().flat_map(|fields| fields.values());
    for child in fields.chain(schema.get("items")).chain(schema.get("additionalProperties")) {
        found.extend(rules(child));
    }
    found
}

/// The rules that a document breaks.
fn broken(document: &Value, old: Option<&Value>) -> BTreeSet<String> {
    let errors = Validator::new().validate(schema::object(), document, old).err();
    errors.into_iter().flatten().map(|error| error.rule).collect()
}

fn assert_refused(file: &Path, refusals: &[Refusal]) {
    let name = file.file_name().unwrap().display();
    let field = expectation(file, "field").unwrap_or_else(|| panic!("{name} says no field"));
    let says = expectation(file, "says").unwrap_or_else(|| panic!("{name} says no message"));
    assert_eq!(refusals.len(), 1, "{name}: {refusals:#?}");
    assert_eq!(refusals[0].field, field, "{name}: {}", refusals[0]);
    assert!(refusals[0].message.contains(&says), "{name}: {}", refusals[0]);
}

#[test]
fn good_manifests_are_accepted() {
    for file in manifests("good") {
        let read = read(&file);
        assert_eq!(read.refusals, [], "{}", file.display());
        assert_eq!(read.documents.len(), 1, "{}", file.display());
    }
}

#[test]
fn bad_manifests_are_rejected_with_field_and_remedy() {
    let files = manifests("bad");
    assert!(files.len() >= 90, "{}", files.len());
    for file in files {
        let read = read(&file);
        assert!(read.documents.is_empty(), "{}", file.display());
        assert_refused(&file, &read.refusals);
    }
}

#[test]
fn every_rule_rejects_a_manifest_of_the_table() {
    let bad = manifests("bad").into_iter().flat_map(|file| raw(&file));
    let mut refusing: BTreeSet<String> = bad.flat_map(|document| broken(&document, None)).collect();
    for file in manifests("changes") {
        let documents = raw(&file);
        refusing.extend(broken(&documents[1], Some(&documents[0])));
    }
    let silent: Vec<String> = rules(schema::object()).difference(&refusing).cloned().collect();
    assert_eq!(silent, Vec::<String>::new(), "no manifest under tests/manifests breaks these");
}

#[test]
fn rules_about_changes_apply() {
    for file in manifests("changes") {
        let [old, new]: [VirtiofsShare; 2] = raw(&file)
            .into_iter()
            .map(|value| serde_json::from_value(value).unwrap())
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        match validate::check_change(&old, &new) {
            Ok(()) => assert!(expectation(&file, "accepted").is_some(), "{} was accepted", file.display()),
            Err(refusals) => assert_refused(&file, &refusals),
        }
    }
}
