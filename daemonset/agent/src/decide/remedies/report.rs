//! Notices and status of staleness.

use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::observation::hangs;
use virtiofs_client::report::{ShareReport, ShareState};
use virtiofs_client::staleness::{ActiveRemedy, Condition, LastRemedy, OutcomeCount, ShareStaleness};
use virtiofs_client::text::name;
use virtiofs_contract::control::SessionStatus;
use virtiofs_contract::counters::OPERATION_NAMES;
use virtiofs_contract::staleness::{Cause, StaleEvent};
use virtiofs_crds::v1alpha1::Content;
use virtiofs_crds::{Interval, Share};
use virtiofs_remedy::advice::advice_for;
use virtiofs_remedy::escalation::CURABLE;
use virtiofs_remedy::history::RemedyRecord;
use virtiofs_remedy::{Amendment, CauseStatus, Handling, History, Moment, Outcome, Remedy, Root, Transition};

use super::RemedyEvent;

/// One share, with its sessions and remedies.
pub(super) struct ShareView<'a> {
    pub(super) share: &'a Share,
    pub(super) sessions: Vec<&'a SessionStatus>,
    pub(super) history: &'a History,
    pub(super) statuses: &'a [CauseStatus],
}

impl ShareView<'_> {
    /// Its status. `wall` turns a moment into milliseconds since the Unix epoch.
    pub(super) fn staleness(&self, wall: &impl Fn(Moment) -> u64) -> ShareStaleness {
        let stale = self.statuses.first().map(|status| (status, wall(status.since), self.message(status)));
        let failed = self.statuses.iter().find_map(|status| match &status.handling {
            Handling::Failed(failure) => Some((status, wall(failure.since), failure.message.clone())),
            _ => None,
        });
        ShareStaleness {
            content: self.share.content.as_str().to_owned(),
            access: name(&self.share.access),
            policy: name(&self.share.staleness.remedy),
            conditions: vec![condition("Stale", stale), condition(NoticeReason::RemedyFailed.as_str(), failed)],
            last_stale: self.last_event(None).cloned(),
            active_remedies: self.history.amendments().iter().map(|it| active_remedy(it, wall)).collect(),
            last_remedy: self.history.last().map(|last| last_remedy(last, wall)),
            outcomes: outcomes(self.history),
        }
    }

    /// Transitions with what a log line says about them.
    pub(super) fn events(&self, transitions: Vec<Transition>) -> Vec<RemedyEvent> {
        let event = |transition: Transition| {
            let cause = transition.cause();
            let path = self.last_event(Some(cause)).map(|event| event.path.clone()).unwrap_or_default();
            RemedyEvent { share: self.share.name.to_string(), transition, path, found: self.found(cause) }
        };
        transitions.into_iter().map(event).collect()
    }

    /// Adds the notices of staleness to a share's report.
    pub(super) fn add_notices(&self, report: &mut ShareReport) {
        // A source that hangs is reported with each session's id already.
        let reported = self.statuses.iter().filter(|status| status.cause != Cause::SourceHung);
        let mut notices: Vec<_> = reported.flat_map(|status| self.notices(status)).collect();
        notices.extend(self.history.amendments().iter().map(active_remedy_notice));
        if report.state == ShareState::Ready && !notices.is_empty() {
            report.state = ShareState::Degraded;
        }
        report.notices.extend(notices);
    }

    fn notices(&self, status: &CauseStatus) -> Vec<Notice> {
        let stale = Notice::new(NoticeReason::Stale(status.cause), self.message(status), self.remedy(status));
        let failed = match &status.handling {
            Handling::Failed(failure) => {
                Some(Notice::new(NoticeReason::RemedyFailed, &failure.message, &failure.remedy))
            }
            _ => None,
        };
        std::iter::once(stale).chain(failed).collect()
    }

    /// What was found, and what is done about it.
    fn message(&self, status: &CauseStatus) -> String {
        let window = Interval::from_millis(self.share.staleness.window.as_millis() as u64);
        let events = match status.events {
            0 => String::new(),
            events => format!(", {events} times within {window}"),
        };
        let last = match self.last_event(Some(status.cause)).map(|event| event.path.as_str()) {
            Some(path) if !path.is_empty() => format!("; last path: {path}"),
            _ => String::new(),
        };
        let handling = match &status.handling {
            Handling::Reported => "; policy Report: no remedy is applied",
            Handling::AwaitsSource(Root::Bare) => {
                "; that directory is empty and no file system is mounted on it, so engines keep serving what they have"
            }
            Handling::AwaitsSource(_) => "; engines keep serving what they have until a directory is there again",
            Handling::Trying { applied: false, .. } => "; a remedy is being tried",
            Handling::Trying { applied: true, .. } => "; a remedy is applied, and its effect is observed",
            Handling::NoRemedy | Handling::Failed(_) | Handling::Subsiding => "",
        };
        format!("{}{events}{last}{handling}", self.found(status.cause))
    }

    fn remedy(&self, status: &CauseStatus) -> String {
        match &status.handling {
            Handling::Failed(failure) => failure.remedy.clone(),
            Handling::Trying { remedy, .. } => format!("wait: {}", remedy.as_str()),
            Handling::Subsiding => "none needed now".to_owned(),
            Handling::AwaitsSource(root) => awaited(*root).to_owned(),
            Handling::Reported | Handling::NoRemedy => advice_for(status.cause).to_owned(),
        }
    }

    fn found(&self, cause: Cause) -> String {
        let promised = match self.share.content {
            Content::Shared => String::new(),
            content => format!(", although content is {}", content.as_str()),
        };
        match cause {
            Cause::FdExhausted => "engines have no open files left".to_owned(),
            Cause::SourceReplaced => format!("files that a guest holds were replaced on the host{promised}"),
            Cause::SourceRemoved => format!("files that a guest holds were removed on the host{promised}"),
            Cause::HandleStale => "files that a guest holds cannot be opened by their file handles any more".to_owned(),
            Cause::SourceGone => {
                let how = self.sessions.iter().find_map(|session| session.source_gone.clone());
                how.unwrap_or_else(|| "the source was unmounted or replaced".to_owned())
            }
            Cause::SourceHung => self.hanging().unwrap_or_else(|| "a request hung in the source".to_owned()),
            Cause::Fenced => "guests use node ids that their session never returned".to_owned(),
        }
    }

    /// The request that has been hanging for the longest time.
    fn hanging(&self) -> Option<String> {
        let hanging = self.sessions.iter().filter(|session| hangs(session));
        let oldest = hanging.filter_map(|session| session.oldest_request.as_ref()).max_by_key(|it| it.age_ms)?;
        let operation = OPERATION_NAMES.get(oldest.opcode as usize).copied().unwrap_or("request");
        let path = oldest.path.as_ref().map_or_else(String::new, |path| format!(" of {}", path.escape_debug()));
        Some(format!("a request has been hanging in the source for {} s: {operation}{path}", oldest.age_ms / 1000))
    }

    /// The last stale event, of this cause or of any.
    fn last_event(&self, cause: Option<Cause>) -> Option<&StaleEvent> {
        let events = self.sessions.iter().flat_map(|session| &session.stale_events);
        events.filter(|event| cause.is_none_or(|cause| event.cause == cause)).max_by_key(|event| event.at_ms)
    }
}

