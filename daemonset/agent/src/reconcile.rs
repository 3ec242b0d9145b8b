//! The loop that keeps a host as declared: observe, plan, act, report. It decides nothing itself; see
//! [`crate::plan`]. Where the declarations come from, and who reads the reports, it does not know.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use virtiofs_contract::control::{Endpoint, EndpointStatus};

use crate::broker::client::{Applied, Client, ClientError};
use crate::broker::observer::Observer;
use crate::desired::Desired;
use crate::plan::{Action, Attempt, Look, Observed, Outcome, Progress, Site, plan};
use crate::report::{Report, report};
use crate::source::{Source, look};

/// What the loop works on.
pub(crate) struct Reconciler {
    /// What holds for all shares.
    pub(crate) site: Site,
    /// What is declared, now and later.
    pub(crate) desired: watch::Receiver<Desired>,
    /// Where reports go; the time is that of the last turn.
    pub(crate) reports: watch::Sender<Turn>,
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
}

/// An action that has ended.
enum Done {
    Looked { share: String, declared: PathBuf, found: Look },
    Tried(Box<Attempt>),
    Withdrawn { share: String, error: Option<ClientError> },
}

impl Reconciler {
    /// Turns until the declarations have no sender any more.
    pub(crate) async fn run(mut self) {
        let (ended, mut endings) = mpsc::unbounded_channel();
        let mut observed = Observed::default();
        loop {
            let desired = self.desired.borrow_and_update().clone();
            observed.endpoints = self.endpoints().await;
            let now = Instant::now();
            observed.silent_since = observed.endpoints.is_none().then(|| observed.silent_since.unwrap_or(now));
            remember(now, &desired, &mut observed);
            let plan = plan(now, &self.site, &desired, &observed);
            for action in plan.actions {
                begin(now, &action, &mut observed);
                self.perform(action, &desired, &observed, ended.clone());
            }
            let report = report(now, &self.site, &desired, &observed);
            self.reports.send_replace(Turn { at: Some(now), report });
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() { return },
                Some(done) = endings.recv() => {
                    finish(done, &mut observed);
                    while let Ok(done) = endings.try_recv() {
                        finish(done, &mut observed);
                    }
                }
                () = sleep(plan.rest) => {}
            }
        }
    }

    async fn endpoints(&self) -> Option<BTreeMap<String, EndpointStatus>> {
        match self.observer.observe().await.status {
            Ok(status) => Some(status.endpoints.into_iter().map(|it| (it.endpoint.name.clone(), it)).collect()),
            Err(error) => {
                tracing::debug!(%error, "no status");
                None
            }
        }
    }

    /// Starts an action on a blocking thread of its own, so that a source that hangs holds up nobody else.
    fn perform(&self, action: Action, desired: &Desired, observed: &Observed, ended: mpsc::UnboundedSender<Done>) {
        let socket = self.site.runtime_dir.broker_socket();
        let progress = observed.shares.get(action.share()).cloned().unwrap_or_default();
        let declared =
            desired.shares.get(action.share()).map(|it| it.source.as_path().to_path_buf()).unwrap_or_default();
        spawn_blocking(move || {
            let done = match action {
                Action::Look { share } => {
                    let found = look(&declared, progress.pinned.as_deref());
                    Done::Looked { share, declared, found: Look { at: Instant::now(), found } }
                }
                Action::Apply { endpoint, source } => {
                    Done::Tried(Box::new(attempt(&socket, *endpoint, source, progress.attempt)))
                }
                Action::Withdraw { share } => {
                    let error = Client::connect(&socket).and_then(|mut client| client.remove(&share)).err();
                    Done::Withdrawn { share, error }
                }
            };
            // Nobody is there to hear of it only when the loop has ended.
            let _ = ended.send(done);
        });
    }
}

fn attempt(socket: &Path, endpoint: Endpoint, source: Source, previous: Option<Attempt>) -> Attempt {
    let outcome = match Client::connect(socket).and_then(|mut client| client.apply(endpoint.clone())) {
        Ok(Applied::Yes(preflight)) => Outcome::Served(preflight),
        Ok(Applied::No(finding)) => Outcome::Refused(finding),
        Err(ClientError::Invalid(message)) => Outcome::Impossible(message),
        Err(error) => Outcome::Failed(error.to_string()),
    };
    let again = previous.filter(|it| it.endpoint == endpoint && it.source == source && !it.outcome.is_flawless());
    let repeated = again.map_or(0, |it| it.repeated.saturating_add(1));
    Attempt { at: Instant::now(), endpoint, source, repeated, outcome }
}

