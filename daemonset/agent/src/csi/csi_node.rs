//! The node's CSINode, in which the kubelet writes down what it has registered. A driver that is not in it gets no pods,
//! however well its agent is.

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

/// How long the kubelet may take to register the driver before it is asked anew; longer each time, up to the second.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(60));

/// A registration socket and who serves there. Dropped, both are gone.
struct Offered {
    bound: Bound,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Keeps the driver registered: offers it to the kubelet, and anew when its entry goes away or the socket does.
///
/// # Errors
/// The socket cannot be made.
pub(super) async fn stay_registered(
    client: Client,
    node: String,
    offer: impl Fn() -> anyhow::Result<(Bound, JoinHandle<Result<(), tonic::transport::Error>>)>,
) -> anyhow::Result<()> {
    let again = || offer().map(|(bound, server)| Offered { bound, server });
    let mut offered = again()?;
    let config = Config::default().fields(&format!("metadata.name={node}")).any_semantic();
    let entries = watcher(Api::<CSINode>::all(client), config).default_backoff();
    pin_mut!(entries);
    // Nothing is known until the API server has said something.
    let (mut registered, mut listed) = (None, None);
    let mut pause = ASK_AGAIN.0;
    let mut due = Instant::now() + pause;
    loop {
        tokio::select! {
            event = entries.next() => match event {
                Some(Ok(watcher::Event::Init)) => listed = None,
                Some(Ok(watcher::Event::InitApply(entry))) => listed = Some(has_driver(&entry)),
                Some(Ok(watcher::Event::InitDone)) => registered = Some(listed.unwrap_or(false)),
                Some(Ok(watcher::Event::Apply(entry))) => registered = Some(has_driver(&entry)),
                Some(Ok(watcher::Event::Delete(_))) => registered = Some(false),
                Some(Err(error)) => tracing::debug!(%error, "the CSINode cannot be watched now"),
                None => anyhow::bail!("the CSINode is no longer watched"),
            },
            () = sleep_until(due) => {
                if registered == Some(false) || !offered.bound.in_place() {
                    tracing::warn!(node, "the driver is not in the CSINode; offering it to the kubelet anew");
                    drop(offered);
                    offered = again()?;
                    pause = (pause * 2).min(ASK_AGAIN.1);
                } else {
                    pause = ASK_AGAIN.0;
                }
                due = Instant::now() + pause;
            }
        }
    }
}

fn has_driver(entry: &CSINode) -> bool {
    entry.spec.drivers.iter().any(|driver| driver.name == DRIVER)
}