/// What a person can do while no directory can be served instead of the source.
fn awaited(root: Root) -> &'static str {
    match root {
        Root::Bare => {
            "mount the file system again; if the empty directory is the new source, put a file into it, or replace the \
             engines with virtiofsctl handover"
        }
        Root::Missing | Root::Present => "make the directory again, or mount its file system",
    }
}

fn condition(kind: &str, holds: Option<(&CauseStatus, u64, String)>) -> Condition {
    let (status, reason, since, message) = match holds {
        Some((status, since, message)) => (true, status.cause.name(), Some(since), message),
        None => (false, "None", None, String::new()),
    };
    Condition { kind: kind.to_owned(), status, reason: reason.to_owned(), since, message }
}

fn active_remedy(amendment: &Amendment, wall: &impl Fn(Moment) -> u64) -> ActiveRemedy {
    let remedy = amendment.remedy.as_str().to_owned();
    ActiveRemedy { cause: amendment.cause, remedy, since: wall(amendment.since) }
}

fn last_remedy(last: &RemedyRecord, wall: &impl Fn(Moment) -> u64) -> LastRemedy {
    LastRemedy {
        cause: last.cause,
        remedy: last.remedy.as_str().to_owned(),
        started: wall(last.started),
        applied: last.applied.map(wall),
        ended: last.ended.map(|(at, _)| wall(at)),
        outcome: last.ended.map(|(_, outcome)| outcome.as_str().to_owned()),
    }
}

fn outcomes(history: &History) -> Vec<OutcomeCount> {
    let all = CURABLE.into_iter().flat_map(|cause| Outcome::ALL.map(|outcome| (cause, outcome)));
    let count = |(cause, outcome): (Cause, Outcome)| {
        let (count, outcome) = (history.outcomes(cause, outcome), outcome.as_str().to_owned());
        OutcomeCount { cause, outcome, count }
    };
    all.map(count).collect()
}

fn active_remedy_notice(amendment: &Amendment) -> Notice {
    let (message, remedy) = match amendment.remedy {
        Remedy::FileHandles => (
            "inodes are held by file handle, other than inodeFileHandles declares".to_owned(),
            "to keep that, set spec.engine.inodeFileHandles: Prefer",
        ),
        Remedy::OpenFiles { to } => (
            format!(
                "engines may open {} files, other than openFiles declares",
                to.map_or_else(|| "as many as the hard limit allows".to_owned(), |to| to.to_string())
            ),
            "to keep that, change spec.engine.openFiles",
        ),
        Remedy::LongerCaching | Remedy::HandOver => (
            "guests cache for a day, other than cache and the timeouts declare".to_owned(),
            "to keep that, set spec.engine.cache: Always without timeouts",
        ),
    };
    let message = format!("{message}: a remedy for {}", amendment.cause);
    Notice::new(NoticeReason::RemedyActive, message, format!("{remedy}; to revert the remedy, edit these fields"))
}
