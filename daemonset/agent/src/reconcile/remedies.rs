//! Executes the commands of remedies, and logs their transitions.

use std::path::{Path, PathBuf};

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_client::notice::NoticeReason;
use virtiofs_remedy::{Blocker, Outcome, Transition};

use crate::decide::remedies::{CheckResult, RemedyCommand, RemedyEvent};

/// Starts a command on a blocking thread. The result of a check goes to `checks`.
pub(super) fn execute(socket: PathBuf, command: RemedyCommand, checks: mpsc::UnboundedSender<CheckResult>) {
    spawn_blocking(move || run(&socket, command).map(|result| checks.send(result)));
}

fn run(socket: &Path, command: RemedyCommand) -> Option<CheckResult> {
    match command {
        RemedyCommand::HandOver { endpoints } => {
            for endpoint in endpoints {
                if let Err(error) = Client::connect(socket).and_then(|mut client| client.hand_over(&endpoint, None)) {
                    tracing::warn!(endpoint, %error, "engines not replaced");
                }
            }
            None
        }
        RemedyCommand::Check { share, remedy, source, engine, before } => {
            let found = match Client::connect(socket).and_then(|mut client| client.preflight(&source, *engine)) {
                Ok(found) => Some(remedy.check(&before, &found)),
                Err(ClientError::Rejected(finding)) => Some(Err(Blocker::Rejected(finding.to_string()))),
                Err(error) => {
                    tracing::debug!(share, %error, "remedy not checked");
                    None
                }
            };
            Some(CheckResult { share, remedy, found })
        }
    }
}

/// Logs one line for each transition.
pub(super) fn log(events: &[RemedyEvent]) {
    for RemedyEvent { share, transition, path, found } in events {
        match transition {
            Transition::Stale { cause, events } => tracing::warn!(share, %cause, events, path, found, "stale"),
            Transition::Recovered { cause } => tracing::info!(share, %cause, "recovered"),
            Transition::Started { cause, remedy } => {
                tracing::info!(share, %cause, remedy = remedy.as_str(), "remedy is checked by a trial engine");
            }
            Transition::Applying { cause, remedy } => {
                tracing::info!(share, %cause, remedy = remedy.as_str(), "remedy is being applied");
            }
            Transition::Applied { cause, remedy, took } => {
                tracing::info!(share, %cause, remedy = remedy.as_str(), ?took, "remedy is applied");
            }
            Transition::Ended { cause, remedy, outcome: Outcome::Verified } => {
                tracing::info!(share, %cause, remedy = remedy.as_str(), outcome = "Verified", "remedy was effective");
            }
            Transition::Ended { cause, remedy, outcome } => {
                let (remedy, outcome) = (remedy.as_str(), outcome.as_str());
                tracing::warn!(share, %cause, remedy, outcome, "remedy ended without effect");
            }
            Transition::Reverted { cause, remedy } => {
                tracing::info!(share, %cause, remedy = remedy.as_str(), "remedy is reverted");
            }
            Transition::Failed { cause, failure } => {
                let reason = NoticeReason::RemedyFailed.as_str();
                let (found, remedy) = (&failure.message, &failure.remedy);
                tracing::error!(share, %cause, reason, found, remedy, "no remedy is left");
            }
        }
    }
}
