//! The chart's objects for the Prometheus operator. No API server here has its kinds, so the test parses the documents.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use e2e::cluster::{Kubectl, NAMESPACE, NodeDaemons, Operator, wait_for};
use e2e::node::free_port;
use serde_json::{Value, json};

use crate::permissions::refused;
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
        check_pod_monitor(monitor, &documents).with_context(|| format!("{monitor:#}"))?;
    }
    let rules = of_kind(&documents, "PrometheusRule");
    let [rules] = rules[..] else { anyhow::bail!("{} PrometheusRules", rules.len()) };
    check_alerts(rules).with_context(|| format!("{rules:#}"))?;

    let without_pods = documents_of_api_only(world)?;
    ensure!(of_kind(&without_pods, "PodMonitor").is_empty(), "monitors of pods that do not exist");
    Ok(())
}

/// Runs operator and agent with the chart's options for TLS and authorization: metrics are served to accounts with the
/// chart's role, probes to everybody.
pub(crate) fn metrics_are_served_to_authorized_clients(world: &mut World) -> Result<()> {
    let chart = ["--set", "metrics.tlsSecret=any", "--set", "metrics.authorization=true"];
    let permissions = documents(world, &[&chart[..], &["-s", "templates/metrics-rbac.yaml"]].concat())?;
    for document in &permissions {
        world.admin().apply(document)?;
    }
    let certificate = certificate(world.cluster.dir())?;
    for account in ["prometheus", "nobody"] {
        world.admin().apply(&json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, "namespace": NAMESPACE},
        }))?;
    }
    world.admin().apply(&json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "test-metrics"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "virtiofs-metrics-reader"},
        "subjects": [{"kind": "ServiceAccount", "name": "prometheus", "namespace": NAMESPACE}],
    }))?;
    world.cluster.add_node("scraped", &[])?;
    let (operator, agent) = (free_port()?, free_port()?);
    let options = |metrics: SocketAddr| -> Vec<String> {
        let mut options = certificate.to_vec();
        options.extend(["--metrics-authorization".to_owned(), format!("--metrics={metrics}")]);
        options
    };
    let _operator = Operator::start_with_options(&world.cluster, "scraped", &options(operator))?;
    let _daemons = NodeDaemons::start_with_options(&world.cluster, "scraped", &options(agent))?;
    let prometheus = world.cluster.service_account("prometheus")?;
    let nobody = world.cluster.service_account("nobody")?;
    for (address, metric) in [(operator, "virtiofs_operator_leader"), (agent, "virtiofs_build_info")] {
        let page = |kubectl: &Kubectl, path: &str| kubectl.of_server(address)?.run(&["get", "--raw", path]);
        let text = wait_for("the metrics", || Ok(page(&prometheus, "/metrics").ok()))?;
        ensure!(text.contains(metric), "no {metric} in\n{text}");
        refused("reading metrics without the role", page(&nobody, "/metrics"), "orbidden")?;
        let stranger = nobody.with_token("of-nobody")?;
        refused("reading metrics with another token", page(&stranger, "/metrics"), "to provide credentials")?;
        page(&stranger, "/healthz")?;
        let plain = e2e::node::scrape(address);
        ensure!(!plain.unwrap_or_default().contains(metric), "served without TLS");
    }
    world.admin().run(&["delete", "clusterrolebinding", "test-metrics"])?;
    for document in &permissions {
        let (kind, name) = (&document["kind"], &document["metadata"]["name"]);
        world.admin().run(&["delete", kind.as_str().unwrap_or_default(), name.as_str().unwrap_or_default()])?;
    }
    Ok(())
}

/// Creates a certificate, and returns the options that name it.
fn certificate(dir: &Path) -> Result<[String; 2]> {
    let (chain, key) = (dir.join("tls.crt"), dir.join("tls.key"));
    let mut openssl = Command::new("openssl");
    openssl.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=test",
    ]);
    let output = openssl.arg("-keyout").arg(&key).arg("-out").arg(&chain).output().context("running openssl")?;
    ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    Ok([format!("--metrics-tls-cert={}", chain.display()), format!("--metrics-tls-key={}", key.display())])
}

fn documents(world: &World, options: &[&str]) -> Result<Vec<Value>> {
    serde_saphyr::from_multiple(&world.cluster.chart(options)?).context("parsing the chart as YAML")
}

fn documents_of_api_only(world: &World) -> Result<Vec<Value>> {
    documents(world, &[&VALUES[..], &["--set", "workloads.enabled=false"]].concat())
}

fn of_kind<'a>(documents: &'a [Value], kind: &str) -> Vec<&'a Value> {
    documents.iter().filter(|document| document["kind"] == kind).collect()
}

/// Checks that one workload has the selected labels and a port of the monitor's name.
fn check_pod_monitor(monitor: &Value, documents: &[Value]) -> Result<()> {
    ensure!(
        monitor["apiVersion"] == "monitoring.coreos.com/v1" && is_selected(monitor),
        "the Prometheus operator does not select it"
    );
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
    ensure!(endpoint["interval"] == "45s", "the interval is not the configured one");
    Ok(())
}

fn check_alerts(rules: &Value) -> Result<()> {
    ensure!(
        rules["apiVersion"] == "monitoring.coreos.com/v1" && is_selected(rules),
        "the Prometheus operator does not select it"
    );
    let groups = rules["spec"]["groups"].as_array().context("no groups")?;
    let alerts: Vec<&Value> = groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten()).collect();
    ensure!(!alerts.is_empty(), "no alerts");
    for alert in alerts {
        let page = alert["annotations"]["runbook_url"].as_str().unwrap_or_default();
        let name = alert["alert"].as_str().unwrap_or_default();
        ensure!(page == format!("https://example.com/runbooks/{name}.md"), "wrong runbook of alert {name}: {page}");
        ensure!(alert["expr"].is_string(), "alert {name} has no expression");
    }
    Ok(())
}

/// True if it has the label by which the Prometheus operator selects it.
fn is_selected(document: &Value) -> bool {
    document["metadata"]["labels"]["release"] == json!("prometheus")
}
