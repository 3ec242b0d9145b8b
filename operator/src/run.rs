//! Runs the operator: leadership, watches, and the reconcile loops of shares, exports and nodes.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{applier, controller};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use virtiofs_crds::{VirtiofsExport, VirtiofsShare};

use crate::args::{Arguments, Command};
use crate::backoff::Backoff;
use crate::cluster::{Recent, watch};
use crate::metrics::Metrics;
use crate::throttle::Throttle;
use crate::writer::{FIELD_MANAGER, Writer};
use crate::{foreign, http, leadership, node, share, uninstall};

/// Number of concurrent reconciles of shares.
const CONCURRENT_SHARES: u16 = 4;
/// Number of concurrent reconciles of exports.
const CONCURRENT_EXPORTS: u16 = 4;
/// Number of concurrent reconciles of nodes.
const CONCURRENT_NODES: u16 = 8;

/// Runs a subcommand, or the operator until a signal or until it loses the lease.
pub(crate) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    match &arguments.command {
        Some(Command::PrepareUninstall(what)) => runtime.block_on(uninstall::prepare(&arguments.namespace, what)),
        None => runtime.block_on(operate(arguments)),
    }
}

async fn operate(arguments: Arguments) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let metrics = Arc::new(Metrics::new()?);
    let client = Client::try_default().await.context("cannot configure the client of the API server")?;
    let mut tasks = JoinSet::new();
    http::start(&arguments, &client, &metrics, &mut tasks).await?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "waiting for the lease");
    let acquired = async {
        let version = client.apiserver_version().await.context("the API server does not answer")?;
        metrics.reached();
        tracing::info!(kubernetes = version.git_version, "the API server answers");
        leadership::acquire(client.clone(), &arguments.namespace, arguments.identity.clone(), arguments.lease_seconds)
            .await
    };
    let mut leadership = tokio::select! {
        leadership = acquired => leadership?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    metrics.leads();
    tracing::info!("holding the lease; reconciling");
    let outcome = tokio::select! {
        outcome = reconcile(&arguments, client, metrics, &mut tasks) => outcome,
        outcome = leadership.lost() => return outcome,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    // No write of this operator may follow the release of the lease.
    tasks.shutdown().await;
    leadership.release().await;
    outcome
}

/// Reconciles shares, exports and nodes for ever.
async fn reconcile(
    arguments: &Arguments,
    client: Client,
    metrics: Arc<Metrics>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let agents = arguments.agent_selector.as_deref().map(|selector| (arguments.namespace.as_str(), selector));
    let (cluster, requests) = watch(&client, agents, &metrics, tasks);
    cluster.complete().await?;
    tracing::info!(shares = cluster.shares.len(), nodes = cluster.node_store().len(), "all objects are listed");
    let writer = Writer::new(client.clone(), metrics.clone());
    let reporter = Reporter { controller: FIELD_MANAGER.to_owned(), instance: arguments.identity.clone() };
    let shares = Arc::new(share::Context {
        cluster: cluster.clone(),
        writer: writer.clone(),
        recorder: Recorder::new(client, reporter),
        metrics: metrics.clone(),
        throttle: Throttle::default(),
        backoff: Backoff::default(),
        shares_written: Recent::default(),
        exports_written: Recent::default(),
    });
    let (throttle, backoff) = (Throttle::default(), Backoff::default());
    let exports = Arc::new(foreign::Context {
        cluster: cluster.clone(),
        writer: writer.clone(),
        metrics: metrics.clone(),
        backoff: Backoff::default(),
    });
    let nodes = Arc::new(node::Context { cluster, writer, metrics, throttle, backoff });
    tokio::select! {
        () = reconcile_shares(shares, requests.shares) => {}
        () = reconcile_exports(exports, requests.exports) => {}
        () = reconcile_nodes(nodes, requests.nodes) => {}
    }
    bail!("the watches have ended")
}

async fn reconcile_shares(context: Arc<share::Context>, requests: UnboundedReceiver<ObjectRef<VirtiofsShare>>) {
    let config = controller::Config::default().concurrency(CONCURRENT_SHARES);
    let store = context.cluster.shares.clone();
    let reconcile = |share, context| Box::pin(share::reconcile(share, context));
    // `retry` logs failures; a share that was deleted is none.
    applier(reconcile, share::retry, context, store, queue(requests), config).for_each(|_| async {}).await;
}

async fn reconcile_exports(context: Arc<foreign::Context>, requests: UnboundedReceiver<ObjectRef<VirtiofsExport>>) {
    let config = controller::Config::default().concurrency(CONCURRENT_EXPORTS);
    let store = context.cluster.export_store();
    let reconcile = |export, context| Box::pin(foreign::reconcile(export, context));
    applier(reconcile, foreign::retry, context, store, queue(requests), config).for_each(|_| async {}).await;
}

async fn reconcile_nodes(context: Arc<node::Context>, requests: UnboundedReceiver<ObjectRef<Node>>) {
    let config = controller::Config::default().concurrency(CONCURRENT_NODES);
    let store = context.cluster.node_store();
    let reconcile = |node, context| Box::pin(node::reconcile(node, context));
    applier(reconcile, node::retry, context, store, queue(requests), config).for_each(|_| async {}).await;
}

fn queue<T>(requests: UnboundedReceiver<T>) -> impl futures::Stream<Item = Result<T, std::convert::Infallible>> {
    futures::stream::unfold(requests, |mut requests| async move { Some((Ok(requests.recv().await?), requests)) })
}
