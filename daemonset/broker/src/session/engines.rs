//! The engines of one session: the one that serves, the spare behind it, and the one that is being started.
//!
//! Start, hand-over and recovery are the same movement: an engine that has been prepared is told of the rings.
//! They differ in what comes before. What to do next is decided by [`policy`]; here it is done.

pub(crate) mod release;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use virtiofs_config::EngineConfig;
use virtiofs_contract::control::{LastReplacement, ReplacementOutcome};
use virtiofs_contract::counters::Replacements;
use virtiofs_contract::engine::Predecessor;
use virtiofs_contract::preflight::{Finding, Reason};

use super::estate::Estate;
use super::journal::Journal;
use release::Hold;

use super::policy::{Act, Age, STUCK_PAUSE, Situation, Spare, decide, pause_after_death, pause_after_failure};
use super::{Command, Service};
use crate::descriptor::{Descriptor, ring_bell};
use crate::engine::attached::{AttachError, Attached};
use crate::engine::finding;
use crate::engine::start::{Engine, Job, START_DEADLINE, hung};
use crate::guest_memory::{has_requests, used_index};
use crate::mailbox::Post;
use crate::record::SessionRecord;

/// How long rings may take to come to rest for a successor. Requests that go on longer keep their engine.
const REST_DEADLINE: Duration = Duration::from_secs(2);

/// How long a killed engine may take until none of its threads can touch a ring.
const KILL_DEADLINE: Duration = Duration::from_secs(2);

/// How often an engine that does not die is looked at.
const DYING_LOOK: Duration = Duration::from_millis(100);

/// How often a guest that has to mount anew is looked at: has it unmounted?
const UNMOUNT_LOOK: Duration = Duration::from_secs(1);

/// How long to wait with another engine when the guest mounted while one was prepared: a guest that mounts without
/// end must not have engines started without end.
const MOUNTING_PAUSE: Duration = Duration::from_millis(100);

/// How long after the start of an engine its spare is started: not while the VM boots on it.
const SPARE_AFTER: Duration = Duration::from_millis(200);

/// How long a VMM's messages are left in its socket while an engine is replaced; after that they are answered
/// from the record.
const RECOVERY_PATIENCE: Duration = Duration::from_secs(3);

/// What a session's thread and its engines have in common.
pub(super) struct Deeds<'a> {
    pub(super) record: &'a mut SessionRecord<Descriptor>,
    pub(super) journal: &'a mut Journal,
}

/// An engine that has been ordered.
#[derive(Debug)]
struct Order {
    until: Instant,
    overdue: bool,
    /// The guest's mounts and unmounts before.
    mounts: (u64, u64),
    /// What it has been told of its predecessor is not true any more.
    misinformed: bool,
}

/// What is known about deaths so far.
#[derive(Debug, Default)]
struct History {
    failures: u32,
    deaths: u32,
    /// Positions of the rings at the last death: if they have moved since, requests were answered.
    positions: Vec<Option<u16>>,
}

/// What an engine is to be like.
#[derive(Clone, Debug)]
struct Wish {
    config: EngineConfig,
    /// Raised with every wish, also one for the same once more.
    epoch: u64,
}

/// The engines of one session.
#[derive(Debug)]
pub(super) struct Engines {
    session: String,
    service: Service,
    estate: Arc<Estate>,
    post: Post<Command>,
    serving: Option<Attached>,
    spare: Option<Attached>,
    /// The guest's mounts and unmounts when the spare was ordered, or the engine that did not become one.
    spare_mounts: (u64, u64),
    /// Killed, but a thread of it is still in a system call.
    dying: Option<Attached>,
    order: Option<Order>,
    wish: Wish,
    /// What the engine is like that serves, or served last.
    in_force: Option<Wish>,
    /// Until then the wish cannot be fulfilled, and the session keeps what is in force.
    put_off: Option<Instant>,
    /// It waits for the guest to unmount, which it had done so often.
    awaited_unmount: Option<u64>,
    history: History,
    predecessor: Predecessor,
    not_before: Option<Instant>,
    since: Instant,
    /// When the last engine was lost, until there is another.
    lost: Option<Instant>,
    trouble: Option<Finding>,
    /// The source is not to be touched.
    hold: Option<Hold>,
    started: u64,
    served: u64,
    replacements: Replacements,
    last_replacement: Option<LastReplacement>,
}