/// Keeps the memory in step with the declarations: what is gone is timed, what points elsewhere starts anew,
/// what is of no use any more is forgotten.
fn remember(now: Instant, desired: &Desired, observed: &mut Observed) {
    let Observed { endpoints, shares, .. } = observed;
    for name in endpoints.iter().flat_map(BTreeMap::keys).chain(desired.shares.keys()) {
        shares.entry(name.clone()).or_default();
    }
    for (name, progress) in shares.iter_mut() {
        match desired.shares.get(name) {
            Some(share) => declared_at(share.source.as_path(), progress),
            None => _ = progress.absent_since.get_or_insert(now),
        }
    }
    let served = |name: &String| endpoints.as_ref().is_none_or(|endpoints| endpoints.contains_key(name));
    shares.retain(|name, progress| desired.shares.contains_key(name) || progress.busy_since.is_some() || served(name));
}

fn declared_at(source: &Path, progress: &mut Progress) {
    progress.absent_since = None;
    if progress.declared.as_deref() == Some(source) {
        return;
    }
    *progress = Progress {
        declared: Some(source.to_path_buf()),
        busy_since: progress.busy_since,
        trying: progress.trying.take(),
        ..Progress::default()
    };
}

fn begin(now: Instant, action: &Action, observed: &mut Observed) {
    let progress = observed.shares.entry(action.share().to_owned()).or_default();
    progress.busy_since = Some(now);
    if let Action::Apply { source, .. } = action {
        progress.trying = Some(source.path.clone());
    }
}

fn finish(done: Done, observed: &mut Observed) {
    match done {
        Done::Looked { share, declared, found } => {
            let progress = observed.shares.entry(share).or_default();
            progress.busy_since = None;
            if progress.declared.as_ref() == Some(&declared) {
                if let (None, Ok(source)) = (&progress.pinned, &found.found) {
                    progress.pinned = Some(source.path.clone());
                }
                progress.look = Some(found);
            }
        }
        Done::Tried(attempt) => {
            let progress = observed.shares.entry(attempt.endpoint.name.clone()).or_default();
            (progress.busy_since, progress.trying) = (None, None);
            progress.attempt = Some(*attempt);
        }
        Done::Withdrawn { share, error } => {
            if let Some(error) = error {
                tracing::warn!(share, %error, "share is not withdrawn yet");
            }
            observed.shares.entry(share).or_default().busy_since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::desired::tests::{declared, desired};

    fn wanted(path: &str) -> Desired {
        desired([declared("a", path)])
    }

    fn found(at: Instant, path: &str) -> Look {
        Look { at, found: Ok(Source { path: path.into(), identity: (1, 1) }) }
    }

    #[test]
    fn another_source_starts_anew_and_a_late_look_at_the_old_one_is_ignored() {
        let now = Instant::now();
        let mut observed = Observed { endpoints: Some(BTreeMap::new()), ..Observed::default() };
        remember(now, &wanted("/old"), &mut observed);
        finish(Done::Looked { share: "a".into(), declared: "/old".into(), found: found(now, "/old") }, &mut observed);
        assert_eq!(observed.shares["a"].pinned, Some("/old".into()));

        remember(now, &wanted("/new"), &mut observed);
        assert_eq!((&observed.shares["a"].pinned, &observed.shares["a"].look), (&None, &None));
        finish(Done::Looked { share: "a".into(), declared: "/old".into(), found: found(now, "/old") }, &mut observed);
        assert_eq!(observed.shares["a"].look, None);
    }

    #[test]
    fn absence_is_timed_from_its_beginning_and_forgotten_with_the_endpoint() {
        let now = Instant::now();
        let mut observed = Observed::default();
        remember(now, &wanted("/a"), &mut observed);
        remember(now, &Desired::default(), &mut observed);
        remember(now + Duration::from_secs(1), &Desired::default(), &mut observed);
        assert_eq!(observed.shares["a"].absent_since, Some(now));
        observed.endpoints = Some(BTreeMap::new());
        remember(now, &Desired::default(), &mut observed);
        assert!(observed.shares.is_empty());
    }
}
