//! Announces changes once: as log lines with fields, and as lines for a person at a shell.

use std::collections::BTreeMap;

use tokio::sync::watch;
use virtiofs_client::notice::NoticeReason;
use virtiofs_client::report::{Report, ShareReport, ShareState};
use virtiofs_client::text::{escaped, print};

use crate::model::pass::Pass;

/// Where changes are announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// In the log.
    Log,
    /// In the log and, for a person at a shell, on standard output.
    Terminal,
}

/// Announces what each pass changed. Ends with the reconcile loop.
pub(crate) async fn follow(mut passes: watch::Receiver<Pass>, output: Output) {
    let mut known = Report::default();
    while passes.changed().await.is_ok() {
        let report = passes.borrow_and_update().report.clone();
        for change in changes(&known, &report) {
            change.log();
            if output == Output::Terminal {
                print_line(&change.text());
            }
        }
        known = report;
    }
}

/// Prints a line for a person at a shell. A failure to write it does not stop serving.
pub(crate) fn print_line(text: &str) {
    if let Err(error) = print(&format!("{text}\n")) {
        tracing::warn!(%error, "cannot write to standard output");
    }
}

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// A share has another state or other reasons.
    Share(ShareReport),
    /// A share was removed.
    Removed(String),
    /// A document that names no share was rejected.
    Problem(String),
    /// All documents are valid again.
    ProblemsSolved,
    /// The broker does not answer, or answers again.
    Broker { answers: bool },
}

/// What differs in `new`. A message with a number that grows, such as seconds waited, is no difference.
pub(crate) fn changes(old: &Report, new: &Report) -> Vec<Change> {
    let before: BTreeMap<_, _> = old.shares.iter().map(|share| (&share.name, essence(share))).collect();
    let mut changes = Vec::new();
    if old.silent != new.silent {
        changes.push(Change::Broker { answers: !new.silent });
    }
    for share in &new.shares {
        if share.state != ShareState::Pending && before.get(&share.name) != Some(&essence(share)) {
            changes.push(Change::Share(share.clone()));
        }
    }
    let removed = old.shares.iter().filter(|share| !new.shares.iter().any(|it| it.name == share.name));
    changes.extend(removed.map(|share| Change::Removed(share.name.clone())));
    let nameless = |report: &Report| -> Vec<String> {
        report.problems.iter().filter(|problem| problem.share.is_none()).map(ToString::to_string).collect()
    };
    let known = nameless(old);
    changes.extend(nameless(new).into_iter().filter(|problem| !known.contains(problem)).map(Change::Problem));
    if new.problems.is_empty() && !old.problems.is_empty() {
        changes.push(Change::ProblemsSolved);
    }
    changes
}

/// State and reasons; for documents the whole message, which names the field.
fn essence(share: &ShareReport) -> (ShareState, Vec<&str>) {
    let essence = share.notices.iter().map(|notice| match notice.reason {
        NoticeReason::ManifestInvalid => notice.message.as_str(),
        reason => reason.as_str(),
    });
    (share.state, essence.collect())
}

impl Change {
    /// Writes the log line.
    pub(crate) fn log(&self) {
        match self {
            Change::Share(share) => log_share(share),
            Change::Removed(name) => tracing::info!(share = name, "share removed"),
            Change::Problem(problem) => tracing::warn!(%problem, "document rejected"),
            Change::ProblemsSolved => tracing::info!("all documents are valid"),
            Change::Broker { answers: true } => tracing::info!("the broker answers"),
            Change::Broker { answers: false } => tracing::warn!("the broker does not answer; waiting for it"),
        }
    }

    /// The lines for a person.
    pub(crate) fn text(&self) -> String {
        match self {
            Change::Share(share) => share_text(share),
            Change::Removed(name) => format!("{name}: removed"),
            Change::Problem(problem) => format!("rejected: {}", escaped(problem)),
            Change::ProblemsSolved => "all documents are valid".to_owned(),
            Change::Broker { answers: true } => "the broker answers".to_owned(),
            Change::Broker { answers: false } => "the broker does not answer; waiting for it".to_owned(),
        }
    }
}

fn log_share(share: &ShareReport) {
    let (name, state) = (&share.name, share.state.as_str());
    match share.notices.first() {
        None => tracing::info!(share = name, state, socket = %share.socket.display(), "share"),
        Some(first) => {
            let reasons: Vec<_> = share.notices.iter().map(|notice| notice.reason.as_str()).collect();
            let reasons = reasons.join(",");
            tracing::warn!(share = name, state, reasons, finding = first.message, remedy = first.remedy, "share");
        }
    }
}

fn share_text(share: &ShareReport) -> String {
    let mut text = format!("{}: {}", share.name, share.state.as_str());
    if share.state.serves() {
        text.push_str(&format!(", {} at {}", share.source.display(), share.socket.display()));
    }
    for notice in &share.notices {
        let (message, remedy) = (escaped(&notice.message), escaped(&notice.remedy));
        text.push_str(&format!("\n    {}: {message}\n    -> {remedy}", notice.reason.as_str()));
    }
    text
}

#[cfg(test)]
mod tests {
    use virtiofs_client::notice::Notice;
    use virtiofs_contract::preflight::Reason;

    use super::*;

    fn share(state: ShareState, notices: Vec<Notice>) -> Report {
        let share = ShareReport {
            name: "images".into(),
            state,
            notices,
            source: "/srv/images".into(),
            socket: "/run/virtiofs/shares/images.sock".into(),
        };
        Report { broker: true, shares: vec![share], ..Report::default() }
    }

    #[test]
    fn a_share_is_announced_once() {
        let pending = share(ShareState::Pending, vec![]);
        let ready = share(ShareState::Ready, vec![]);
        assert_eq!(changes(&Report::default(), &pending), []);
        let [change] = &changes(&pending, &ready)[..] else { panic!("one change") };
        assert_eq!(change.text(), "images: Ready, /srv/images at /run/virtiofs/shares/images.sock");
        assert_eq!(changes(&ready, &ready), []);

        let missing = |seconds| {
            Notice::new(NoticeReason::Finding(Reason::SourceMissing), format!("for {seconds} s"), "create it")
        };
        let first = share(ShareState::NotReady, vec![missing(1)]);
        let [change] = &changes(&ready, &first)[..] else { panic!("one change") };
        assert!(change.text().contains("-> create it"), "{}", change.text());
        assert_eq!(changes(&first, &share(ShareState::NotReady, vec![missing(2)])), []);
    }

    #[test]
    fn a_removed_share_is_announced() {
        let removed = changes(&share(ShareState::Ready, vec![]), &Report::default());
        assert_eq!(removed, [Change::Removed("images".into())]);
    }
}