impl Engines {
    pub(super) fn new(session: String, service: Service, estate: Arc<Estate>, post: Post<Command>) -> Self {
        let wish = Wish { config: service.config.clone(), epoch: 0 };
        let hold = service.released_until.map(Hold::from_the_start);
        Engines {
            in_force: None,
            wish,
            put_off: None,
            awaited_unmount: None,
            session,
            service,
            estate,
            post,
            serving: None,
            spare: None,
            spare_mounts: (0, 0),
            dying: None,
            order: None,
            history: History::default(),
            predecessor: Predecessor::Quiesced,
            not_before: None,
            since: Instant::now(),
            lost: None,
            trouble: None,
            hold,
            started: 0,
            served: 0,
            replacements: Replacements::default(),
            last_replacement: None,
        }
    }

    pub(super) fn serving(&self) -> Option<&Attached> {
        self.serving.as_ref()
    }

    /// What keeps the session from being served, or from being served as asked.
    pub(super) fn trouble(&self) -> Option<&Finding> {
        self.trouble.as_ref()
    }

    /// Engines started so far, spares included.
    pub(super) fn started(&self) -> u64 {
        self.started
    }

    /// Engines that have served so far.
    pub(super) fn served(&self) -> u64 {
        self.served
    }

    pub(super) fn replacements(&self) -> &Replacements {
        &self.replacements
    }

    pub(super) fn last_replacement(&self) -> Option<&LastReplacement> {
        self.last_replacement.as_ref()
    }

    /// The last order that engines are to fulfil, and the one that is fulfilled.
    pub(super) fn generations(&self) -> (u64, u64) {
        (self.wish.epoch, self.in_force.as_ref().map_or(0, |wish| wish.epoch))
    }

    /// Has the engine died, and nothing speaks against another one at once?
    pub(super) fn is_about_to_recover(&self) -> bool {
        let overdue = self.order.as_ref().is_some_and(|order| order.overdue);
        let hindered = self.dying.is_some() || overdue || self.history.failures > 0;
        self.lost.is_some() && !hindered && pause_after_death(self.history.deaths).is_none()
    }

    /// Is an engine being replaced that will soon be there?
    pub(super) fn is_recovering(&self) -> bool {
        self.lost.is_some_and(|lost| lost.elapsed() < RECOVERY_PATIENCE)
    }

    // Waiting.

    /// Descriptors to wait for: words and death signs of both engines, and what they print.
    pub(super) fn interests(&self) -> [Option<BorrowedFd<'_>>; 10] {
        let [a, b] = [&self.serving, &self.spare].map(|engine| engine.as_ref().map_or([None; 5], signs));
        [a[0], a[1], a[2], a[3], a[4], b[0], b[1], b[2], b[3], b[4]]
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let overdue = self.order.as_ref().filter(|order| !order.overdue).map(|order| order.until);
        let spare = self.spare_is_due_at().filter(|_| self.order.is_none() && self.spare.is_none());
        let dying = self.dying.as_ref().map(|_| Instant::now() + DYING_LOOK);
        let unmount = self.awaited_unmount.map(|_| Instant::now() + UNMOUNT_LOOK);
        let patience = self.lost.map(|lost| lost + RECOVERY_PATIENCE);
        let ahead = [overdue, self.not_before, self.put_off, spare, dying, unmount, patience]
            .into_iter()
            .flatten()
            .filter(|deadline| *deadline > Instant::now());
        // The end of a release counts also if it is past: it may have come while the source was let go of.
        ahead.chain(self.hold.as_ref().map(|hold| hold.until)).min()
    }

    /// A spare is worth its process once there is a guest that has something to lose.
    fn spare_is_due_at(&self) -> Option<Instant> {
        self.serving.as_ref().filter(|engine| engine.serves()).map(|_| self.since + SPARE_AFTER)
    }

    // Events.

    /// Somebody wants to know which file a request is about that takes long.
    pub(super) fn ask_for_path(&mut self, node: u64, deeds: &mut Deeds<'_>) {
        if let Some(serving) = &mut self.serving
            && let Err(error) = serving.ask_for_path(node)
        {
            self.lose_serving(&format!("; {error}"), deeds);
        }
    }

