//! `virtiofs-agent node`: the agent of one node of a cluster. The broker is a process of its own, which this one neither
//! starts nor ends.

use std::sync::Arc;

use anyhow::Context;
use kube::Client;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::announce::{self, Audience};
use crate::args::NodeArgs;
use crate::csi::{self, KubeletDir, Plugin, RefusalCounts, Registry};
use crate::kubernetes::{self, Sink};
use crate::serve::{self, Place, Work};
use crate::source::Sources;
use crate::up::LEAVE_BEHIND_AFTER;

/// Works until a signal.
pub(crate) fn node(args: &NodeArgs) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let result = runtime.block_on(work(args));
    runtime.shutdown_timeout(LEAVE_BEHIND_AFTER);
    result
}

async fn work(args: &NodeArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let place = tokio::select! {
        place = Place::wait_for(&args.runtime_dir, args.metrics) => place?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let client = Client::try_default().await.context("cannot tell how to reach the API server")?;
    let source = kubernetes::follow(client.clone(), &args.node, place.runtime_dir.root());
    let kubelet = args.kubelet_dir.clone().map(KubeletDir::new);
    let registry = kubelet.as_ref().map(|kubelet| Registry::open(csi::registry_in(kubelet))).transpose()?.map(Arc::new);
    let refusals = RefusalCounts::default();
    let work = Work {
        desired: source.desired,
        volumes: registry.as_ref().map(|registry| registry.follow()),
        refusals: refusals.clone(),
        shares_dir: None,
        sources: Sources { root: args.source_root.clone(), allowed: args.allowed_sources.clone() },
    };
    let serving = serve::serve(place, work);
    tracing::info!(node = args.node, runtime_dir = %serving.runtime_dir.root().display(), "agent started");
    tokio::spawn(announce::follow(serving.turns.clone(), Audience::Log));
    let sink = Sink {
        client: client.clone(),
        exports: source.exports.clone(),
        turns: serving.turns.clone(),
        observer: serving.observer.clone(),
    };
    let plugin = kubelet.zip(registry).map(|(kubelet, registry)| Plugin {
        node: args.node.clone(),
        kubelet,
        client,
        exports: source.exports,
        turns: serving.turns.clone(),
        registry,
        refusals,
    });
    let plugin = async move {
        match plugin {
            Some(plugin) => plugin.run().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = sink.run() => anyhow::bail!("the loop has ended"),
        ended = plugin => ended.context("volumes")?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("agent ends; the broker and all sessions go on");
    Ok(())
}
