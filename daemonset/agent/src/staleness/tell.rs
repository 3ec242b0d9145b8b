//! What is said of staleness: log lines, notices, and what `status` shows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::control::SessionStatus;
use virtiofs_contract::counters::OPERATION_NAMES;
use virtiofs_contract::staleness::{Cause, StaleEvent};
use virtiofs_crds::v1alpha1::Content;
use virtiofs_crds::{Interval, Share};
use virtiofs_remedy::advice::whose;
use virtiofs_remedy::history::{Amendment, Past};
use virtiofs_remedy::ladder::CURABLE;
use virtiofs_remedy::{Change, Course, History, Moment, Outcome, Rung, Standing};

use super::Clock;
use super::observe::{content, hangs};
use crate::notice::{Notice, REMEDY_FAILED, REMEDY_IN_FORCE};
use crate::observed::Observed;
use crate::offer::share_name;
use crate::output::word;
use crate::report::{ShareReport, ShareState};

/// How a share stands with staleness. Times are milliseconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ShareStaleness {
    /// What the share declares: `spec.content`, `spec.access`, and `spec.staleness.policy`.
    pub(crate) content: String,
    pub(crate) access: String,
    pub(crate) policy: String,
    /// `Stale` and `RemedyFailed`.
    pub(crate) conditions: Vec<Condition>,
    /// The last stale event of its sessions.
    pub(crate) last_stale: Option<StaleEvent>,
    /// Changes of the configuration that are in force as remedies.
    pub(crate) remedies_in_force: Vec<RemedyInForce>,
    /// The last remedy that was begun.
    pub(crate) last_remedy: Option<LastRemedy>,
    /// How often remedies ended how.
    pub(crate) outcomes: Vec<OutcomeCount>,
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Condition {
    /// `Stale` or `RemedyFailed`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// Does it hold?
    pub(crate) status: bool,
    /// The cause; `None` where it does not hold.
    pub(crate) reason: String,
    /// Since when it has held.
    pub(crate) since: Option<u64>,
    /// What was found, and what is done about it.
    pub(crate) message: String,
}

/// A change of the configuration that is in force as a remedy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RemedyInForce {
    pub(crate) cause: Cause,
    pub(crate) remedy: String,
    pub(crate) since: u64,
}

/// A remedy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LastRemedy {
    pub(crate) cause: Cause,
    pub(crate) remedy: String,
    pub(crate) begun: u64,
    /// When it came into force.
    pub(crate) in_force: Option<u64>,
    pub(crate) ended: Option<u64>,
    /// How it ended; none: it is on trial.
    pub(crate) outcome: Option<String>,
}

/// How often remedies for a cause ended so.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct OutcomeCount {
    pub(crate) cause: Cause,
    pub(crate) outcome: String,
    pub(crate) count: u64,
}

/// Draws it up.
pub(super) fn staleness(clock: &Clock, case: &Told<'_>) -> ShareStaleness {
    let wall = |moment: Moment| clock.on_the_wall(moment);
    let stale = case.standings.first().map(|standing| (standing, wall(standing.since), case.message(standing)));
    let failed = case.standings.iter().find_map(|standing| match &standing.course {
        Course::Failed(failure) => Some((standing, wall(failure.since), failure.message.clone())),
        _ => None,
    });
    ShareStaleness {
        content: case.share.content.as_str().to_owned(),
        access: word(&case.share.access),
        policy: word(&case.share.staleness.remedy),
        conditions: vec![condition("Stale", stale), condition(REMEDY_FAILED, failed)],
        last_stale: case.last_event(None).cloned(),
        remedies_in_force: case.history.amendments().iter().map(|it| in_force(it, &wall)).collect(),
        last_remedy: case.history.last().map(|last| last_remedy(last, &wall)),
        outcomes: outcomes(case.history),
    }
}

fn condition(kind: &str, holds: Option<(&Standing, u64, String)>) -> Condition {
    let (status, reason, since, message) = match holds {
        Some((standing, since, message)) => (true, standing.cause.name(), Some(since), message),
        None => (false, "None", None, String::new()),
    };
    Condition { kind: kind.to_owned(), status, reason: reason.to_owned(), since, message }
}

fn in_force(amendment: &Amendment, wall: &impl Fn(Moment) -> u64) -> RemedyInForce {
    let remedy = amendment.rung.as_str().to_owned();
    RemedyInForce { cause: amendment.cause, remedy, since: wall(amendment.since) }
}