    /// Engines are to be like this; the order has that number.
    pub(super) fn reconfigure(&mut self, config: EngineConfig, number: u64) {
        if self.wish.config != config {
            self.wish.config = config;
            self.renew(number);
        }
    }

    /// The engine is to be replaced by a new one, and so is the spare. Numbers of orders grow.
    pub(super) fn renew(&mut self, number: u64) {
        self.wish.epoch = number;
        self.put_off = None;
        self.awaited_unmount = None;
        self.not_before = None;
        self.trouble = None;
        self.history.failures = 0;
    }

    /// What engines are to be like now: as wished, or, while that cannot be, as they are.
    fn target(&self) -> &Wish {
        self.in_force.as_ref().filter(|_| self.put_off.is_some()).unwrap_or(&self.wish)
    }

    /// The session ends. If it had no engine, nobody will ever say how long that took.
    pub(super) fn end(&mut self) {
        if let Some(lost) = self.lost.take() {
            self.replacements.abandoned += 1;
            let pause = lost.elapsed();
            tracing::warn!(session = self.session, ?pause, "session ends without having been recovered");
        }
    }

    /// An ordered engine has come, or cannot.
    pub(super) fn arrived(&mut self, result: Result<Engine, Finding>, deeds: &mut Deeds<'_>) {
        let order = self.order.take();
        if order.as_ref().is_some_and(|order| order.misinformed) || self.hold.is_some() {
            return;
        }
        self.spare_mounts = order.map_or((0, 0), |order| order.mounts);
        let prepared = result.and_then(|engine| self.prepared(engine, deeds));
        match prepared {
            Ok(engine) => self.has_spare(engine),
            Err(finding) => self.not_to_be_had(finding),
        }
    }

    fn has_spare(&mut self, engine: Attached) {
        self.history.failures = 0;
        self.spare = Some(engine);
        if self.serving.is_some() && self.put_off.is_none() {
            self.trouble = None;
        }
    }

    /// Was an engine of another configuration prepared for a mount that is not the guest's present one? Whether it
    /// can serve that one it has not been asked.
    fn is_for_another_mount(&self, spare: &Attached) -> bool {
        let differs = self.in_force.as_ref().is_some_and(|wish| wish.config != spare.engine.config);
        differs && self.spare_mounts != self.estate.mounts()
    }

    fn prepared(&mut self, engine: Engine, deeds: &mut Deeds<'_>) -> Result<Attached, Finding> {
        self.started += 1;
        tracing::info!(session = self.session, engine_pid = engine.process.pid(), "engine ready");
        let mut engine = Attached::new(engine);
        engine.prepare(deeds.record, deeds.journal).map_err(|error| given_up(&engine, &error))?;
        engine.engine.process.watch_threads();
        Ok(engine)
    }

    /// Where the session has an engine, or had one that was like another wish, the failure is this wish's alone:
    /// what is in force goes on, and is what a recovery falls back to.
    fn not_to_be_had(&mut self, finding: Finding) {
        self.history.failures += 1;
        let pause = match finding.reason {
            Reason::RemountRequired => STUCK_PAUSE,
            _ => pause_after_failure(self.history.failures),
        };
        let until = Some(Instant::now() + pause);
        let fulfilled = self.in_force.as_ref().is_none_or(|wish| wish.epoch == self.wish.epoch);
        let falls_back = self.put_off.is_none() && !fulfilled;
        tracing::warn!(session = self.session, %finding, ?pause, falls_back, "engine could not be started");
        if self.serving.is_some() && !fulfilled {
            self.note_replacement(ReplacementOutcome::Aborted, Duration::ZERO, Some(finding.clone()));
        }
        if falls_back {
            self.put_off = until;
            self.awaited_unmount = (finding.reason == Reason::RemountRequired).then_some(self.spare_mounts.1);
        } else {
            self.not_before = until;
        }
        self.trouble = Some(finding);
    }

    /// Something is to be heard of the engines: words, a death, lines of log.
    pub(super) fn hear(&mut self, ready: &[bool; 10], deeds: &mut Deeds<'_>) {
        if spoke_or_died(&mut self.serving, &ready[..5], &self.session) {
            self.lose_serving("", deeds);
        }
        if spoke_or_died(&mut self.spare, &ready[5..], &self.session)
            && let Some(mut spare) = self.spare.take()
        {
            self.not_to_be_had(spare.engine.last_words(&self.session));
        }
    }

