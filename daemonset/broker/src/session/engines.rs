//! The engines of one session.
//!
//! ```text
//!              start ready                 promote
//! Next::None ------------> Next::Standby ------------> Current::Serving
//!     |  start   ^              |  hand over: stop the old engine, then promote
//!     +-------> Next::Starting  |
//!
//! Current::Vacant <--- reap --- Current::Terminating <--- kill --- Current::Serving
//!
//! Phase::Active --- release requested ---> Phase::Releasing --- engines ended ---> Phase::Released
//! ```
//!
//! First start, hand-over and recovery all promote a prepared engine. [`policy`](super::policy) decides which transition
//! comes next; the types in [`states`] allow only the possible ones.

mod active;
mod hand_over;
mod recovery;
pub(crate) mod release;
mod start;
mod states;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{LastReplacement, ReplacementOutcome};
use virtiofs_contract::counters::Replacements;
use virtiofs_contract::engine::Predecessor;
use virtiofs_contract::preflight::Finding;

use super::policy::EngineState;
use super::{Command, Service};
use crate::channel::Sender;
use crate::descriptor::Descriptor;
use crate::engine::attached::Attached;
use crate::engine::persistent::PersistentState;
use crate::engine::start::{Engine, Leftover};
use crate::record::SessionRecord;
use crate::record::journal::Journal;
use crate::record::store::{Progress, RingOwner, StoredRevision};
use active::{Active, Current};
use release::PendingRelease;
use states::{LossCause, Serving};

/// Interval at which a guest that must remount is checked for an unmount.
const UNMOUNT_POLL: Duration = Duration::from_secs(1);

/// The vhost-user state of the VMM, and where it is recorded.
pub(super) struct DeviceState<'a> {
    pub(super) record: &'a mut SessionRecord<Descriptor>,
    pub(super) journal: &'a mut Journal,
}

/// An event of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EngineEvent {
    pub(super) role: Role,
    pub(super) signal: Signal,
}

/// Which engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Serving,
    Standby,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// A message waits on the control channel.
    Message,
    /// The process, or one of its threads, has exited.
    Exited,
    /// Log lines wait.
    Log,
}

/// A configuration and its generation.
#[derive(Clone, Debug)]
struct Revision {
    config: EngineConfig,
    /// It increases with each requested change or hand-over.
    generation: u64,
}

impl From<&StoredRevision> for Revision {
    fn from(stored: &StoredRevision) -> Self {
        Revision { config: stored.config.clone(), generation: stored.generation }
    }
}

/// The desired configuration cannot become active before this.
#[derive(Clone, Copy, Debug)]
struct Deferral {
    until: Instant,
    /// End it earlier once the guest has unmounted more often than this.
    unmounts: Option<u64>,
}

/// The desired and the active configuration.
#[derive(Debug)]
struct Revisions {
    desired: Revision,
    /// That of the engine that serves or served last.
    active: Option<Revision>,
    deferral: Option<Deferral>,
}

impl Revisions {
    /// The configuration for new engines: the desired one, or while that is deferred the active one.
    fn target(&self) -> &Revision {
        self.active.as_ref().filter(|_| self.deferral.is_some()).unwrap_or(&self.desired)
    }

    /// True if the desired configuration is active, or none was ever active.
    fn converged(&self) -> bool {
        self.active.as_ref().is_none_or(|active| active.generation == self.desired.generation)
    }

    fn active_generation(&self) -> u64 {
        self.active.as_ref().map_or(0, |active| active.generation)
    }
}

/// Failures and deaths so far.
#[derive(Debug)]
struct History {
    /// Failed starts in a row.
    failures: u32,
    /// Deaths in a row.
    deaths: u32,
    /// Ring positions at the last death.
    positions: Vec<Option<u16>>,
    /// How the last engine ended.
    predecessor: Predecessor,
}

/// Counts for the status.
#[derive(Debug, Default)]
struct Statistics {
    started: u64,
    served: u64,
    replacements: Replacements,
    last_replacement: Option<LastReplacement>,
}

impl Statistics {
    fn replaced(&mut self, outcome: ReplacementOutcome, pause: Duration, finding: Option<Finding>) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let pause_ns = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        self.last_replacement = Some(LastReplacement { at, outcome, pause_ns, finding });
    }
}

/// What all phases have in common.
#[derive(Debug)]
struct Common {
    session: String,
    service: Service,
    persistent: Arc<PersistentState>,
    commands: Sender<Command>,
    revisions: Revisions,
    history: History,
    statistics: Statistics,
    /// Why the session is not served, or not with the desired configuration.
    finding: Option<Finding>,
}

/// Whether engines use the source.
#[derive(Debug)]
enum Phase {
    /// Engines use the source.
    Active(Active),
    /// A release was requested, but an engine still uses the source.
    Releasing(Active, PendingRelease),
    /// No engine exists and nothing of the source is open until then.
    Released { until: Instant },
}

