//! The documentation is valid.

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
            let output = Command::new(env!("CARGO_BIN_EXE_virtiofsctl")).arg("check").arg(&file).output().unwrap();
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

/// All documents of the repository that link to each other, relative to its root.
fn documents() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(PathBuf::from).into();
    for folder in ["docs", "docs/runbooks"] {
        let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", "..", folder].iter().collect();
        let names = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name());
        found.extend(names.map(|name| Path::new(folder).join(name)).filter(|it| it.extension() == Some("md".as_ref())));
    }
    found
}

/// All Rust sources of the repository, relative to its root.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            sources(&path, found);
        } else if path.extension() == Some("rs".as_ref()) {
            found.push(path);
        }
    }
}

#[test]
fn source_files_that_documents_name_exist() {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", ".."].iter().collect();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap()) {
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        if entry.file_type().unwrap().is_dir() && !is_hidden && entry.file_name() != "target" {
            sources(&entry.path(), &mut files);
        }
    }
    let mut named = 0;
    for name in documents().into_iter().filter(|name| name != Path::new("CHANGELOG.md")) {
        let text = std::fs::read_to_string(root.join(&name)).unwrap();
        let quoted = text.split('`').filter(|it| it.ends_with(".rs") && !it.contains(char::is_whitespace));
        for path in quoted {
            named += 1;
            assert!(files.iter().any(|file| file.ends_with(path)), "{} names {path}: no such file", name.display());
        }
    }
    assert!(named > 20, "{named} source files are named");
}

/// The anchors that a code host derives from the headings of a document.
fn anchors(text: &str) -> Vec<String> {
    let mut in_code = false;
    let mut found = Vec::new();
    for line in text.lines() {
        in_code ^= line.starts_with("```");
        if let Some(heading) = line.strip_prefix('#').filter(|_| !in_code) {
            let heading = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = heading.chars().filter(|it| it.is_alphanumeric() || matches!(it, ' ' | '-' | '_'));
            found.push(kept.collect::<String>().replace(' ', "-"));
        }
    }
    found
}

#[test]
fn links_between_documents_exist() {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", ".."].iter().collect();
    for name in documents() {
        let text = std::fs::read_to_string(root.join(&name)).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
            let target = if file.is_empty() { name.clone() } else { name.parent().unwrap().join(file) };
            let shown = name.display();
            assert!(root.join(&target).exists(), "{shown} links to {link}: no such file");
            if let Some(anchor) = anchor {
                let target = std::fs::read_to_string(root.join(&target)).unwrap();
                assert!(anchors(&target).iter().any(|it| it == anchor), "{shown} links to {link}: no such heading");
            }
        }
    }
}

/// Texts in backquotes of the form `file::test`.
fn cited_tests(text: &str) -> Vec<(String, String)> {
    let word =
        |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let quoted = text.split('`').skip(1).step_by(2).filter_map(|quoted| quoted.split_once("::"));
    quoted.filter(|(file, test)| word(file) && word(test)).map(|(file, test)| (file.into(), test.into())).collect()
}

/// The text of all tests whose file or folder has this name.
fn tests_of(file: &str) -> String {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", ".."].iter().collect();
    let mut folders = vec![root.join("daemonset"), root.join("e2e/tests"), root.join("operator"), root.join("crds")];
    let mut text = String::new();
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension() == Some("rs".as_ref())
                && path.iter().any(|part| part == file || part.to_str() == Some(&format!("{file}.rs")))
            {
                text.push_str(&std::fs::read_to_string(path).unwrap());
            }
        }
    }
    text
}

#[test]
fn tests_that_documents_cite_exist() {
    let cited = cited_tests(&document("docs/SEMANTICS.md"));
    assert!(cited.len() > 5, "{cited:?}");
    for (file, test) in cited {
        assert!(tests_of(&file).contains(&format!("fn {test}(")), "docs/SEMANTICS.md cites {file}::{test}");
    }
}

/// In rows of tables: paths of test files, each with the tests that are named after it.
fn cited_files(text: &str) -> Vec<(String, Vec<String>)> {
    let mut cited: Vec<(String, Vec<String>)> = Vec::new();
    for row in text.lines().filter(|line| line.starts_with('|')) {
        let column = row.trim_end_matches([' ', '|']).rsplit('|').next().unwrap_or_default();
        let mut of_row: Vec<(String, Vec<String>)> = Vec::new();
        for quoted in column.split('`').skip(1).step_by(2) {
            match of_row.last_mut() {
                _ if quoted.ends_with(".rs") => of_row.push((quoted.into(), Vec::new())),
                Some((_, tests)) if !quoted.contains('/') => tests.push(quoted.into()),
                _ => {}
            }
        }
        cited.extend(of_row);
    }
    cited
}

#[test]
fn tests_that_the_security_table_cites_exist() {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "..", ".."].iter().collect();
    let cited = cited_files(&document("docs/SECURITY.md"));
    assert!(cited.len() > 20, "{cited:?}");
    for (file, tests) in cited {
        let known = [root.join("daemonset").join(&file), root.join(&file)].into_iter().find(|path| path.exists());
        let path = known.unwrap_or_else(|| panic!("docs/SECURITY.md cites {file}: no such file"));
        let text = std::fs::read_to_string(&path).unwrap();
        for test in tests {
            assert!(text.contains(&format!("fn {test}(")), "docs/SECURITY.md cites {test} in {file}: no such test");
        }
    }
}
