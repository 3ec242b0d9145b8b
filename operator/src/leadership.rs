//! Leader election: of several operators, the holder of the lease works. An operator that loses it ends and is started
//! again, so that it never acts on outdated state.

use std::time::Duration;

use anyhow::{Context, bail};
use kube::Client;
use kube_lease_manager::{LeaseManagerBuilder, LeaseManagerError};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Name of the lease.
const LEASE: &str = "virtiofs-operator";

/// The lease, held.
pub(crate) struct Leadership {
    held: watch::Receiver<bool>,
    renewal: JoinHandle<Result<kube_lease_manager::LeaseManager, LeaseManagerError>>,
}

/// Waits until this operator holds the lease.
pub(crate) async fn acquire(
    client: Client,
    namespace: &str,
    identity: Option<String>,
    seconds: u64,
) -> anyhow::Result<Leadership> {
    let lease = LeaseManagerBuilder::new(client, LEASE).with_namespace(namespace);
    let lease = lease.with_duration(seconds).with_grace(seconds / 3);
    let lease = match identity {
        Some(identity) => lease.with_identity(identity),
        None => lease,
    };
    let lease = lease.build().await.with_context(|| format!("cannot create lease {namespace}/{LEASE}"))?;
    let (mut held, renewal) = lease.watch().await;
    held.wait_for(|held| *held).await.context("the lease is not renewed any more")?;
    Ok(Leadership { held, renewal })
}

impl Leadership {
    /// Waits until the lease is lost; always an error.
    pub(crate) async fn lost(&mut self) -> anyhow::Result<()> {
        let _ = self.held.wait_for(|held| !*held).await;
        bail!("lost the lease to another operator")
    }

    /// Releases the lease, so that another operator need not wait until it expires.
    pub(crate) async fn release(self) {
        drop(self.held);
        match tokio::time::timeout(Duration::from_secs(5), self.renewal).await {
            Ok(Ok(Ok(_))) => {}
            _ => tracing::warn!("cannot release the lease; another operator takes over when it expires"),
        }
    }
}
