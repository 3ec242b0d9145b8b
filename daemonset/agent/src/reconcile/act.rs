//! Executes actions, each on a blocking thread of its own: a source that hangs does not delay others.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Instant;

use nix::libc;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_client::endpoint::{is_volume, share_of};
use virtiofs_client::observation::is_bare;
use virtiofs_contract::control::Endpoint;
use virtiofs_contract::preflight::{Finding, Preflight, Reason};

use super::Reconciler;
use crate::model::action::{Action, ActionResult, Attempt, Outcome};
use crate::model::observed::Observed;
use crate::model::source::{Probe, Source};
use crate::probe::probe;

/// Starts an action. Its result goes to `results`.
pub(super) fn perform(
    reconciler: &Reconciler,
    action: Action,
    observed: &Observed,
    results: mpsc::UnboundedSender<ActionResult>,
) {
    let socket = reconciler.site.runtime_dir.broker_socket();
    let act: Box<dyn FnOnce() -> ActionResult + Send> = match action {
        Action::Probe { share } => {
            let state = observed.sources.get(&share).cloned().unwrap_or_default();
            let sources = reconciler.sources.clone();
            Box::new(move || {
                let (found, space) = match probe(&sources, &state.declared, state.pinned.as_deref()) {
                    Ok((source, space)) => (Ok(source), space),
                    Err(finding) => (Err(finding), None),
                };
                let bare = found.as_ref().is_ok_and(|source| is_bare(&sources.local_path(&source.path)));
                let probe = Probe { at: Instant::now(), found, bare, space };
                ActionResult::Probed { share, declared: state.declared, probe }
            })
        }
        Action::Apply { endpoint, source } => {
            let previous = observed.progress.get(&endpoint.name).and_then(|progress| progress.attempt.clone());
            Box::new(move || ActionResult::Applied(Box::new(attempt(&socket, *endpoint, source, previous))))
        }
        Action::Withdraw { endpoint, force } => Box::new(move || {
            withdraw(&socket, &endpoint, force);
            ActionResult::Withdrawn { endpoint }
        }),
    };
    // The receiver is gone only when the loop has ended.
    spawn_blocking(move || _ = results.send(act()));
}

fn attempt(socket: &Path, endpoint: Endpoint, source: Source, previous: Option<Attempt>) -> Attempt {
    let applied = if is_volume(&endpoint.name) {
        apply_volume(socket, &endpoint)
    } else {
        Client::connect(socket).and_then(|mut client| client.apply(endpoint.clone()))
    };
    let outcome = match applied {
        Ok(preflight) => Outcome::Served(Box::new(preflight)),
        Err(ClientError::Rejected(finding)) => Outcome::Rejected(finding),
        Err(ClientError::Invalid(message)) => Outcome::Impossible(message),
        Err(error) => Outcome::Failed(error.to_string()),
    };
    let same = previous.filter(|it| it.endpoint == endpoint && it.source == source && !it.outcome.is_clean());
    let repeated = same.map_or(0, |it| it.repeated.saturating_add(1));
    Attempt { at: Instant::now(), endpoint, source, repeated, outcome }
}

/// Applies a volume's endpoint. The broker receives its directory as a descriptor and binds the socket there.
fn apply_volume(socket: &Path, endpoint: &Endpoint) -> Result<Preflight, ClientError> {
    let path = endpoint.socket.path.parent().unwrap_or(Path::new("/"));
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let directory = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|error| {
        ClientError::Rejected(Finding {
            reason: Reason::SocketUnavailable,
            message: format!("directory {} of the volume: {error}", path.display()),
            remedy: "none needed: the kubelet creates it when it publishes the volume again".to_owned(),
        })
    })?;
    // The trial of the whole share is valid for a volume of the whole share.
    let reuse_preflight_of = endpoint.sub_path.is_none().then(|| share_of(&endpoint.name).to_owned());
    Client::connect(socket)?.apply_in(endpoint.clone(), directory.as_fd(), reuse_preflight_of)
}

fn withdraw(socket: &Path, endpoint: &str, force: bool) {
    if let Err(error) = Client::connect(socket).and_then(|mut client| client.remove(endpoint, force)) {
        tracing::warn!(endpoint, %error, "endpoint not withdrawn; trying again");
    }
}