    /// Tells the engines what the record says now.
    pub(super) fn bring_into_line(&mut self, deeds: &mut Deeds<'_>) {
        if let Some(serving) = &mut self.serving
            && let Err(error) = serving.bring_into_line(deeds.record, deeds.journal)
        {
            self.lose_serving(&format!("; {error}"), deeds);
        }
        if let Some(spare) = &mut self.spare
            && let Err(error) = spare.prepare(deeds.record, deeds.journal)
        {
            tracing::warn!(session = self.session, %error, "spare engine given up");
            self.spare = None;
        }
    }

    // Acts.

    /// Does whatever is to be done now.
    pub(super) fn act(&mut self, deeds: &mut Deeds<'_>) {
        self.look_at_the_clock();
        if self.hold.is_some() {
            return self.let_go_of_the_source(deeds);
        }
        loop {
            if self.spare.as_ref().is_some_and(|spare| self.is_for_another_mount(spare)) {
                self.spare = None;
                self.not_before = Some(Instant::now() + MOUNTING_PAUSE);
            }
            match decide(&self.situation()) {
                Act::Wait => return,
                Act::Order => return self.order(),
                Act::DiscardSpare => self.spare = None,
                Act::Promote => self.promote(deeds),
                Act::HandOver => self.hand_over(deeds),
            }
        }
    }

    fn look_at_the_clock(&mut self) {
        let now = Instant::now();
        self.look_at_the_hold();
        for pause in [&mut self.not_before, &mut self.put_off] {
            *pause = pause.filter(|until| *until > now);
        }
        if self.awaited_unmount.is_some_and(|before| before != self.estate.mounts().1) {
            (self.awaited_unmount, self.put_off) = (None, None);
        }
        if let Some(engine) = self.dying.take_if(|engine| engine.engine.process.is_over()) {
            let message = format!("the engine (process {}) has died at last", engine.engine.process.pid());
            self.bury(engine, message);
        }
        if let Some(order) = self.order.as_mut().filter(|order| !order.overdue && order.until <= now) {
            order.overdue = true;
            let late = hung(&self.service.place.path());
            tracing::warn!(session = self.session, finding = %late, "engine overdue");
            self.trouble = Some(late);
        }
    }

    fn situation(&self) -> Situation {
        let target = self.target().epoch;
        let serving = self.serving.as_ref().map(|engine| engine.engine.epoch);
        let age = |epoch: u64| if epoch == target { Age::Current } else { Age::Outdated };
        let beside = |epoch: u64| match serving {
            Some(serving) if epoch > serving && epoch <= target => Spare::Ahead,
            _ if epoch == target => Spare::Alike,
            _ => Spare::Behind,
        };
        Situation {
            serving: serving.map(age),
            spare: self.spare.as_ref().map(|engine| beside(engine.engine.epoch)),
            ordered: self.order.is_some(),
            pausing: self.not_before.is_some() || self.dying.is_some(),
            worth_a_spare: self.spare_is_due_at().is_some_and(|due| due <= Instant::now()),
        }
    }

    /// Orders an engine. It is made by a thread of its own, because a source may hang; it comes by mail.
    fn order(&mut self) {
        let job = Job {
            session: self.session.clone(),
            endpoint: self.service.endpoint.clone(),
            place: self.service.place.clone(),
            config: self.target().config.clone(),
            epoch: self.target().epoch,
            predecessor: self.next_predecessor(),
        };
        let (until, mounts) = (Instant::now() + START_DEADLINE, self.estate.mounts());
        self.order = Some(Order { until, overdue: false, mounts, misinformed: false });
        let (starter, estate, post) = (self.service.starter.clone(), self.estate.clone(), self.post.clone());
        let maker = thread::Builder::new().name("engine-start".into()).spawn(move || {
            let result = starter.start(&job, &estate);
            post.send(Command::EngineStarted(Box::new(result)));
        });
        if let Err(error) = maker {
            self.order = None;
            self.not_to_be_had(no_thread(&error));
        }
    }

    /// What an engine is told that is ordered now. A spare takes over from an engine at rest or from a killed
    /// one: both are `Killed` to it, which at rest, with no request begun, means nothing. From an engine that
    /// died of a request it must not take over: see [`Engines::lose_serving`].
    fn next_predecessor(&self) -> Predecessor {
        if self.serving.is_some() { Predecessor::Killed } else { self.predecessor }
    }