fn last_remedy(last: &Past, wall: &impl Fn(Moment) -> u64) -> LastRemedy {
    LastRemedy {
        cause: last.cause,
        remedy: last.rung.as_str().to_owned(),
        begun: wall(last.begun),
        in_force: last.in_force.map(wall),
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

/// What is said of one share.
pub(super) struct Told<'a> {
    pub(super) share: &'a Share,
    pub(super) sessions: Vec<&'a SessionStatus>,
    pub(super) history: &'a History,
    pub(super) standings: &'a [Standing],
}

impl Told<'_> {
    /// Adds what is not as it should be to a share's notices.
    pub(super) fn add_to(&self, report: &mut ShareReport) {
        // Of a source that hangs the report speaks as soon as it does, and with every session's name.
        let spoken_of = self.standings.iter().filter(|standing| standing.cause != Cause::SourceHung);
        let mut notices: Vec<_> = spoken_of.flat_map(|standing| self.notices(standing)).collect();
        notices.extend(self.history.amendments().iter().map(amended));
        if report.state == ShareState::Ready && !notices.is_empty() {
            report.state = ShareState::Degraded;
        }
        report.notices.extend(notices);
    }

    fn notices(&self, standing: &Standing) -> Vec<Notice> {
        let stale = Notice::new(standing.cause.name(), self.message(standing), self.remedy(standing));
        let failed = match &standing.course {
            Course::Failed(failure) => Some(Notice::new(REMEDY_FAILED, &failure.message, &failure.remedy)),
            _ => None,
        };
        std::iter::once(stale).chain(failed).collect()
    }

    /// What was found, and what becomes of it.
    fn message(&self, standing: &Standing) -> String {
        let window = Interval::from_millis(self.share.staleness.window.as_millis() as u64);
        let events = match standing.events {
            0 => String::new(),
            events => format!(", {events} times within {window}"),
        };
        let last = match self.last_event(Some(standing.cause)).map(|event| event.path.as_str()) {
            Some(path) if !path.is_empty() => format!("; last path: {path}"),
            _ => String::new(),
        };
        let course = match &standing.course {
            Course::Reported => "; policy Report: nothing is done",
            Course::AwaitsSource => "; engines go on with what they have until a directory is there again",
            Course::OnTrial { in_force: false, .. } => "; a remedy is being tried",
            Course::OnTrial { in_force: true, .. } => "; a remedy is in force, and whether it helps is being seen",
            Course::OutOfReach | Course::Failed(_) | Course::Passing => "",
        };
        format!("{}{events}{last}{course}", self.what(standing.cause))
    }

    fn remedy(&self, standing: &Standing) -> String {
        match &standing.course {
            Course::Failed(failure) => failure.remedy.clone(),
            Course::OnTrial { rung, .. } => format!("wait: {}", rung.as_str()),
            Course::Passing => "none needed now".to_owned(),
            Course::Reported | Course::OutOfReach | Course::AwaitsSource => {
                whose(standing.cause, content(self.share.content)).to_owned()
            }
        }
    }

    fn what(&self, cause: Cause) -> String {
        let promised = match self.share.content {
            Content::Shared => String::new(),
            content => format!(", although content is {}", content.as_str()),
        };
        match cause {
            Cause::FdExhausted => "engines have run out of open files".to_owned(),
            Cause::SourceReplaced => format!("others have replaced what a guest holds{promised}"),
            Cause::SourceRemoved => format!("others have removed what a guest holds{promised}"),
            Cause::HandleStale => "what a guest holds does not open any more by its file handle".to_owned(),
            Cause::SourceGone => {
                let how = self.sessions.iter().find_map(|session| session.source_gone.clone());
                how.unwrap_or_else(|| "the source was unmounted, or another is in its place".to_owned())
            }
            Cause::SourceHung => self.hanging().unwrap_or_else(|| "a request hung in the source".to_owned()),
            Cause::Fenced => "guests use numbers of files that are not theirs".to_owned(),
        }
    }

    /// The request that has been hanging for longest.
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

fn amended(amendment: &Amendment) -> Notice {
    let (message, remedy) = match amendment.rung {
        Rung::FileHandles => (
            "inodes are held by file handle, unlike inodeFileHandles says".to_owned(),
            "to make that last, spec.engine.inodeFileHandles: Prefer",
        ),
        Rung::OpenFiles { to } => (
            format!(
                "engines may open {} files, unlike openFiles says",
                to.map_or_else(|| "as many as the hard limit allows".to_owned(), |to| to.to_string())
            ),
            "to make that last, change spec.engine.openFiles",
        ),
        Rung::LongerCaching | Rung::HandOver => (
            "guests cache for a day, unlike cache and the timeouts say".to_owned(),
            "to make that last, spec.engine.cache: Always without timeouts",
        ),
    };
    let message = format!("{message}: a remedy for {}", amendment.cause);
    Notice::new(REMEDY_IN_FORCE, message, format!("{remedy}; edit these fields and the remedy is taken back"))
}

/// One line for each change.
pub(super) fn log(share: &str, changes: &[Change], told: &Told<'_>) {
    for change in changes {
        let path = |cause| told.last_event(Some(cause)).map(|event| event.path.as_str()).unwrap_or_default();
        match change {
            Change::Ill { cause, events } => {
                tracing::warn!(share, %cause, events, path = path(*cause), found = told.what(*cause), "stale");
            }
            Change::Well { cause } => tracing::info!(share, %cause, "stale no longer"),
            Change::Begun { cause, rung } => {
                tracing::info!(share, %cause, remedy = rung.as_str(), "remedy is tried on the side");
            }
            Change::Ordered { cause, rung } => {
                tracing::info!(share, %cause, remedy = rung.as_str(), "remedy is ordered")
            }
            Change::InForce { cause, rung, took } => {
                tracing::info!(share, %cause, remedy = rung.as_str(), ?took, "remedy is in force");
            }
            Change::Ended { cause, rung, outcome: Outcome::Verified } => {
                tracing::info!(share, %cause, remedy = rung.as_str(), outcome = "Verified", "remedy has helped");
            }
            Change::Ended { cause, rung, outcome } => {
                tracing::warn!(share, %cause, remedy = rung.as_str(), outcome = outcome.as_str(), "remedy has not helped");
            }
            Change::Undone { cause, rung } => {
                tracing::info!(share, %cause, remedy = rung.as_str(), "remedy is taken back");
            }
            Change::Failed { cause, failure } => {
                let (found, remedy) = (&failure.message, &failure.remedy);
                tracing::error!(share, %cause, reason = REMEDY_FAILED, found, remedy, "no remedy is left");
            }
        }
    }
}

/// Sessions of a share, at whatever endpoint.
pub(super) fn sessions<'a>(observed: &'a Observed, share: &str) -> Vec<&'a SessionStatus> {
    let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
    endpoints.filter(|it| share_name(&it.endpoint.name) == share).flat_map(|it| &it.sessions).collect()
}
