//! What to do about staleness, share by share. The crate `virtiofs-remedy` decides; this prepares its observations from the
//! broker's status, holds its histories, and turns its decisions into commands, amended configurations and reports.

mod observation;
mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use virtiofs_client::report::Report;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::Status;
use virtiofs_contract::preflight::Preflight;
use virtiofs_crds::Share;
use virtiofs_remedy::history::Stage;
use virtiofs_remedy::{Blocker, CauseStatus, Command, History, Moment, Remedy, Transition, decide};

use self::report::ShareView;
use crate::model::desired::Desired;
use crate::model::observed::Observed;
use crate::model::pass::Amended;

/// Time between two decisions for shares with VMs.
const DECIDE_EVERY: Duration = Duration::from_secs(2);

/// The same while a remedy is being checked or applied.
const DECIDE_OFTEN: Duration = Duration::from_millis(250);

/// The remedies of all shares.
#[derive(Debug, Default)]
pub(crate) struct Remedies {
    cases: BTreeMap<String, Case>,
    /// Process id of the broker that stores the histories; `None` until those of an earlier agent have been loaded.
    stored_by: Option<u64>,
    /// Removed shares whose history the broker still stores.
    removed: Vec<String>,
}

/// One share.
#[derive(Debug, Default)]
struct Case {
    history: History,
    statuses: Vec<CauseStatus>,
    /// True while a trial engine checks a remedy.
    checking: bool,
    /// True if the stored history is older.
    unstored: bool,
}

/// A command to execute outside of the decision.
#[derive(Debug)]
pub(crate) enum RemedyCommand {
    /// Check with a trial engine whether a remedy is possible.
    Check {
        share: String,
        remedy: Remedy,
        source: PathBuf,
        engine: Box<EngineConfig>,
        /// What was found with the active configuration.
        before: Box<Preflight>,
    },
    /// Replace the engines of the sessions of these endpoints.
    HandOver { endpoints: Vec<String> },
}

/// The result of a check.
#[derive(Debug)]
pub(crate) struct CheckResult {
    /// The share.
    pub(crate) share: String,
    /// The remedy.
    pub(crate) remedy: Remedy,
    /// Whether it is possible; `None` if the broker could not be reached.
    pub(crate) found: Option<Result<(), Blocker>>,
}

/// A transition of one share, with what a log line says about it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RemedyEvent {
    /// The share.
    pub(crate) share: String,
    /// What changed.
    pub(crate) transition: Transition,
    /// Path of the last stale event of that cause; empty if unknown.
    pub(crate) path: String,
    /// What was found, in words.
    pub(crate) found: String,
}

impl Remedies {
    /// True if histories of an earlier agent have not been loaded yet. Nothing may be planned then: the configuration that
    /// engines should have is unknown.
    pub(crate) fn needs_load(&self) -> bool {
        self.stored_by.is_none()
    }

    /// Takes over the histories that an earlier agent stored.
    pub(crate) fn load(&mut self, histories: BTreeMap<String, History>) {
        let case = |history| Case { history, ..Case::default() };
        self.cases = histories.into_iter().map(|(share, history)| (share, case(history))).collect();
    }

    /// Notes the broker that stores histories. A new broker must store all of them again.
    pub(crate) fn attach(&mut self, broker: u64) {
        if self.stored_by.is_some_and(|known| known != broker) {
            self.cases.values_mut().for_each(|case| case.unstored = true);
        }
        self.stored_by = Some(broker);
    }

