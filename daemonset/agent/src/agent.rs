//! What `up`, `run` and `node` have in common: the reconcile loop and the sinks that every agent has, and for the first two
//! the directory of manifests as the source of desired state.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;
use tokio::time::sleep;
use virtiofs_client::runtime_dir::{Lock, RuntimeDir, RuntimeDirError};

use crate::args::ServeArgs;
use crate::broker::observer::Observer;
use crate::csi::RejectionCounts;
use crate::manifests::{self, Manifests};
use crate::metrics::{self, Access, Addresses, Listeners, Standby};
use crate::model::desired::Desired;
use crate::model::pass::Pass;
use crate::model::site::Site;
use crate::model::volume::Volumes;
use crate::probe::Sources;
use crate::publish_report;
use crate::reconcile::Reconciler;

/// Time between two attempts to lock the runtime directory.
const LOCK_EVERY: Duration = Duration::from_millis(200);

/// How long threads that wait for a source that hangs are waited for at the end.
pub(crate) const SHUTDOWN_WITHIN: Duration = Duration::from_millis(200);

/// The runtime directory and the addresses of metrics and probes, held by this agent alone.
pub(crate) struct Claim {
    /// The runtime directory.
    pub(crate) runtime_dir: RuntimeDir,
    listeners: Listeners,
    lock: Lock,
}

impl Claim {
    /// Takes the runtime directory and the addresses.
    ///
    /// # Errors
    /// Another agent has one of them, or the directory cannot be used.
    pub(crate) async fn take(runtime_dir: &Path, addresses: Addresses) -> anyhow::Result<Self> {
        let runtime_dir = RuntimeDir::prepare(runtime_dir)?;
        let lock = runtime_dir.lock()?;
        Self::with(runtime_dir, lock, addresses).await
    }

    /// The same, but waits while another agent runs there: two may be started for one node of a cluster.
    pub(crate) async fn wait_for(runtime_dir: &Path, addresses: Addresses) -> anyhow::Result<Self> {
        let runtime_dir = RuntimeDir::prepare(runtime_dir)?;
        let mut standby = None;
        let lock = loop {
            match runtime_dir.lock() {
                Err(RuntimeDirError::Taken(path)) => {
                    if standby.is_none() {
                        tracing::info!(runtime_dir = %path.display(), "another agent runs here; standing by");
                        // In the same network namespace the other agent has the address.
                        standby = Some(addresses.of_probes().and_then(|address| Standby::serve_at(address).ok()));
                    }
                    sleep(LOCK_EVERY).await;
                }
                other => break other?,
            }
        };
        if let Some(Some(standby)) = standby {
            standby.end().await;
        }
        Self::with(runtime_dir, lock, addresses).await
    }

    async fn with(runtime_dir: RuntimeDir, lock: Lock, addresses: Addresses) -> anyhow::Result<Self> {
        Ok(Claim { runtime_dir, listeners: addresses.bind().await?, lock })
    }
}

/// What the reconcile loop works on.
pub(crate) struct Inputs {
    /// The desired state.
    pub(crate) desired: watch::Receiver<Desired>,
    /// The volumes; `None` if this agent does not serve volumes.
    pub(crate) volumes: Option<watch::Receiver<Volumes>>,
    /// Rejected volume requests.
    pub(crate) rejections: RejectionCounts,
    /// The directory of manifests, if shares are declared in one.
    pub(crate) shares_dir: Option<PathBuf>,
    /// Where sources are probed.
    pub(crate) sources: Sources,
    /// Who may read the metrics.
    pub(crate) access: Access,
}

/// A running reconcile loop.
pub(crate) struct Running {
    /// The runtime directory.
    pub(crate) runtime_dir: RuntimeDir,
    /// The result of each pass.
    pub(crate) passes: watch::Receiver<Pass>,
    _lock: Lock,
}

/// Starts the reconcile loop and the sinks that every agent has.
pub(crate) fn start(claim: Claim, inputs: Inputs) -> Running {
    let Claim { runtime_dir, listeners, lock } = claim;
    let Inputs { desired, volumes, rejections, shares_dir, sources, access } = inputs;
    let observer = Arc::new(Observer::new(runtime_dir.broker_socket()));
    let site = Site { runtime_dir: runtime_dir.clone(), manifests: shares_dir.clone() };
    let passes = Reconciler { site, sources, desired, volumes, observer: observer.clone() }.start();
    metrics::start(listeners, metrics::Serving::new(observer, passes.clone(), rejections), access);
    tokio::spawn(publish_report::follow(passes.clone(), runtime_dir.published(), shares_dir));
    Running { runtime_dir, passes, _lock: lock }
}

/// An agent that serves a directory of manifests.
pub(crate) struct DirectoryAgent {
    /// The reconcile loop.
    pub(crate) running: Running,
    /// The directory of manifests.
    pub(crate) shares_dir: PathBuf,
    /// Follows that directory.
    pub(crate) manifests: Manifests,
}

/// Starts everything but the broker.
///
/// # Errors
/// The directory of manifests cannot be read, or another agent runs here.
pub(crate) async fn start_directory(args: &ServeArgs) -> anyhow::Result<DirectoryAgent> {
    let shares_dir =
        std::fs::canonicalize(&args.shares).with_context(|| format!("--shares {}", args.shares.display()))?;
    let claim = Claim::take(&args.runtime_dir, Addresses { metrics: args.metrics, probes: None }).await?;
    let manifests = manifests::follow(&shares_dir, &claim.runtime_dir.broker_socket())?;
    let inputs = Inputs {
        desired: manifests.desired.clone(),
        volumes: None,
        rejections: RejectionCounts::default(),
        shares_dir: Some(shares_dir.clone()),
        sources: Sources::default(),
        access: Access::default(),
    };
    Ok(DirectoryAgent { running: start(claim, inputs), shares_dir, manifests })
}
