//! `virtiofs-agent node`: the agent of one node of a cluster. The broker is a process of its own, which the agent neither
//! starts nor ends.

use std::sync::Arc;

use anyhow::Context;
use kube::Client;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::{self, Claim, Inputs, SHUTDOWN_WITHIN};
use crate::announce::{self, Output};
use crate::args::NodeArgs;
use crate::csi::{self, KubeletDir, Plugin, Registry, RejectionCounts};
use crate::kubernetes::{self, Sink};
use crate::metrics::{Access, Addresses};
use crate::probe::Sources;

/// Runs until a signal.
pub(crate) fn node(args: &NodeArgs) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(work(args));
    runtime.shutdown_timeout(SHUTDOWN_WITHIN);
    result
}

async fn work(args: &NodeArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let addresses = Addresses { metrics: args.metrics, probes: args.probes };
    let certificate = args.access.certificate().context("--metrics-tls-cert, --metrics-tls-key")?;
    let claim = tokio::select! {
        claim = Claim::wait_for(&args.runtime_dir, addresses) => claim?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let client = Client::try_default().await.context("no configuration for the API server")?;
    let source = kubernetes::follow(client.clone(), &args.node, claim.runtime_dir.root());
    let kubelet = args.kubelet_dir.clone().map(KubeletDir::new);
    let registry = kubelet.as_ref().map(|kubelet| Registry::open(csi::registry_in(kubelet))).transpose()?.map(Arc::new);
    let rejections = RejectionCounts::default();
    let inputs = Inputs {
        desired: source.desired,
        volumes: registry.as_ref().map(|registry| registry.follow()),
        rejections: rejections.clone(),
        shares_dir: None,
        sources: Sources { root: args.source_root.clone(), allowed: args.allowed_sources.clone() },
        access: Access { certificate, reviewer: args.access.reviewer(&client) },
    };
    let running = agent::start(claim, inputs);
    tracing::info!(node = args.node, runtime_dir = %running.runtime_dir.root().display(), "agent started");
    tokio::spawn(announce::follow(running.passes.clone(), Output::Log));
    let sink = Sink { client: client.clone(), exports: source.exports.clone(), passes: running.passes.clone() };
    let plugin = kubelet.zip(registry).map(|(kubelet, registry)| Plugin {
        node: args.node.clone(),
        kubelet,
        client,
        exports: source.exports,
        passes: running.passes.clone(),
        registry,
        rejections,
        limits: args.limits,
    });
    let plugin = async move {
        match plugin {
            Some(plugin) => plugin.run().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = sink.run() => anyhow::bail!("the reconcile loop has ended"),
        ended = plugin => ended.context("volumes")?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("agent ends; the broker and all sessions continue");
    Ok(())
}
