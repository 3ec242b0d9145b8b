//! What `up`, `run` and `node` have in common: the loop and the sinks that all have, and for the first two the directory
//! as the source of desired state.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::args::ServeArgs;
use crate::broker::observer::Observer;
use crate::csi::RefusalCounts;
use crate::desired::Desired;
use crate::manifests::{self, Manifests};
use crate::metrics::{self, Standby};
use crate::plan::Site;
use crate::published;
use crate::reconcile::{Reconciler, Turn};
use crate::runtime_dir::{Lock, RuntimeDir, RuntimeDirError};
use crate::source::Sources;
use crate::volume::Volumes;

/// How often it is tried to become the only agent.
const TRY_EVERY: Duration = Duration::from_millis(200);

/// Where an agent works, for as long as it has this.
pub(crate) struct Place {
    /// Where agent and broker meet.
    pub(crate) runtime_dir: RuntimeDir,
    listener: Option<TcpListener>,
    _only_agent: Lock,
}

impl Place {
    /// Takes the runtime directory and the address of metrics, so that whatever is in the way is said at once.
    pub(crate) async fn take(runtime_dir: &Path, metrics: Option<SocketAddr>) -> anyhow::Result<Self> {
        let runtime_dir = RuntimeDir::prepare(runtime_dir)?;
        let only_agent = runtime_dir.lock()?;
        Self::with(runtime_dir, only_agent, metrics).await
    }

    /// The same, but waits while another agent works there: two may be started for one node of a cluster.
    pub(crate) async fn wait_for(runtime_dir: &Path, metrics: Option<SocketAddr>) -> anyhow::Result<Self> {
        let runtime_dir = RuntimeDir::prepare(runtime_dir)?;
        let mut standby = None;
        let only_agent = loop {
            match runtime_dir.lock() {
                Err(RuntimeDirError::Taken(path)) => {
                    if standby.is_none() {
                        tracing::info!(runtime_dir = %path.display(), "another agent works here; standing by");
                        // On one network with the other it is that one's address.
                        standby = Some(metrics.and_then(|address| Standby::answer_at(address).ok()));
                    }
                    sleep(TRY_EVERY).await;
                }
                other => break other?,
            }
        };
        if let Some(Some(standby)) = standby {
            standby.end().await;
        }
        Self::with(runtime_dir, only_agent, metrics).await
    }

    async fn with(runtime_dir: RuntimeDir, only_agent: Lock, metrics: Option<SocketAddr>) -> anyhow::Result<Self> {
        let listener = match metrics {
            Some(address) => Some(metrics::bind(address).await?),
            None => None,
        };
        Ok(Place { runtime_dir, listener, _only_agent: only_agent })
    }
}

/// The loop at work, wherever its declarations come from.
pub(crate) struct Loop {
    /// Where agent and broker meet.
    pub(crate) runtime_dir: RuntimeDir,
    /// What each turn finds.
    pub(crate) turns: watch::Receiver<Turn>,
    /// Asks the broker.
    pub(crate) observer: Arc<Observer>,
    _only_agent: Lock,
}

/// What the loop is to work on.
pub(crate) struct Work {
    /// What is declared.
    pub(crate) desired: watch::Receiver<Desired>,
    /// Which volumes there are; none: this agent has nothing to do with volumes.
    pub(crate) volumes: Option<watch::Receiver<Volumes>>,
    /// How often pods were refused.
    pub(crate) refusals: RefusalCounts,
    /// Where shares are declared, if that is a directory.
    pub(crate) shares_dir: Option<PathBuf>,
    /// Where sources are looked for.
    pub(crate) sources: Sources,
}

/// Starts the loop and the sinks that every agent has.
pub(crate) fn serve(place: Place, work: Work) -> Loop {
    let Place { runtime_dir, listener, _only_agent } = place;
    let Work { desired, volumes, refusals, shares_dir, sources } = work;
    let observer = Arc::new(Observer::new(runtime_dir.broker_socket()));
    let site = Site { runtime_dir: runtime_dir.clone(), manifests: shares_dir.clone(), sources };
    let turns = Reconciler { site, desired, volumes, observer: observer.clone() }.start();
    if let Some(listener) = listener {
        let serving = metrics::Serving { observer: observer.clone(), turns: turns.clone(), refusals };
        tokio::spawn(metrics::serve(listener, serving));
    }
    tokio::spawn(published::keep(turns.clone(), runtime_dir.published(), shares_dir));
    Loop { runtime_dir, turns, observer, _only_agent }
}

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
    let place = Place::take(&args.runtime_dir, args.metrics).await?;
    let manifests = manifests::follow(&shares_dir, &place.runtime_dir.broker_socket())?;
    let work = Work {
        desired: manifests.desired.clone(),
        volumes: None,
        refusals: RefusalCounts::default(),
        shares_dir: Some(shares_dir.clone()),
        sources: Sources::default(),
    };
    let Loop { runtime_dir, turns, _only_agent, .. } = serve(place, work);
    Ok(Serving { runtime_dir, shares_dir, manifests, turns, _only_agent })
}
