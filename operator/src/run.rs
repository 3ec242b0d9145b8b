//! Puts the parts together: leadership, reflection, and looks at shares and nodes.

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
use virtiofs_crds::VirtiofsShare;

use crate::args::{Arguments, Command};
use crate::cluster::{Recent, Triggers, reflect};
use crate::metrics::Metrics;
use crate::pace::Pace;
use crate::retries::Retries;
use crate::writer::{FIELD_MANAGER, Writer};
use crate::{http, leadership, node, share, uninstall};

/// How many shares, and how many nodes, are looked at at a time.
const SHARES_AT_A_TIME: u16 = 4;
const NODES_AT_A_TIME: u16 = 8;

/// Runs until a signal, or until another operator works; or does what is asked instead.
pub(crate) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.context("cannot start")?;
    match &arguments.command {
        Some(Command::PrepareUninstall(what)) => runtime.block_on(uninstall::prepare(&arguments.namespace, what)),
        None => runtime.block_on(operate(arguments)),
    }
}

async fn operate(arguments: Arguments) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let metrics = Arc::new(Metrics::new()?);
    let client = Client::try_default().await.context("cannot tell how to reach the API server")?;
    let mut tasks = JoinSet::new();
    if let Some(address) = arguments.metrics {
        tasks.spawn(http::serve(http::bind(address).await?, metrics.clone()));
    }
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
    tracing::info!("working");
    let outcome = tokio::select! {
        outcome = work(&arguments, client, metrics, &mut tasks) => outcome,
        outcome = leadership.lost() => return outcome,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    // Whoever takes over must not meet a write of ours.
    tasks.shutdown().await;
    leadership.release().await;
    outcome
}

/// Looks at shares and nodes for ever.
async fn work(
    arguments: &Arguments,
    client: Client,
    metrics: Arc<Metrics>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let agents = arguments.agent_selector.as_deref().map(|selector| (arguments.namespace.as_str(), selector));
    let (cluster, triggers) = reflect(&client, agents, tasks);
    cluster.complete().await?;
    tracing::info!(shares = cluster.shares.len(), nodes = cluster.node_store().len(), "everything has been read");
    let writer = Writer::new(client.clone(), metrics.clone());
    let reporter = Reporter { controller: FIELD_MANAGER.to_owned(), instance: arguments.identity.clone() };
    let shares = Arc::new(share::Context {
        cluster: cluster.clone(),
        writer: writer.clone(),
        recorder: Recorder::new(client, reporter),
        metrics: metrics.clone(),
        pace: Pace::default(),
        retries: Retries::default(),
        shares_written: Recent::default(),
        exports_written: Recent::default(),
    });
    let (pace, retries) = (Pace::default(), Retries::default());
    let nodes = Arc::new(node::Context { cluster, writer, metrics, pace, retries });
    let Triggers { shares: share_triggers, nodes: node_triggers } = triggers;
    tokio::select! {
        () = look_at_shares(shares, share_triggers) => {}
        () = look_at_nodes(nodes, node_triggers) => {}
    }
    bail!("nobody says any more what has changed")
}

async fn look_at_shares(context: Arc<share::Context>, triggers: UnboundedReceiver<ObjectRef<VirtiofsShare>>) {
    let config = controller::Config::default().concurrency(SHARES_AT_A_TIME);
    let store = context.cluster.shares.clone();
    let reconcile = |share, context| Box::pin(share::reconcile(share, context));
    // Failures are told where they happen; a share that is gone is nobody's trouble.
    applier(reconcile, share::retry, context, store, queue(triggers), config).for_each(|_| async {}).await;
}

async fn look_at_nodes(context: Arc<node::Context>, triggers: UnboundedReceiver<ObjectRef<Node>>) {
    let config = controller::Config::default().concurrency(NODES_AT_A_TIME);
    let store = context.cluster.node_store();
    let reconcile = |node, context| Box::pin(node::reconcile(node, context));
    applier(reconcile, node::retry, context, store, queue(triggers), config).for_each(|_| async {}).await;
}

fn queue<T>(triggers: UnboundedReceiver<T>) -> impl futures::Stream<Item = Result<T, std::convert::Infallible>> {
    futures::stream::unfold(triggers, |mut triggers| async move { Some((Ok(triggers.recv().await?), triggers)) })
}