    /// Decides for each share.
    pub(crate) fn decide(
        &mut self,
        now: Moment,
        desired: &Desired,
        observed: &Observed,
        status: &Status,
    ) -> (Vec<RemedyCommand>, Vec<RemedyEvent>) {
        if !desired.partial {
            let removed = self.cases.extract_if(.., |share, _| !desired.shares.contains_key(share));
            self.removed.extend(removed.map(|(share, _)| share));
        }
        let (mut commands, mut events) = (Vec::new(), Vec::new());
        for (name, share) in &desired.shares {
            let Some(seen) = observation::ShareStatus::of(share, observed, status) else { continue };
            let case = self.cases.entry(name.clone()).or_default();
            let policy = observation::policy(&share.staleness);
            let decision = decide(&policy, &case.history, &seen.observation(), now);
            case.unstored |= !decision.transitions.is_empty();
            (case.history, case.statuses) = (decision.history, decision.statuses);
            events.extend(case.view(share, observed).events(decision.transitions));
            if let Some(Command::HandOver) = decision.command {
                commands.push(RemedyCommand::HandOver { endpoints: seen.endpoints() });
            }
            if let Some((remedy, engine)) = case.history.pending_check(&share.engine).filter(|_| !case.checking) {
                case.checking = true;
                let (source, before) = (seen.source().to_path_buf(), Box::new(seen.preflight().clone()));
                let engine = Box::new(engine);
                commands.push(RemedyCommand::Check { share: name.clone(), remedy, source, engine, before });
            }
        }
        (commands, events)
    }

    /// Takes in the result of a check.
    pub(crate) fn finish_check(
        &mut self,
        now: Moment,
        result: CheckResult,
        desired: &Desired,
        observed: &Observed,
    ) -> Vec<RemedyEvent> {
        let Some(case) = self.cases.get_mut(&result.share) else { return Vec::new() };
        case.checking = false;
        let (Some(share), Some(found)) = (desired.shares.get(&result.share), result.found) else { return Vec::new() };
        let (history, transitions) = case.history.finish_check(result.remedy, found, &share.engine, now);
        case.history = history;
        case.unstored = true;
        case.view(share, observed).events(transitions)
    }

    /// Histories to store, or to remove, before any command is executed: the next agent might repeat it otherwise.
    pub(crate) fn take_unstored(&mut self) -> Vec<(String, Option<History>)> {
        let unstored = |(share, case): (&String, &mut Case)| {
            std::mem::take(&mut case.unstored).then(|| (share.clone(), Some(case.history.clone())))
        };
        let changed = self.cases.iter_mut().filter_map(unstored);
        changed.chain(self.removed.drain(..).map(|share| (share, None))).collect()
    }

    /// The desired state with the remedies.
    pub(crate) fn amend(&self, desired: &Desired) -> Desired {
        let mut desired = desired.clone();
        for (name, share) in &mut desired.shares {
            if let Some(case) = self.cases.get(name) {
                share.engine = case.history.amended(&share.engine);
            }
        }
        desired
    }

    /// Adds staleness to the report. `wall` turns a moment into milliseconds since the Unix epoch.
    pub(crate) fn report(
        &self,
        wall: &impl Fn(Moment) -> u64,
        desired: &Desired,
        observed: &Observed,
        report: &mut Report,
    ) {
        for share in &mut report.shares {
            let (Some(case), Some(declared)) = (self.cases.get(&share.name), desired.shares.get(&share.name)) else {
                continue;
            };
            let view = case.view(declared, observed);
            view.add_notices(share);
            report.staleness.insert(share.name.clone(), view.staleness(wall));
        }
    }

    /// How long no decision is due.
    pub(crate) fn idle(&self) -> Duration {
        let pending = |case: &Case| {
            let stage = case.history.attempt().map(|attempt| &attempt.stage);
            matches!(stage, Some(Stage::Checking | Stage::Applying { .. }))
        };
        if self.cases.values().any(pending) { DECIDE_OFTEN } else { DECIDE_EVERY }
    }
}

impl Case {
    fn view<'a>(&'a self, share: &'a Share, observed: &'a Observed) -> ShareView<'a> {
        let sessions = observed.sessions_of(share.name.as_str()).collect();
        ShareView { share, sessions, history: &self.history, statuses: &self.statuses }
    }
}

/// Shares in which `desired` differs from `declared`.
pub(crate) fn amended(declared: &Desired, desired: &Desired) -> BTreeMap<String, Amended> {
    let pairs = declared.shares.iter().filter_map(|(name, share)| Some((name, share, desired.shares.get(name)?)));
    let differing = pairs.filter(|(_, declared, desired)| declared.engine != desired.engine);
    differing
        .map(|(name, declared, desired)| {
            (name.clone(), Amended { declared: declared.engine.clone(), engine: desired.engine.clone() })
        })
        .collect()
}