/// What became of the engines of an earlier broker.
#[derive(Debug)]
pub(super) enum RestoredEngines {
    /// None had the rings.
    None,
    /// This one serves.
    Serving(Box<Attached>),
    /// The rings were lost. These engines may still have them.
    Lost(Vec<Leftover>),
}

/// The engines of one session.
#[derive(Debug)]
pub(super) struct Engines {
    common: Common,
    phase: Phase,
}

impl Engines {
    pub(super) fn new(
        session: String,
        service: Service,
        persistent: Arc<PersistentState>,
        commands: Sender<Command>,
    ) -> Self {
        let phase = match service.released_until {
            Some(until) => Phase::Released { until },
            None => Phase::Active(Active::default()),
        };
        let desired = Revision { config: service.config.clone(), generation: 0 };
        let common = Common {
            session,
            service,
            persistent,
            commands,
            revisions: Revisions { desired, active: None, deferral: None },
            history: History { failures: 0, deaths: 0, positions: Vec::new(), predecessor: Predecessor::Quiesced },
            statistics: Statistics::default(),
            finding: None,
        };
        Engines { common, phase }
    }

    /// The engines of a restored session. `leftovers`: engines that may have had the rings; `lost`: that one did.
    pub(super) fn restored(
        session: String,
        service: Service,
        persistent: Arc<PersistentState>,
        commands: Sender<Command>,
        progress: &Progress,
        engines: RestoredEngines,
    ) -> Self {
        let mut engines_of = Engines::new(session, service, persistent, commands);
        let common = &mut engines_of.common;
        common.revisions.desired = (&progress.desired).into();
        common.revisions.active = progress.active.as_ref().map(Revision::from);
        common.history.predecessor = progress.predecessor;
        common.statistics = Statistics {
            started: progress.engines_started,
            served: progress.engines_served,
            replacements: progress.replacements.clone(),
            last_replacement: progress.last_replacement.clone(),
        };
        let mut active = Active::default();
        match engines {
            RestoredEngines::Serving(mut engine) => {
                engine.engine.process.watch_threads();
                active.current = Current::Serving(Serving::new(engine));
            }
            RestoredEngines::Lost(leftovers) => active.end_leftovers(leftovers, common),
            RestoredEngines::None => {}
        }
        if !matches!((&engines_of.phase, &active.current), (Phase::Released { .. }, Current::Vacant { .. })) {
            engines_of.phase = Phase::Active(active);
        }
        engines_of
    }

    /// Who has the rings, for the next broker.
    pub(super) fn ring_owner(&self) -> RingOwner {
        match self.active().map(|active| &active.current) {
            Some(Current::Serving(serving)) => RingOwner::Engine(Box::new(serving.engine.stored())),
            Some(Current::Terminating { .. }) => RingOwner::Unknown,
            Some(Current::Vacant { .. }) | None => RingOwner::Nobody,
        }
    }

    /// What has changed with the engines, for the next broker.
    pub(super) fn progress(&self, begun: bool, has_served: bool) -> Progress {
        let Common { revisions, history, statistics, persistent, .. } = &self.common;
        let stored = |it: &Revision| StoredRevision { config: it.config.clone(), generation: it.generation };
        Progress {
            begun,
            has_served,
            desired: stored(&revisions.desired),
            active: revisions.active.as_ref().map(stored),
            predecessor: history.predecessor,
            engines_started: statistics.started,
            engines_served: statistics.served,
            replacements: statistics.replacements.clone(),
            last_replacement: statistics.last_replacement.clone(),
            mounted_at: persistent.mounted_at().map(|at| at.path().to_path_buf()),
            group: persistent.group().map(|group| group.path().to_path_buf()),
        }
    }

    fn active(&self) -> Option<&Active> {
        match &self.phase {
            Phase::Active(active) | Phase::Releasing(active, _) => Some(active),
            Phase::Released { .. } => None,
        }
    }

    /// The engines, if there may be any, and what they need.
    fn parts(&mut self) -> Option<(&mut Active, &mut Common)> {
        match &mut self.phase {
            Phase::Active(active) | Phase::Releasing(active, _) => Some((active, &mut self.common)),
            Phase::Released { .. } => None,
        }
    }

    // Status.

    /// Name of the session's endpoint.
    pub(super) fn endpoint(&self) -> &str {
        &self.common.service.endpoint
    }

    pub(super) fn serving(&self) -> Option<&Attached> {
        self.active()?.serving()
    }

    /// Why the session is not served, or not with the desired configuration.
    pub(super) fn finding(&self) -> Option<&Finding> {
        self.common.finding.as_ref()
    }

    /// Number of engines started, standby engines included.
    pub(super) fn started(&self) -> u64 {
        self.common.statistics.started
    }

