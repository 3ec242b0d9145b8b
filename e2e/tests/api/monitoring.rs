//! What the chart has for the Prometheus operator, whose kinds no API server here knows: its documents are read instead.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::world::World;

const VALUES: [&str; 10] = [
    "--set",
    "podMonitor.enabled=true",
    "--set",
    "podMonitor.interval=45s",
    "--set",
    "podMonitor.labels.release=prometheus",
    "--set",
    "alerts.enabled=true,alerts.labels.release=prometheus",
    "--set",
    "alerts.runbooks=https://example.com/runbooks/",
];

pub(crate) fn monitors_match_existing_objects(world: &mut World) -> Result<()> {
    let documents = documents(world, &VALUES)?;
    let monitors = of_kind(&documents, "PodMonitor");
    ensure!(monitors.len() == 2, "{monitors:#?}");
    for monitor in monitors {
        finds_its_pods(monitor, &documents).with_context(|| format!("{monitor:#}"))?;
    }
    let rules = of_kind(&documents, "PrometheusRule");
    let [rules] = rules[..] else { anyhow::bail!("{} PrometheusRules", rules.len()) };
    is_made_of_alerts(rules).with_context(|| format!("{rules:#}"))?;

    let without_pods = documents_of_api_only(world)?;
    ensure!(of_kind(&without_pods, "PodMonitor").is_empty(), "monitors of pods that are not there");
    Ok(())
}

fn documents(world: &World, options: &[&str]) -> Result<Vec<Value>> {
    serde_saphyr::from_multiple(&world.cluster.chart(options)?).context("the chart is not YAML")
}

fn documents_of_api_only(world: &World) -> Result<Vec<Value>> {
    documents(world, &[&VALUES[..], &["--set", "workloads.enabled=false"]].concat())
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

/// One workload has the labels that are selected, and a port of the name.
fn finds_its_pods(monitor: &Value, documents: &[Value]) -> Result<()> {
    ensure!(monitor["apiVersion"] == "monitoring.coreos.com/v1" && is_found(monitor), "its operator does not find it");
    let selected = monitor["spec"]["selector"]["matchLabels"].as_object().context("it selects nothing")?;
    let templates = documents.iter().map(|document| &document["spec"]["template"]);
    let pods: Vec<&Value> = templates
        .filter(|pod| {
            !selected.is_empty() && selected.iter().all(|(key, value)| pod["metadata"]["labels"][key] == *value)
        })
        .collect();
    let [pod] = pods[..] else { anyhow::bail!("it selects pods of {} workloads", pods.len()) };
    let endpoints = monitor["spec"]["podMetricsEndpoints"].as_array().context("no endpoints")?;
    let [endpoint] = &endpoints[..] else { anyhow::bail!("{} endpoints", endpoints.len()) };
    let ports = pod["spec"]["containers"][0]["ports"].as_array().context("the pods have no ports")?;
    ensure!(ports.iter().any(|port| port["name"] == endpoint["port"]), "no port of that name: {ports:?}");
    ensure!(endpoint["interval"] == "45s", "not the interval that was given");
    Ok(())
}

fn is_made_of_alerts(rules: &Value) -> Result<()> {
    ensure!(rules["apiVersion"] == "monitoring.coreos.com/v1" && is_found(rules), "its operator does not find it");
    let groups = rules["spec"]["groups"].as_array().context("no groups")?;
    let alerts: Vec<&Value> = groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten()).collect();
    ensure!(!alerts.is_empty(), "no alerts");
    for alert in alerts {
        let page = alert["annotations"]["runbook_url"].as_str().unwrap_or_default();
        let name = alert["alert"].as_str().unwrap_or_default();
        ensure!(page == format!("https://example.com/runbooks/{name}.md"), "the page of alert {name} is {page}");
        ensure!(alert["expr"].is_string(), "alert {name} says not when");
    }
    Ok(())
}

/// Has it the label by which the Prometheus operator is to find it?
fn is_found(document: &Value) -> bool {
    document["metadata"]["labels"]["release"] == json!("prometheus")
}
