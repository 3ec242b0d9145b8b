//! The loop that keeps a host as declared: observe, plan, act, report. It decides nothing itself; see
//! [`crate::plan`]. Where the declarations come from, and who reads the reports, it does not know: a source is
//! whoever sends [`Desired`], a sink whoever waits for a [`Turn`].

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use virtiofs_contract::control::{Endpoint, Status};

use crate::broker::client::{Client, ClientError};
use crate::broker::observer::Observer;
use crate::desired::Desired;
use crate::observed::{Attempt, Done, Look, Observed, Outcome};
use crate::plan::{Action, Site, plan};
use crate::report::{Report, report};
use crate::source::{Source, Space, is_bare, look};
use crate::staleness::{Amended, Answer, Keeper, Order, Remedies, amended, carry_out};
use crate::volume::{self, Standing, Volumes};

/// What the loop works on.
pub(crate) struct Reconciler {
    /// What holds for all shares.
    pub(crate) site: Site,
    /// What is declared, now and later.
    pub(crate) desired: watch::Receiver<Desired>,
    /// Which volumes there are, now and later; none: this agent has nothing to do with volumes.
    pub(crate) volumes: Option<watch::Receiver<Volumes>>,
    /// Reads the broker's status, often enough that little is lost of what a broker that dies has counted.
    pub(crate) observer: Arc<Observer>,
}

/// What one turn of the loop found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Turn {
    /// When; none: there has been no turn yet.
    pub(crate) at: Option<Instant>,
    /// How the shares are doing.
    pub(crate) report: Report,
    /// Shares that engines serve otherwise than declared, by name: remedies have seen to that.
    pub(crate) amended: BTreeMap<String, Amended>,
    /// How endpoints of volumes are doing, by name.
    pub(crate) volumes: BTreeMap<String, Standing>,
    /// How much room there is where shares are, as far as it was found.
    pub(crate) spaces: BTreeMap<String, Space>,
}

/// A loop that has not turned for this long hangs.
const TURN_WITHIN: Duration = Duration::from_secs(60);

impl Turn {
    /// Is this recent enough for the loop to be alive, or has it not begun?
    pub(crate) fn is_fresh(&self, now: Instant) -> bool {
        self.at.is_none_or(|at| now.saturating_duration_since(at) <= TURN_WITHIN)
    }
}

impl Reconciler {
    /// Starts the loop, which turns until the declarations have no sender any more. Every sink has a receiver of
    /// its own.
    pub(crate) fn start(self) -> watch::Receiver<Turn> {
        let (sender, turns) = watch::channel(Turn::default());
        tokio::spawn(self.run(sender));
        turns
    }

