//! The node's CSINode, in which the kubelet lists registered drivers. A driver that is not listed gets no pods.

use std::time::Duration;

use futures::{StreamExt, pin_mut};
use k8s_openapi::api::storage::v1::CSINode;
use kube::runtime::watcher::Config;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use virtiofs_crds::volume::DRIVER;

use super::socket::Bound;

/// How long the kubelet may take to register the driver before the socket is created again; doubled up to the second value.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(60));

/// A registration socket and its server. Dropping it ends both.
struct RegistrationSocket {
    bound: Bound,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Drop for RegistrationSocket {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Keeps the driver registered: creates the registration socket, and again if the driver's entry or the socket disappears.
///
/// # Errors
/// The socket cannot be created.
pub(super) async fn stay_registered(
    client: Client,
    node: String,
    create: impl Fn() -> anyhow::Result<(Bound, JoinHandle<Result<(), tonic::transport::Error>>)>,
) -> anyhow::Result<()> {
    let create = || create().map(|(bound, server)| RegistrationSocket { bound, server });
    let mut socket = create()?;
    let config = Config::default().fields(&format!("metadata.name={node}")).any_semantic();
    let entries = watcher(Api::<CSINode>::all(client), config).default_backoff();
    pin_mut!(entries);
    // Unknown until the API server has answered.
    let (mut registered, mut listed) = (None, None);
    let mut pause = RETRY_AFTER.0;
    let mut due = Instant::now() + pause;
    loop {
        tokio::select! {
            event = entries.next() => match event {
                Some(Ok(watcher::Event::Init)) => listed = None,
                Some(Ok(watcher::Event::InitApply(entry))) => listed = Some(has_driver(&entry)),
                Some(Ok(watcher::Event::InitDone)) => registered = Some(listed.unwrap_or(false)),
                Some(Ok(watcher::Event::Apply(entry))) => registered = Some(has_driver(&entry)),
                Some(Ok(watcher::Event::Delete(_))) => registered = Some(false),
                Some(Err(error)) => tracing::debug!(%error, "cannot watch the CSINode"),
                None => anyhow::bail!("the watch of the CSINode has ended"),
            },
            () = sleep_until(due) => {
                if registered == Some(false) || !socket.bound.in_place() {
                    tracing::warn!(node, "the driver is not in the CSINode; registering it again");
                    drop(socket);
                    socket = create()?;
                    pause = (pause * 2).min(RETRY_AFTER.1);
                } else {
                    pause = RETRY_AFTER.0;
                }
                due = Instant::now() + pause;
            }
        }
    }
}

fn has_driver(entry: &CSINode) -> bool {
    entry.spec.drivers.iter().any(|driver| driver.name == DRIVER)
}
