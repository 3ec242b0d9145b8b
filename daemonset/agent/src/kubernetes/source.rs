//! Follows this node's exports.

use std::path::Path;
use std::time::Instant;

use futures::{StreamExt, pin_mut};
use kube::api::Api;
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch_objects};
use kube::{Client, ResourceExt};
use tokio::sync::watch;
use virtiofs_crds::VirtiofsExport;

use super::exports::Exports;
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
    let mut exports = Exports { old: true, ..Exports::default() };
    for export in last_good.read() {
        exports.put(export, Instant::now());
    }
    let desired = exports.desired(&Desired::default());
    if !desired.shares.is_empty() {
        tracing::info!(shares = desired.shares.len(), "continuing with the last known exports");
    }
    let (desired_sender, desired) = watch::channel(desired);
    let (exports_sender, followed) = watch::channel(exports.clone());
    // Served from the API server's cache: a thousand agents that reconnect at once do not load its storage. Only objects of
    // this node are sent.
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}")).any_semantic();
    tokio::spawn(async move {
        let events = watch_objects(Api::<VirtiofsExport>::all(client), config).modify(strip).default_backoff();
        pin_mut!(events);
        let mut listed = Exports::default();
        let mut broken = false;
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed = Exports::default(),
                Ok(Event::InitApply(export)) => {
                    // The time of its last change is known from before.
                    let since = exports.known.get(&export.name_any()).filter(|(it, _)| it.spec == export.spec);
                    listed.put(export, since.map_or_else(Instant::now, |(_, since)| *since));
                    continue;
                }
                Ok(Event::InitDone) => {
                    exports = std::mem::take(&mut listed);
                    tracing::info!(exports = exports.known.len(), "exports received from the API server");
                    broken = false;
                }
                Ok(Event::Apply(export)) => exports.put(export, Instant::now()),
                Ok(Event::Delete(export)) => exports.remove(&export),
                Err(error) => {
                    if !std::mem::replace(&mut broken, true) {
                        tracing::warn!(%error, "the API server does not answer; the last known exports stay active");
                    }
                    continue;
                }
            }
            if let Err(error) = last_good.write(exports.all()) {
                tracing::warn!(%error, "exports not stored for the next agent");
            }
            let next = exports.desired(&desired_sender.borrow());
            // The exports first: a receiver of the desired state must find the exports it follows from.
            exports_sender.send_replace(exports.clone());
            desired_sender.send_if_modified(|desired| {
                let differs = *desired != next;
                *desired = next;
                differs
            });
        }
    });
    Source { desired, exports: followed }
}

fn strip(export: &mut VirtiofsExport) {
    export.metadata.managed_fields = None;
}
