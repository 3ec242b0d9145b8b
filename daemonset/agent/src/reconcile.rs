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
use crate::source::{Source, is_bare, look};
use crate::staleness::{Amended, Answer, Keeper, Order, Remedies, amended, carry_out};

/// What the loop works on.
pub(crate) struct Reconciler {
    /// What holds for all shares.
    pub(crate) site: Site,
    /// What is declared, now and later.
    pub(crate) desired: watch::Receiver<Desired>,
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
            let declared = self.desired.borrow_and_update().clone();
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
            turns.send_replace(Turn { at: Some(now), report, amended });
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() { return },
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
                Box::new(move || {
                    let found = look(&place.declared, place.pinned.as_deref());
                    let bare = found.as_ref().is_ok_and(|source| is_bare(&source.path));
                    Done::Looked { share, declared: place.declared, look: Look { at: Instant::now(), found, bare } }
                })
            }
            Action::Apply { endpoint, source } => {
                let previous = observed.efforts.get(&endpoint.name).and_then(|effort| effort.attempt.clone());
                Box::new(move || Done::Tried(Box::new(attempt(&socket, *endpoint, source, previous))))
            }
            Action::Withdraw { endpoint } => Box::new(move || {
                withdraw(&socket, &endpoint);
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
    let outcome = match Client::connect(socket).and_then(|mut client| client.apply(endpoint.clone())) {
        Ok(preflight) => Outcome::Served(Box::new(preflight)),
        Err(ClientError::Refused(finding)) => Outcome::Refused(finding),
        Err(ClientError::Invalid(message)) => Outcome::Impossible(message),
        Err(error) => Outcome::Failed(error.to_string()),
    };
    let again = previous.filter(|it| it.endpoint == endpoint && it.source == source && !it.outcome.is_flawless());
    let repeated = again.map_or(0, |it| it.repeated.saturating_add(1));
    Attempt { at: Instant::now(), endpoint, source, repeated, outcome }
}

fn withdraw(socket: &Path, endpoint: &str) {
    if let Err(error) = Client::connect(socket).and_then(|mut client| client.remove(endpoint)) {
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
