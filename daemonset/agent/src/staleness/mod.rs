//! What is done about staleness, share by share. Decided by the crate `virtiofs-remedy`; here it is fed with what
//! the broker says, kept, carried out and told.
//!
//! | file | |
//! |---|---|
//! | `observe.rs` | from the broker's status to an observation |
//! | `keep.rs` | histories lie with the broker, so that they outlive the agent |
//! | `act.rs` | trial engines are asked, engines are exchanged |
//! | `tell.rs` | log lines, notices, and what `status` shows |

mod act;
mod clock;
mod keep;
mod observe;
mod tell;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

pub(crate) use act::{Answer, carry_out};
use clock::Clock;
pub(crate) use keep::Keeper;
use tell::Told;
pub(crate) use tell::{LastRemedy, ShareStaleness};
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::Status;
use virtiofs_contract::preflight::Preflight;
use virtiofs_crds::Share;
use virtiofs_remedy::history::Stage;
use virtiofs_remedy::{Act, History, Rung, Standing, decide};

use crate::desired::Desired;
use crate::observed::Observed;
use crate::report::Report;

/// How often shares with VMs are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The same while a remedy is to come into force.
const LOOK_CLOSELY_EVERY: Duration = Duration::from_millis(250);

/// All shares.
pub(crate) struct Remedies {
    clock: Clock,
    cases: BTreeMap<String, Case>,
    /// The broker that keeps histories; none: those that an earlier agent may have left have not been read yet.
    keeper: Option<u32>,
    /// Shares that are gone, and the broker still keeps the history of.
    gone: Vec<String>,
}

/// One share.
#[derive(Debug, Default)]
struct Case {
    history: History,
    standings: Vec<Standing>,
    /// A trial engine is being asked.
    asking: bool,
    /// What the broker keeps is older.
    unsaved: bool,
}

/// Something to be done, outside the loop.
#[derive(Debug)]
pub(crate) enum Order {
    /// Have a trial engine say whether a remedy is possible.
    Ask {
        share: String,
        rung: Rung,
        source: PathBuf,
        engine: Box<EngineConfig>,
        /// What is found with the configuration in force.
        before: Box<Preflight>,
    },
    /// Give the sessions of these endpoints other engines.
    HandOver { endpoints: Vec<String> },
}

impl Remedies {
    /// Of an agent that has just started.
    pub(crate) fn new() -> Self {
        Remedies { clock: Clock::new(), cases: BTreeMap::new(), keeper: None, gone: Vec::new() }
    }

    /// Takes over what an earlier agent left with this broker; a broker that is new is told all anew. False: it is not
    /// known what engines are to run with, and nothing may be planned.
    pub(crate) async fn ready(&mut self, broker: u32, keeper: &Keeper) -> bool {
        match self.keeper {
            Some(known) if known == broker => {}
            Some(_) => self.cases.values_mut().for_each(|case| case.unsaved = true),
            None => {
                let Some(histories) = keeper.read().await else { return false };
                let case = |history| Case { history, ..Case::default() };
                self.cases = histories.into_iter().map(|(share, history)| (share, case(history))).collect();
            }
        }
        self.keeper = Some(broker);
        true
    }

    /// Decides for each share, and says what has changed.
    pub(crate) fn turn(&mut self, desired: &Desired, observed: &Observed, status: &Status) -> Vec<Order> {
        let now = self.clock.now();
        if !desired.partial {
            let gone = self.cases.extract_if(.., |share, _| !desired.shares.contains_key(share));
            self.gone.extend(gone.map(|(share, _)| share));
        }
        let mut orders = Vec::new();
        for (name, share) in &desired.shares {
            let Some(view) = observe::View::of(share, observed, status) else { continue };
            let case = self.cases.entry(name.clone()).or_default();
            let policy = observe::policy(&share.staleness);
            let decision = decide(&policy, &case.history, &view.observation(), now);
            case.unsaved |= !decision.changes.is_empty();
            (case.history, case.standings) = (decision.history, decision.standings);
            tell::log(name, &decision.changes, &case.told(share, observed));
            if let Some(Act::HandOver) = decision.act {
                orders.push(Order::HandOver { endpoints: view.endpoints() });
            }
            if let Some((rung, engine)) = case.history.question(&share.engine).filter(|_| !case.asking) {
                case.asking = true;
                let (source, before) = (view.source().to_path_buf(), Box::new(view.before().clone()));
                orders.push(Order::Ask { share: name.clone(), rung, source, engine: Box::new(engine), before });
            }
        }
        orders
    }

    /// A trial engine has answered.
    pub(crate) fn answered(&mut self, answer: Answer, desired: &Desired, observed: &Observed) {
        let Some(case) = self.cases.get_mut(&answer.share) else { return };
        case.asking = false;
        let Some(share) = desired.shares.get(&answer.share) else { return };
        let Some(found) = answer.found else { return };
        let (history, changes) = case.history.answer(answer.rung, found, &share.engine, self.clock.now());
        case.history = history;
        case.unsaved = true;
        tell::log(&answer.share, &changes, &case.told(share, observed));
    }

    /// Has the broker keep what has changed. It must know of a remedy before anything is done, or the next agent
    /// might do it once more.
    pub(crate) async fn save(&mut self, keeper: &Keeper) {
        let unsaved = |(share, case): (&String, &mut Case)| {
            std::mem::take(&mut case.unsaved).then(|| (share.clone(), Some(case.history.clone())))
        };
        let kept = self.cases.iter_mut().filter_map(unsaved);
        let changes: Vec<_> = kept.chain(self.gone.drain(..).map(|share| (share, None))).collect();
        if !changes.is_empty() {
            keeper.write(changes).await;
        }
    }

    /// What is to be served: as declared, with the remedies in it.
    pub(crate) fn amend(&self, desired: &Desired) -> Desired {
        let mut desired = desired.clone();
        for (name, share) in &mut desired.shares {
            if let Some(case) = self.cases.get(name) {
                share.engine = case.history.amended(&share.engine);
            }
        }
        desired
    }

    /// Adds what is to be said of staleness.
    pub(crate) fn tell(&self, desired: &Desired, observed: &Observed, report: &mut Report) {
        for share in &mut report.shares {
            let (Some(case), Some(declared)) = (self.cases.get(&share.name), desired.shares.get(&share.name)) else {
                continue;
            };
            let told = case.told(declared, observed);
            told.add_to(share);
            report.staleness.insert(share.name.clone(), tell::staleness(&self.clock, &told));
        }
    }

    /// How long nothing needs to be looked at.
    pub(crate) fn rest(&self) -> Duration {
        let pending = |case: &Case| {
            let stage = case.history.trial().map(|trial| &trial.stage);
            matches!(stage, Some(Stage::Asked | Stage::Ordered { .. }))
        };
        if self.cases.values().any(pending) { LOOK_CLOSELY_EVERY } else { LOOK_EVERY }
    }
}

/// What engines of a share run with instead of what is declared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Amended {
    /// What is declared.
    pub(crate) declared: EngineConfig,
    /// The same with remedies in it.
    pub(crate) engine: EngineConfig,
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

impl Case {
    fn told<'a>(&'a self, share: &'a Share, observed: &'a Observed) -> Told<'a> {
        let sessions = tell::sessions(observed, share.name.as_str());
        Told { share, sessions, history: &self.history, standings: &self.standings }
    }
}