    async fn run(mut self, turns: watch::Sender<Turn>) {
        let (ended, mut endings) = mpsc::unbounded_channel();
        let (answered, mut answers) = mpsc::unbounded_channel();
        let keeper = Keeper::new(self.site.runtime_dir.broker_socket());
        let mut observed = Observed::default();
        let mut remedies = Remedies::new();
        loop {
            let begun = Instant::now();
            let declared = self.desired.borrow_and_update().clone();
            observed.mount(self.volumes.as_mut().map(|volumes| volumes.borrow_and_update().clone()));
            // A broker of which it is not known what remedies are in force cannot be planned for.
            let status = match self.status().await {
                Some(status) if remedies.ready(status.pid, &keeper).await => Some(status),
                _ => None,
            };
            let now = Instant::now();
            observed.hear(now, status.as_ref());
            observed.remember(now, &declared);
            let orders = status.as_ref().map_or_else(Vec::new, |status| remedies.turn(&declared, &observed, status));
            remedies.save(&keeper).await;
            for order in orders {
                self.order(order, answered.clone());
            }
            let desired = remedies.amend(&declared);
            let plan = plan(now, &self.site, &desired, &observed);
            for action in plan.actions {
                observed.begin(now, &action);
                self.perform(action, &observed, ended.clone());
            }
            let mut report = report(now, &self.site, &desired, &observed);
            remedies.tell(&declared, &observed, &mut report);
            let amended = amended(&declared, &desired);
            let (volumes, spaces) = (volume::standings(&observed, &report), observed.spaces());
            turns.send_replace(Turn { at: Some(begun), report, amended, volumes, spaces });
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() { return },
                Ok(()) = changed(self.volumes.as_mut()) => {}
                Some(done) = endings.recv() => {
                    observed.finish(done);
                    while let Ok(done) = endings.try_recv() {
                        observed.finish(done);
                    }
                }
                Some(answer) = answers.recv() => {
                    remedies.answered(answer, &declared, &observed);
                    remedies.save(&keeper).await;
                }
                () = sleep(plan.rest.min(remedies.rest())) => {}
            }
        }
    }

    async fn status(&self) -> Option<Status> {
        match self.observer.observe().await.status {
            Ok(status) => Some(status),
            Err(error) => {
                tracing::debug!(%error, "no status");
                None
            }
        }
    }

    /// Starts an action on a blocking thread of its own, so that a source that hangs holds up nobody else.
    fn perform(&self, action: Action, observed: &Observed, ended: mpsc::UnboundedSender<Done>) {
        let socket = self.site.runtime_dir.broker_socket();
        let act: Box<dyn FnOnce() -> Done + Send> = match action {
            Action::Look { share } => {
                let place = observed.places.get(&share).cloned().unwrap_or_default();
                let sources = self.site.sources.clone();
                Box::new(move || {
                    let (found, space) = match look(&sources, &place.declared, place.pinned.as_deref()) {
                        Ok((source, space)) => (Ok(source), space),
                        Err(finding) => (Err(finding), None),
                    };
                    let bare = found.as_ref().is_ok_and(|source| is_bare(&sources.seen(&source.path)));
                    let look = Look { at: Instant::now(), found, bare, space };
                    Done::Looked { share, declared: place.declared, look }
                })
            }
            Action::Apply { endpoint, source } => {
                let previous = observed.efforts.get(&endpoint.name).and_then(|effort| effort.attempt.clone());
                Box::new(move || Done::Tried(Box::new(attempt(&socket, *endpoint, source, previous))))
            }
            Action::Withdraw { endpoint, force } => Box::new(move || {
                withdraw(&socket, &endpoint, force);
                Done::Withdrawn { endpoint }
            }),
        };
        // Nobody is there to hear of it only when the loop has ended.
        spawn_blocking(move || _ = ended.send(act()));
    }
}

impl Reconciler {
    /// The same for a remedy.
    fn order(&self, order: Order, answered: mpsc::UnboundedSender<Answer>) {
        let socket = self.site.runtime_dir.broker_socket();
        spawn_blocking(move || carry_out(&socket, order).map(|answer| answered.send(answer)));
    }
}

fn attempt(socket: &Path, endpoint: Endpoint, source: Source, previous: Option<Attempt>) -> Attempt {
    let applied = if volume::is_volume(&endpoint) {
        volume::apply(socket, &endpoint)
    } else {
        Client::connect(socket).and_then(|mut client| client.apply(endpoint.clone()))
    };
    let outcome = match applied {
        Ok(preflight) => Outcome::Served(Box::new(preflight)),
        Err(ClientError::Refused(finding)) => Outcome::Refused(finding),
        Err(ClientError::Invalid(message)) => Outcome::Impossible(message),
        Err(error) => Outcome::Failed(error.to_string()),
    };
    let again = previous.filter(|it| it.endpoint == endpoint && it.source == source && !it.outcome.is_flawless());
    let repeated = again.map_or(0, |it| it.repeated.saturating_add(1));
    Attempt { at: Instant::now(), endpoint, source, repeated, outcome }
}

/// Waits for the next change; where nothing can change, for ever.
async fn changed(volumes: Option<&mut watch::Receiver<Volumes>>) -> Result<(), watch::error::RecvError> {
    match volumes {
        Some(volumes) => volumes.changed().await,
        None => std::future::pending().await,
    }
}

fn withdraw(socket: &Path, endpoint: &str, force: bool) {
    if let Err(error) = Client::connect(socket).and_then(|mut client| client.remove(endpoint, force)) {
        tracing::warn!(endpoint, %error, "not withdrawn yet");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_that_does_not_turn_is_no_longer_alive() {
        let now = Instant::now();
        let turn = Turn { at: Some(now), ..Turn::default() };
        assert!(Turn::default().is_fresh(now) && turn.is_fresh(now) && turn.is_fresh(now + TURN_WITHIN));
        assert!(!turn.is_fresh(now + TURN_WITHIN + Duration::from_secs(1)));
    }
}
