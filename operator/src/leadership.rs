//! Which of several operators works: the one that holds the lease. Who loses it ends, and is started again as a
//! newcomer; nothing of what it had in mind then can be out of date.

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
    keeping: JoinHandle<Result<kube_lease_manager::LeaseManager, LeaseManagerError>>,
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
    let lease = lease.build().await.with_context(|| format!("cannot make lease {namespace}/{LEASE}"))?;
    let (mut held, keeping) = lease.watch().await;
    held.wait_for(|held| *held).await.context("the lease is no longer looked after")?;
    Ok(Leadership { held, keeping })
}

impl Leadership {
    /// Ends when the lease is lost, always with an error.
    pub(crate) async fn lost(&mut self) -> anyhow::Result<()> {
        let _ = self.held.wait_for(|held| !*held).await;
        bail!("the lease was lost; another operator works now")
    }

    /// Gives the lease back, so that another operator need not wait for it to expire.
    pub(crate) async fn release(self) {
        drop(self.held);
        match tokio::time::timeout(Duration::from_secs(5), self.keeping).await {
            Ok(Ok(Ok(_))) => {}
            _ => tracing::warn!("the lease could not be given back; another operator takes over when it expires"),
        }
    }
}