    /// Lets the spare serve. There is no other, or no more.
    fn promote(&mut self, deeds: &mut Deeds<'_>) {
        let Some(mut engine) = self.spare.take() else { return };
        match engine.bring_into_line(deeds.record, deeds.journal) {
            Ok(()) => {
                ring_all(deeds.record);
                self.serves_now(engine);
            }
            Err(error) => {
                self.serving = Some(engine);
                self.lose_serving(&format!("; {error}"), deeds);
            }
        }
    }

    fn serves_now(&mut self, engine: Attached) {
        let engine_pid = engine.engine.process.pid();
        if let Some(lost) = self.lost.take() {
            let pause = lost.elapsed();
            self.replacements.recoveries.record(pause.as_nanos() as u64);
            self.note_replacement(ReplacementOutcome::Recovered, pause, None);
            tracing::info!(session = self.session, engine_pid, ?pause, "session recovered");
        }
        let epoch = engine.engine.epoch;
        self.in_force = Some(Wish { config: engine.engine.config.clone(), epoch });
        self.serving = Some(engine);
        self.since = Instant::now();
        self.served += 1;
        if epoch == self.wish.epoch {
            self.trouble = None;
        }
    }

    /// Lets the spare take over from the engine that serves, between two requests.
    fn hand_over(&mut self, deeds: &mut Deeds<'_>) {
        let (Some(mut old), Some(mut new)) = (self.serving.take(), self.spare.take()) else { return };
        let begin = Instant::now();
        if let Err(error) = old.let_go(REST_DEADLINE) {
            self.spare = Some(new);
            if !error.is_unrest() {
                self.serving = Some(old);
                return self.lose_serving(&format!("; {error}"), deeds);
            }
            return self.stays(old, &error, begin, deeds);
        }
        // Looked at again, now that no guest can mount any more.
        if self.is_for_another_mount(&new) {
            self.not_before = Some(begin + MOUNTING_PAUSE);
            return self.goes_on(old, deeds);
        }
        match new.bring_into_line(deeds.record, deeds.journal) {
            Ok(()) => {
                ring_all(deeds.record);
                let pause = begin.elapsed();
                self.replacements.hand_overs.record(pause.as_nanos() as u64);
                self.note_replacement(ReplacementOutcome::HandedOver, pause, None);
                tracing::info!(session = self.session, engine_pid = new.engine.process.pid(), ?pause, "handed over");
                self.serves_now(new);
            }
            Err(error) if !new.serves() => {
                drop(new);
                self.stays(old, &error, begin, deeds);
            }
            // It may have answered requests already; what the old one knows is out of date.
            Err(error) => {
                drop(old);
                self.serving = Some(new);
                self.lose_serving(&format!("; {error}"), deeds);
            }
        }
    }

    /// The old engine goes on: it did not come to rest, or its successor failed before it served.
    fn stays(&mut self, old: Attached, why: &AttachError, begin: Instant, deeds: &mut Deeds<'_>) {
        let (reason, pause) = match why {
            AttachError::Restless(_) => (Reason::EngineStuck, STUCK_PAUSE),
            _ => (Reason::EngineFailed, pause_after_failure(1)),
        };
        let finding = finding(
            reason,
            format!("the engine (process {}) was not replaced: {why}", old.engine.process.pid()),
            "see whether the file system below the source answers, and the engines' log lines; it is tried again",
        );
        tracing::warn!(session = self.session, %finding, ?pause, "hand-over put off");
        self.replacements.aborted += 1;
        self.not_before = Some(Instant::now() + pause);
        self.goes_on(old, deeds);
        self.note_replacement(ReplacementOutcome::Aborted, begin.elapsed(), Some(finding.clone()));
        if self.serving.is_some() {
            self.trouble = Some(finding);
        }
    }

