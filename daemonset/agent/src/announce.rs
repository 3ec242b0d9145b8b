//! Says what has changed, once: as log lines with fields, and as lines for a person at a shell.

use std::collections::BTreeMap;

use tokio::sync::watch;

use crate::output::{clean, tell};
use crate::reconcile::Turn;
use crate::report::{Report, ShareReport, ShareState};

/// Who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Whoever reads the log.
    Log,
    /// A person at a shell as well, on standard output.
    Person,
}

/// Tells what each turn has changed. Ends with the loop that turns.
pub(crate) async fn follow(mut turns: watch::Receiver<Turn>, audience: Audience) {
    let mut known = Report::default();
    while turns.changed().await.is_ok() {
        let report = turns.borrow_and_update().report.clone();
        for change in changes(&known, &report) {
            change.log();
            if audience == Audience::Person {
                tell(&format!("{}\n", change.text()));
            }
        }
        known = report;
    }
}

/// One change that is worth a line.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// A share is in another state, or for another reason.
    Share(ShareReport),
    /// A share is gone for good.
    Gone(String),
    /// A document that names no share was not accepted.
    Problem(String),
    /// All documents are accepted again.
    ProblemsSolved,
    /// The broker has been silent for a while, or answers again.
    Broker { answers: bool },
}

/// What is different in `new`. Messages that merely count on (seconds waited, say) are no difference.
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
    let gone = old.shares.iter().filter(|share| !new.shares.iter().any(|it| it.name == share.name));
    changes.extend(gone.map(|share| Change::Gone(share.name.clone())));
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

/// State and reasons; for documents the whole message, which says the field.
fn essence(share: &ShareReport) -> (ShareState, Vec<&str>) {
    let word = |notice: &'_ crate::notice::Notice| notice.reason == crate::notice::MANIFEST_INVALID;
    let words = share.notices.iter().map(|it| if word(it) { it.message.as_str() } else { it.reason.as_str() });
    (share.state, words.collect())
}

impl Change {
    /// One line of the log.
    pub(crate) fn log(&self) {
        match self {
            Change::Share(share) => log_share(share),
            Change::Gone(name) => tracing::info!(share = name, "share is gone"),
            Change::Problem(problem) => tracing::warn!(%problem, "document not accepted"),
            Change::ProblemsSolved => tracing::info!("all documents are accepted"),
            Change::Broker { answers: true } => tracing::info!("the broker answers"),
            Change::Broker { answers: false } => tracing::warn!("the broker does not answer; it is waited for"),
        }
    }

    /// Lines for a person.
    pub(crate) fn text(&self) -> String {
        match self {
            Change::Share(share) => share_text(share),
            Change::Gone(name) => format!("{name}: gone"),
            Change::Problem(problem) => format!("not accepted: {}", clean(problem)),
            Change::ProblemsSolved => "all documents are accepted".to_owned(),
            Change::Broker { answers: true } => "the broker answers".to_owned(),
            Change::Broker { answers: false } => "the broker does not answer; it is waited for".to_owned(),
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
        let (message, remedy) = (clean(&notice.message), clean(&notice.remedy));
        text.push_str(&format!("\n    {}: {message}\n    -> {remedy}", notice.reason));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice::Notice;

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
    fn a_share_is_announced_once_with_the_place_or_the_remedy() {
        let pending = share(ShareState::Pending, vec![]);
        let ready = share(ShareState::Ready, vec![]);
        assert_eq!(changes(&Report::default(), &pending), []);
        let [change] = &changes(&pending, &ready)[..] else { panic!("one change") };
        assert_eq!(change.text(), "images: Ready, /srv/images at /run/virtiofs/shares/images.sock");
        assert_eq!(changes(&ready, &ready), []);

        let missing = |seconds| Notice::new("SourceMissing", format!("for {seconds} s"), "create it");
        let first = share(ShareState::NotReady, vec![missing(1)]);
        let [change] = &changes(&ready, &first)[..] else { panic!("one change") };
        assert!(change.text().contains("-> create it"), "{}", change.text());
        assert_eq!(changes(&first, &share(ShareState::NotReady, vec![missing(2)])), []);
    }

    #[test]
    fn a_share_that_leaves_is_announced() {
        let gone = changes(&share(ShareState::Ready, vec![]), &Report::default());
        assert_eq!(gone, [Change::Gone("images".into())]);
    }
}
