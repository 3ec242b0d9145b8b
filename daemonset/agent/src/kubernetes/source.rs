//! Follows this node's exports.

use std::path::Path;
use std::time::Instant;

use futures::{StreamExt, pin_mut};
use kube::api::Api;
use kube::core::DeserializeGuard;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource};
use tokio::sync::watch;
use virtiofs_crds::VirtiofsExport;

use super::exports::{Exports, Watched};
use super::last_good::LastGood;
use crate::model::desired::Desired;

/// The declarations for this node.
pub(crate) struct Source {
    /// The desired state.
    pub(crate) desired: watch::Receiver<Desired>,
    /// The exports it follows from.
    pub(crate) exports: watch::Receiver<Exports>,
}

/// Follows the exports of a node. While the API server does not answer, the last known exports stay active.
pub(crate) fn follow(client: Client, node: &str, runtime_dir: &Path) -> Source {
    let last_good = LastGood::of(runtime_dir, node);
    let mut watched = Watched::continuing(last_good.read(), Instant::now());
    let desired = watched.exports.desired(&Desired::default());
    if !desired.shares.is_empty() {
        tracing::info!(shares = desired.shares.len(), "continuing with the last known exports");
    }
    let (desired_sender, desired) = watch::channel(desired);
    let (exports_sender, followed) = watch::channel(watched.exports.clone());
    // Served from the API server's cache: a thousand agents that reconnect at once do not load its storage. Only objects of
    // this node are sent.
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}")).any_semantic();
    tokio::spawn(async move {
        let events = watcher(Api::<DeserializeGuard<VirtiofsExport>>::all(client), config);
        let events = events.modify(strip).default_backoff();
        pin_mut!(events);
        let mut broken = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    if !watched.apply(event, Instant::now()) {
                        continue;
                    }
                    broken = false;
                }
                Err(error) => {
                    if !std::mem::replace(&mut broken, true) {
                        tracing::warn!(%error, "the API server does not answer; the last known exports stay active");
                    }
                    continue;
                }
            }
            if let Err(error) = last_good.write(watched.exports.all()) {
                tracing::warn!(%error, "exports not stored for the next agent");
            }
            let next = watched.exports.desired(&desired_sender.borrow());
            // The exports first: a receiver of the desired state must find the exports it follows from.
            exports_sender.send_replace(watched.exports.clone());
            desired_sender.send_if_modified(|desired| {
                let differs = *desired != next;
                *desired = next;
                differs
            });
        }
    });
    Source { desired, exports: followed }
}

fn strip(export: &mut DeserializeGuard<VirtiofsExport>) {
    export.meta_mut().managed_fields = None;
}
