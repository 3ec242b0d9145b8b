//! What `up` and `run` have in common: the directory as the source of desired state, the loop, and the sinks that
//! both have.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use tokio::sync::watch;

use crate::args::ServeArgs;
use crate::broker::observer::Observer;
use crate::manifests::{self, Manifests};
use crate::metrics;
use crate::plan::Site;
use crate::published;
use crate::reconcile::{Reconciler, Turn};
use crate::runtime_dir::{Lock, RuntimeDir};

/// An agent at work.
pub(crate) struct Serving {
    /// Where agent and broker meet.
    pub(crate) runtime_dir: RuntimeDir,
    /// Where shares are declared.
    pub(crate) shares_dir: PathBuf,
    /// Follows that directory.
    pub(crate) manifests: Manifests,
    /// What each turn of the loop finds.
    pub(crate) turns: watch::Receiver<Turn>,
    _only_agent: Lock,
}

/// Starts everything but the broker.
pub(crate) async fn start(args: &ServeArgs) -> anyhow::Result<Serving> {
    let shares_dir =
        std::fs::canonicalize(&args.shares).with_context(|| format!("--shares {}", args.shares.display()))?;
    let runtime_dir = RuntimeDir::prepare(&args.runtime_dir)?;
    let only_agent = runtime_dir.lock()?;
    let listener = match args.metrics {
        Some(address) => Some(metrics::bind(address).await?),
        None => None,
    };
    let manifests = manifests::follow(&shares_dir, &runtime_dir.broker_socket())?;
    let observer = Arc::new(Observer::new(runtime_dir.broker_socket()));
    let site = Site { runtime_dir: runtime_dir.clone(), manifests: Some(shares_dir.clone()) };
    let turns = Reconciler { site, desired: manifests.desired.clone(), observer: observer.clone() }.start();
    if let Some(listener) = listener {
        tokio::spawn(metrics::serve(listener, metrics::Serving { observer, turns: turns.clone() }));
    }
    tokio::spawn(published::keep(turns.clone(), runtime_dir.published(), shares_dir.clone()));
    Ok(Serving { runtime_dir, shares_dir, manifests, turns, _only_agent: only_agent })
}
