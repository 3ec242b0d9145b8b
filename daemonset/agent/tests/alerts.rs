//! Alerts and dashboard use exported metrics, and each alert has a runbook page and tests. `make rules` tests the rules with
//! promtool.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

const ALERTS: &str = "charts/virtiofs-operator/files/alerts.yaml";
const DASHBOARD: &str = "charts/virtiofs-operator/files/dashboard.json";
const TESTS: &str = "e2e/rules/alerts.test.yaml";
const EXPORTS: [&str; 3] = [
    "daemonset/client/src/metrics/families.rs",
    "daemonset/client/src/metrics/staleness.rs",
    "operator/src/metrics.rs",
];

fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "..", name].iter().collect()
}

fn document(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap()
}

fn yaml(name: &str) -> Value {
    serde_saphyr::from_str(&document(name)).unwrap()
}

fn rules() -> Vec<Value> {
    yaml(ALERTS)["groups"].as_array().unwrap().iter().flat_map(|it| it["rules"].as_array().unwrap().clone()).collect()
}

/// Our metrics in a text, without the suffixes of histograms.
fn metrics(text: &str) -> BTreeSet<String> {
    let words = text.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_'));
    let ours = words.filter(|word| word.starts_with("virtiofs_"));
    let base = |word: &str| {
        let suffix = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
        suffix.unwrap_or(word).to_owned()
    };
    ours.map(base).collect()
}

#[test]
fn alerts_and_dashboard_use_exported_metrics() {
    let exported = EXPORTS.map(document).concat();
    for name in [ALERTS, DASHBOARD] {
        let asked = metrics(&document(name));
        assert!(asked.len() > 5, "{name} asks for next to nothing: {asked:?}");
        for metric in asked {
            assert!(exported.contains(&format!("\"{metric}\"")), "{name} asks for {metric}, which nobody exports");
        }
    }
}

#[test]
fn alerts_and_runbook_pages_match() {
    let mut names = BTreeSet::new();
    for rule in rules() {
        let name = rule["alert"].as_str().unwrap().to_owned();
        let link = rule["annotations"]["runbook_url"].as_str().unwrap().to_owned();
        assert_eq!(link, format!("docs/runbooks/{name}.md"), "the chart puts an address before this path");
        let page = fs::read_to_string(path(&link)).unwrap_or_else(|error| panic!("{link}: {error}"));
        for part in [format!("# {name}"), "## What happened".into(), "## Check".into(), "## Do".into()] {
            assert!(page.lines().any(|line| line == part), "{link} has no part {part:?}");
        }
        assert!(["critical", "warning", "info"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{name}");
        assert!(names.insert(name), "twice: {rule}");
    }
    let pages = fs::read_dir(path("docs/runbooks")).unwrap().map(|entry| entry.unwrap().path());
    let pages: BTreeSet<_> = pages.map(|page| page.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    let index = document("docs/runbooks/README.md");
    assert_eq!(pages, names.iter().cloned().chain(["README".to_owned()]).collect());
    assert!(names.iter().all(|name| index.contains(&format!("]({name}.md)"))), "the index lacks a page");
}

#[test]
fn every_alert_has_a_firing_and_a_silent_test() {
    let tests = yaml(TESTS);
    let cases = tests["tests"].as_array().unwrap().iter().flat_map(|it| it["alert_rule_test"].as_array().unwrap());
    let shown = |fires: bool| -> BTreeSet<String> {
        let expected = |case: &&Value| case["exp_alerts"].as_array().is_some_and(|alerts| alerts.is_empty() != fires);
        cases.clone().filter(expected).map(|case| case["alertname"].as_str().unwrap().to_owned()).collect()
    };
    let names: BTreeSet<_> = rules().iter().map(|rule| rule["alert"].as_str().unwrap().to_owned()).collect();
    assert_eq!(shown(true), names, "fires");
    assert_eq!(shown(false), names, "does not fire");
}

#[test]
fn links_in_the_runbooks_exist() {
    for entry in fs::read_dir(path("docs/runbooks")).unwrap() {
        let page = entry.unwrap().path();
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            assert!(page.parent().unwrap().join(link).exists(), "{} links to {link}", page.display());
        }
    }
}