    fn note_replacement(&mut self, outcome: ReplacementOutcome, pause: Duration, finding: Option<Finding>) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let pause_ns = u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX);
        self.last_replacement = Some(LastReplacement { at, outcome, pause_ns, finding });
    }

    fn goes_on(&mut self, mut old: Attached, deeds: &mut Deeds<'_>) {
        let taken_back = old.take_back(deeds.record, deeds.journal);
        self.serving = Some(old);
        match taken_back {
            Ok(()) => ring_all(deeds.record),
            Err(error) => self.lose_serving(&format!("; {error}"), deeds),
        }
    }

    /// Lets go of the engine that serves. No other takes its place before no thread of it can touch a ring.
    fn lose_serving(&mut self, why: &str, deeds: &mut Deeds<'_>) {
        let Some(mut engine) = self.serving.take() else { return };
        self.lost = self.lost.or(Some(Instant::now()));
        let stopped = engine.engine.process.stop_for_good(KILL_DEADLINE);
        self.count_death(deeds.record);
        let words = engine.engine.parting_words(&self.session);
        let message = format!("the engine (process {}) is gone{words}{why}", engine.engine.process.pid());
        match stopped {
            Ok(()) => self.bury(engine, message),
            Err(_) => self.wait_for_death(engine, &message),
        }
    }

    /// The engine is over, and its estate is settled for the next one.
    fn bury(&mut self, engine: Attached, message: String) {
        self.predecessor = engine.engine.process.fate();
        engine.engine.parking.settle();
        let pause = pause_after_death(self.history.deaths);
        self.not_before = pause.map(|pause| Instant::now() + pause);
        let (fate, deaths) = (self.predecessor, self.history.deaths);
        tracing::warn!(session = self.session, ?fate, deaths, ?pause, "engine lost: {message}");
        let remedy = "another engine takes over; see the log lines of the one that is gone";
        self.trouble = Some(finding(Reason::EngineFailed, message, remedy));
        if fate == Predecessor::Faulted {
            // The spare has been told of a killed one; the next must know that the request at hand kills engines.
            self.spare = None;
            if let Some(order) = &mut self.order {
                order.misinformed = true;
            }
        }
    }

    fn wait_for_death(&mut self, engine: Attached, message: &str) {
        let stuck = finding(
            Reason::EngineStuck,
            format!("{message}; it was killed, but is stuck in a system call"),
            "see to the file system below the source; the guest goes on once that answers or the process ends",
        );
        tracing::error!(session = self.session, finding = %stuck, "engine does not die");
        self.trouble = Some(stuck);
        self.dying = Some(engine);
    }

    /// A death counts as one of a row if no request was answered since the one before although there were some.
    fn count_death(&mut self, record: &SessionRecord<Descriptor>) {
        let rings = 0..record.rings.len();
        let positions: Vec<_> = rings.clone().map(|ring| used_index(record, ring).ok()).collect();
        let asked = rings.into_iter().any(|ring| record.servable(ring) && has_requests(record, ring));
        let in_a_row = asked && positions == self.history.positions;
        self.history.deaths = if in_a_row { self.history.deaths + 1 } else { 1 };
        self.history.positions = positions;
    }
}

/// Guest and engine look at every ring: the engine that died may have answered without saying so, and the guest
/// may have asked without being heard.
fn ring_all(record: &SessionRecord<Descriptor>) {
    for (index, ring) in record.rings.iter().enumerate() {
        if record.servable(index) {
            for bell in [&ring.call, &ring.kick].into_iter().flatten() {
                ring_bell(bell);
            }
        }
    }
}

fn signs(engine: &Attached) -> [Option<BorrowedFd<'_>>; 5] {
    use std::os::fd::AsFd;
    let [process, one, other] = engine.engine.process.death_signs();
    [Some(engine.engine.control.as_fd()), process, one, other, engine.engine.log.fd()]
}

/// Hears an engine out; says whether it is dead.
fn spoke_or_died(engine: &mut Option<Attached>, ready: &[bool], session: &str) -> bool {
    let Some(engine) = engine else { return false };
    if ready[4] {
        engine.engine.log.drain(session);
    }
    if ready[1..4].contains(&true) {
        return true;
    }
    if !ready[0] {
        return false;
    }
    engine.overhear().is_err()
}

fn given_up(engine: &Attached, error: &AttachError) -> Finding {
    finding(
        Reason::EngineFailed,
        format!("the engine (process {}) was given up: {error}", engine.engine.process.pid()),
        "see the engine's log lines; it is tried again",
    )
}

fn no_thread(error: &io::Error) -> Finding {
    finding(
        Reason::EngineFailed,
        format!("no thread to start an engine with: {error}"),
        "raise the broker's limit of processes",
    )
}