    /// Number of engines that have served.
    pub(super) fn served(&self) -> u64 {
        self.common.statistics.served
    }

    pub(super) fn replacements(&self) -> &Replacements {
        &self.common.statistics.replacements
    }

    pub(super) fn last_replacement(&self) -> Option<&LastReplacement> {
        self.common.statistics.last_replacement.as_ref()
    }

    pub(super) fn desired_generation(&self) -> u64 {
        self.common.revisions.desired.generation
    }

    pub(super) fn active_generation(&self) -> u64 {
        self.common.revisions.active_generation()
    }

    pub(super) fn state(&self) -> EngineState {
        self.active().map_or(EngineState::Released, |active| active.state(&self.common))
    }

    /// True while an engine is being replaced and the VMM's messages should wait for it.
    pub(super) fn is_recovering(&self) -> bool {
        self.active().is_some_and(Active::is_recovering)
    }

    // Waiting.

    /// The events to wait for.
    pub(super) fn watched(&self) -> Vec<(EngineEvent, BorrowedFd<'_>)> {
        self.active().map_or_else(Vec::new, Active::watched)
    }

    /// The next time at which [`Engines::advance`] must be called. The end of a release counts even if it has passed,
    /// because it may pass while engines end.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        let deferral = self.common.revisions.deferral;
        let unmount = deferral.and_then(|deferral| deferral.unmounts).map(|_| now + UNMOUNT_POLL);
        let engines = self.active().map_or_else(Vec::new, |active| active.deadlines(now));
        let release = match &self.phase {
            Phase::Active(_) => None,
            Phase::Releasing(_, PendingRelease { until, .. }) | Phase::Released { until } => Some(*until),
        };
        let ahead = engines.into_iter().chain(deferral.map(|deferral| deferral.until)).chain(unmount);
        ahead.filter(|deadline| *deadline > now).chain(release).min()
    }

    // Events.

    /// Requests the path of a node from the serving engine.
    pub(super) fn request_path(&mut self, node: u64, device: &mut DeviceState<'_>) {
        if let Some((active, common)) = self.parts()
            && let Some(serving) = active.serving_mut()
            && let Err(error) = serving.request_path(node)
        {
            active.lose(LossCause::Error(error), common, device);
        }
    }

    /// Sets the desired configuration.
    pub(super) fn reconfigure(&mut self, config: EngineConfig, generation: u64) {
        if self.common.revisions.desired.config != config {
            self.common.revisions.desired.config = config;
            self.replace(generation);
        }
    }

    /// Requests a new engine, and a new standby. Generations increase.
    pub(super) fn replace(&mut self, generation: u64) {
        self.common.revisions.desired.generation = generation;
        self.common.revisions.deferral = None;
        self.common.finding = None;
        self.common.history.failures = 0;
        if let Some((active, _)) = self.parts() {
            active.retry_now();
        }
    }

    /// The session ends. A recovery that is in progress is abandoned.
    pub(super) fn end(&mut self) {
        if let Some(lost) = self.active().and_then(Active::lost) {
            self.common.statistics.replacements.abandoned += 1;
            tracing::warn!(session = self.common.session, pause = ?lost.elapsed(), "recovery abandoned: session ends");
        }
    }

    /// An engine is ready, or could not be started.
    pub(super) fn engine_started(&mut self, result: Result<Engine, Finding>, device: &mut DeviceState<'_>) {
        match &mut self.phase {
            Phase::Active(active) => active.engine_started(result, &mut self.common, device),
            Phase::Releasing(active, _) => active.discard_start(),
            Phase::Released { .. } => {}
        }
    }

    /// Handles events of the engines.
    pub(super) fn handle(&mut self, events: &[EngineEvent], device: &mut DeviceState<'_>) {
        if let Some((active, common)) = self.parts() {
            active.handle(events, common, device);
        }
    }

    /// Sends changes of the record to the engines.
    pub(super) fn sync(&mut self, device: &mut DeviceState<'_>) {
        if let Some((active, common)) = self.parts() {
            active.sync(common, device);
        }
    }

    /// Makes every transition that is possible now.
    pub(super) fn advance(&mut self, device: &mut DeviceState<'_>) {
        self.check_release_deadline();
        self.check_deferral();
        if let Some((active, common)) = self.parts() {
            active.check_timers(common);
        }
        match &mut self.phase {
            Phase::Active(active) => active.advance(&mut self.common, device),
            Phase::Releasing(..) => self.continue_release(device),
            Phase::Released { .. } => {}
        }
    }

    fn check_deferral(&mut self) {
        let unmounts = self.common.persistent.mounts().1;
        let holds = |deferral: &Deferral| {
            deferral.until > Instant::now() && deferral.unmounts.is_none_or(|before| before == unmounts)
        };
        self.common.revisions.deferral = self.common.revisions.deferral.filter(holds);
    }
}
