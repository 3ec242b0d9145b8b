//! The reconcile loop: observe, plan, act, report. It decides nothing itself; see [`crate::decide`]. A source of desired
//! state is whoever sends [`Desired`], a sink whoever receives [`Pass`]: the loop knows neither.

mod act;
mod clock;
mod history_store;
mod remedies;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use virtiofs_contract::control::Status;

use self::act::perform;
use self::clock::Clock;
use self::history_store::HistoryStore;
use crate::broker::observer::{Observation, Observer};
use crate::decide::plan::plan;
use crate::decide::remedies::{CheckResult, Remedies, amended};
use crate::decide::report::report;
use crate::decide::volumes;
use crate::model::action::ActionResult;
use crate::model::desired::Desired;
use crate::model::observed::Observed;
use crate::model::pass::Pass;
use crate::model::site::Site;
use crate::model::volume::Volumes;
use crate::probe::Sources;

/// What the loop works on.
pub(crate) struct Reconciler {
    /// Paths of this host.
    pub(crate) site: Site,
    /// Where sources are probed.
    pub(crate) sources: Sources,
    /// The desired state.
    pub(crate) desired: watch::Receiver<Desired>,
    /// The volumes; `None` if this agent does not serve volumes.
    pub(crate) volumes: Option<watch::Receiver<Volumes>>,
    /// Reads the broker's status.
    pub(crate) observer: Arc<Observer>,
}

impl Reconciler {
    /// Starts the loop. It ends when the desired state has no sender any more. Every sink clones the receiver.
    pub(crate) fn start(self) -> watch::Receiver<Pass> {
        let (sender, passes) = watch::channel(Pass::default());
        tokio::spawn(Loop::new(self).run(sender));
        passes
    }
}

/// The loop with its state.
struct Loop {
    reconciler: Reconciler,
    histories: HistoryStore,
    clock: Clock,
    observed: Observed,
    remedies: Remedies,
}

impl Loop {
    fn new(reconciler: Reconciler) -> Self {
        let histories = HistoryStore::new(reconciler.site.runtime_dir.broker_socket());
        let (observed, remedies) = (Observed::default(), Remedies::default());
        Loop { reconciler, histories, clock: Clock::new(), observed, remedies }
    }

    async fn run(mut self, passes: watch::Sender<Pass>) {
        let (results_sender, mut results) = mpsc::unbounded_channel();
        let (checks_sender, mut checks) = mpsc::unbounded_channel();
        loop {
            let declared = self.reconciler.desired.borrow_and_update().clone();
            let (pass, idle) = self.pass(&declared, &results_sender, &checks_sender).await;
            passes.send_replace(pass);
            tokio::select! {
                changed = self.reconciler.desired.changed() => if changed.is_err() { return },
                Ok(()) = changed(self.reconciler.volumes.as_mut()) => {}
                Some(result) = results.recv() => {
                    self.observed.finish(result);
                    while let Ok(result) = results.try_recv() {
                        self.observed.finish(result);
                    }
                }
                Some(result) = checks.recv() => {
                    let now = self.clock.now();
                    let events = self.remedies.finish_check(now, result, &declared, &self.observed);
                    remedies::log(&events);
                    self.store_histories().await;
                }
                () = sleep(idle) => {}
            }
        }
    }

    /// One pass. Returns its result and how long nothing is due.
    async fn pass(
        &mut self,
        declared: &Desired,
        results: &mpsc::UnboundedSender<ActionResult>,
        checks: &mpsc::UnboundedSender<CheckResult>,
    ) -> (Pass, std::time::Duration) {
        let begun = Instant::now();
        self.observed.update_volumes(self.reconciler.volumes.as_mut().map(|it| it.borrow_and_update().clone()));
        let Observation { status, totals } = self.reconciler.observer.observe().await;
        let status = status.inspect_err(|error| tracing::debug!(%error, "no status of the broker")).ok();
        let status = self.with_histories(status).await;
        let now = Instant::now();
        let unix = self.clock.unix_millis(self.clock.now()) / 1000;
        self.observed.update_status(now, unix, status.as_ref());
        self.observed.update_desired(now, declared);
        self.apply_remedies(declared, status.as_ref(), checks).await;
        let desired = self.remedies.amend(declared);
        let plan = plan(now, &self.reconciler.site, &desired, &self.observed);
        for action in plan.actions {
            self.observed.begin(now, &action);
            perform(&self.reconciler, action, &self.observed, results.clone());
        }
        let mut report = report(now, &self.reconciler.site, &desired, &self.observed);
        let wall = |moment| self.clock.unix_millis(moment);
        self.remedies.report(&wall, declared, &self.observed, &mut report);
        let pass = Pass {
            at: Some(begun),
            amended: amended(declared, &desired),
            volumes: volumes::states(&self.observed, &report),
            losses: self.observed.losses.clone(),
            spaces: self.observed.spaces(),
            report,
            endpoints: status.map(|status| status.endpoints.into()),
            totals: Arc::new(totals),
        };
        (pass, plan.idle.min(self.remedies.idle()))
    }

    /// The status, unless the histories that its broker stores cannot be loaded: without them the configuration that engines
    /// should have is unknown.
    async fn with_histories(&mut self, status: Option<Status>) -> Option<Status> {
        let status = status?;
        if self.remedies.needs_load() {
            self.remedies.load(self.histories.read().await?);
        }
        self.remedies.attach(status.instance);
        Some(status)
    }

    async fn apply_remedies(
        &mut self,
        declared: &Desired,
        status: Option<&Status>,
        checks: &mpsc::UnboundedSender<CheckResult>,
    ) {
        let mut commands = Vec::new();
        if let Some(status) = status {
            let events;
            (commands, events) = self.remedies.decide(self.clock.now(), declared, &self.observed, status);
            remedies::log(&events);
        }
        self.store_histories().await;
        for command in commands {
            remedies::execute(self.reconciler.site.runtime_dir.broker_socket(), command, checks.clone());
        }
    }

    async fn store_histories(&mut self) {
        let unstored = self.remedies.take_unstored();
        if !unstored.is_empty() {
            self.histories.write(unstored).await;
        }
    }
}

/// Waits for the next change; for ever if there is no sender.
async fn changed(volumes: Option<&mut watch::Receiver<Volumes>>) -> Result<(), watch::error::RecvError> {
    match volumes {
        Some(volumes) => volumes.changed().await,
        None => std::future::pending().await,
    }
}
