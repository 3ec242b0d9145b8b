//! One VMM's session: a thread that waits for its VMM, its engine and commands, and for nothing else.
//!
//! The record is the truth. A VMM's message is looked at, checked, recorded, written down, consumed; then the
//! engine is brought into line with the record and the VMM is answered. Where there is no engine the VMM is
//! answered all the same: it must never see an error or a close that is not its own doing.

pub(crate) mod journal;
pub(crate) mod policy;
pub(crate) mod shared;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use virtiofs_contract::config::EngineConfig;
use virtiofs_contract::control::SessionState;
use virtiofs_contract::engine::FromEngine;
use virtiofs_contract::preflight::{Finding, Reason};

use crate::descriptor::{Descriptor, Numbering, Unacceptable};
use crate::engine::attached::Attached;
use crate::engine::finding;
use crate::engine::start::{Engine, Job, START_DEADLINE, Starter, hung};
use crate::guest_memory::{position, used_index};
use crate::mailbox::{Mailbox, Post};
use crate::poll::{Interest, wait_readable};
use crate::record::SessionRecord;
use crate::record::transition::{Answer, Violation, apply};
use crate::vhost_user::codec::{Reply, ReplyValue};
use crate::vhost_user::offer;
use crate::vhost_user::socket::{ConnectionError, VmmSocket};
use journal::{Journal, JournalError};
use policy::Next;
use shared::Shared;

/// How long a connection may stay silent before its first message. VMMs speak at once.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// How long a killed engine may take until none of its threads can touch a ring.
const KILL_DEADLINE: Duration = Duration::from_secs(2);

/// A command to a session's thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// An engine that was ordered is ready, or cannot be.
    EngineStarted(Box<Result<Engine, Finding>>),
    /// End the session.
    End,
}

/// Why a session ended.
#[derive(Debug, Error)]
pub(crate) enum End {
    #[error("the VMM has left")]
    VmmLeft,
    #[error("it was asked to end")]
    Asked,
    #[error("no message within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Connection(ConnectionError),
    #[error("{0}")]
    Violation(#[from] Violation),
    #[error("{0}")]
    Descriptor(#[from] Unacceptable),
    #[error("{0}")]
    Journal(#[from] JournalError),
    #[error("poll: {0}")]
    Poll(#[from] io::Error),
}

impl From<ConnectionError> for End {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Closed => End::VmmLeft,
            other => End::Connection(other),
        }
    }
}

/// What a session's engines are started with.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) starter: Arc<Starter>,
    pub(crate) endpoint: String,
    pub(crate) source: PathBuf,
    pub(crate) config: EngineConfig,
}

/// The engine of a session, or why there is none.
#[derive(Debug)]
enum Slot {
    /// The VMM has not spoken yet.
    Unwanted,
    /// Ordered; overdue from then on.
    Starting { until: Instant, overdue: Option<Finding> },
    /// It serves, or will once the VMM starts a ring.
    Attached(Box<Attached>),
    /// There is none.
    Failed { finding: Finding, try_again: Option<Instant> },
}

/// One VMM's session.
#[derive(Debug)]
pub(crate) struct Session {
    vmm: VmmSocket,
    record: SessionRecord<Descriptor>,
    numbering: Numbering,
    journal: Journal,
    slot: Slot,
    failures: u32,
    ring_started: bool,
    first_message_by: Option<Instant>,
    mailbox: Mailbox<Command>,
    post: Post<Command>,
    service: Service,
    shared: Arc<Shared>,
}

/// Which descriptors have something.
struct Ready {
    mail: bool,
    log: bool,
    control: bool,
    gone: bool,
    vmm: bool,
}

impl Session {
    pub(crate) fn new(
        vmm: VmmSocket,
        service: Service,
        shared: Arc<Shared>,
        (post, mailbox): (Post<Command>, Mailbox<Command>),
    ) -> Result<Self, JournalError> {
        Ok(Session {
            vmm,
            record: SessionRecord::default(),
            numbering: Numbering::default(),
            journal: Journal::create(&shared.id, &service.endpoint)?,
            slot: Slot::Unwanted,
            failures: 0,
            ring_started: false,
            first_message_by: Some(Instant::now() + FIRST_MESSAGE),
            mailbox,
            post,
            service,
            shared,
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.shared.id
    }

    /// Serves the VMM until it leaves, breaks the protocol, or the session is asked to end.
    pub(crate) fn run(mut self) -> End {
        loop {
            if let Err(end) = self.turn() {
                return end;
            }
            self.publish();
        }
    }

    fn turn(&mut self) -> Result<(), End> {
        let ready = self.wait()?;
        if ready.mail {
            self.open_mail()?;
        }
        if ready.log {
            self.drain_log();
        }
        if ready.gone || ready.control {
            self.hear_engine(ready.gone);
        }
        if ready.vmm {
            self.vmm_message()?;
        }
        self.look_at_the_clock()
    }

    fn wait(&self) -> io::Result<Ready> {
        let engine = self.attached().map(|attached| &attached.engine);
        let log = engine.and_then(|engine| engine.log.fd());
        let pidfd = engine.and_then(|engine| engine.process.pidfd());
        let interests = [
            Interest::of(&self.mailbox),
            Interest::maybe(log.as_ref()),
            Interest::maybe(engine.map(|engine| &engine.control)),
            Interest::maybe(pidfd.as_ref()),
            Interest::of(&self.vmm),
        ];
        let [mail, log, control, gone, vmm] = wait_readable(&interests, self.next_deadline())?;
        Ok(Ready { mail, log, control, gone, vmm })
    }

    fn next_deadline(&self) -> Option<Instant> {
        let slot = match &self.slot {
            Slot::Starting { until, overdue: None } => Some(*until),
            Slot::Failed { try_again, .. } => *try_again,
            _ => None,
        };
        [slot, self.first_message_by].into_iter().flatten().min()
    }

    fn look_at_the_clock(&mut self) -> Result<(), End> {
        let now = Instant::now();
        if self.first_message_by.is_some_and(|by| by <= now) {
            return Err(End::Silent(FIRST_MESSAGE));
        }
        match &mut self.slot {
            Slot::Starting { until, overdue: overdue @ None } if *until <= now => {
                let late = hung(&self.service.source);
                tracing::warn!(session = self.shared.id, finding = %late, "engine overdue");
                *overdue = Some(late);
            }
            Slot::Failed { try_again: Some(at), .. } if *at <= now => self.order_engine(),
            _ => {}
        }
        Ok(())
    }

    fn open_mail(&mut self) -> Result<(), End> {
        for command in self.mailbox.take() {
            match command {
                Command::End => return Err(End::Asked),
                Command::EngineStarted(result) => match *result {
                    Ok(engine) => self.attach(engine),
                    Err(finding) => self.without_engine(finding),
                },
            }
        }
        Ok(())
    }

    fn attached(&self) -> Option<&Attached> {
        match &self.slot {
            Slot::Attached(attached) => Some(attached),
            _ => None,
        }
    }

    // The VMM.

    fn vmm_message(&mut self) -> Result<(), End> {
        let peeked = self.vmm.peek()?;
        let (number, length) = (peeked.request.number(), peeked.length());
        let request = self.numbering.admit(&self.record, peeked.request)?;
        let answer = apply(&mut self.record, request)?;
        let acknowledge = peeked.need_reply && self.record.protocol_features & offer::REPLY_ACK != 0;
        self.record.reply_owed = owed(number, answer, acknowledge);
        self.journal.write(&self.record)?;
        self.vmm.consume(length)?;
        self.begin();
        self.bring_into_line();
        // Who has the answer finds the state that goes with it.
        self.publish();
        self.answer(answer)
    }

    fn answer(&mut self, answer: Answer) -> Result<(), End> {
        let Some(mut reply) = self.record.reply_owed else { return Ok(()) };
        if let Answer::Base(ring) = answer {
            reply.value = ReplyValue::Vring { ring: ring as u32, base: u32::from(self.record.rings[ring].base) };
        }
        self.vmm.answer(&reply)?;
        self.record.reply_owed = None;
        Ok(self.journal.write(&self.record)?)
    }

    /// The first valid message makes a session of a connection; only then is it worth an engine.
    fn begin(&mut self) {
        if self.first_message_by.take().is_some() {
            self.shared.view().begun = true;
            tracing::info!(session = self.shared.id, vmm_pid = self.shared.vmm_pid(), "session began");
            self.order_engine();
        }
    }

    // The engine.

    /// Orders an engine. It is made by a thread of its own, because a source may hang; when it is ready, or
    /// cannot be, it comes by mail.
    fn order_engine(&mut self) {
        let job = Job {
            session: self.shared.id.clone(),
            source: self.service.source.clone(),
            config: self.service.config.clone(),
        };
        let (starter, shared, post) = (self.service.starter.clone(), self.shared.clone(), self.post.clone());
        self.slot = Slot::Starting { until: Instant::now() + START_DEADLINE, overdue: None };
        let maker = thread::Builder::new().name("engine-start".into()).spawn(move || {
            let result = starter.start(&job, &shared.counter_page);
            post.send(Command::EngineStarted(Box::new(result)));
        });
        if let Err(error) = maker {
            self.without_engine(finding(
                Reason::EngineFailed,
                format!("no thread to start an engine with: {error}"),
                "raise the broker's limit of processes",
            ));
        }
    }

    fn attach(&mut self, engine: Engine) {
        tracing::info!(session = self.shared.id, engine_pid = engine.process.pid(), "engine ready");
        self.shared.view().engines += 1;
        self.slot = Slot::Attached(Box::new(Attached::new(engine)));
        self.bring_into_line();
    }

    fn bring_into_line(&mut self) {
        if let Slot::Attached(attached) = &mut self.slot
            && let Err(error) = attached.bring_into_line(&mut self.record, &mut self.journal)
        {
            let pid = attached.engine.process.pid();
            self.lose_engine(&format!("the engine (process {pid}) was given up: {error}"));
        }
        self.settle_stopped_rings();
    }

    /// Where no engine stopped a ring, its used index says where it stopped.
    fn settle_stopped_rings(&mut self) {
        if self.attached().is_some() {
            return;
        }
        for ring in 0..self.record.rings.len() {
            if self.record.rings[ring].started || !self.record.rings[ring].served {
                continue;
            }
            let used = used_index(&self.record, ring).ok();
            let it = &mut self.record.rings[ring];
            it.base = position(None, used, it.size, it.base);
        }
    }

    fn drain_log(&mut self) {
        if let Slot::Attached(attached) = &mut self.slot {
            attached.engine.log.drain(&self.shared.id);
        }
    }

    /// An engine says nothing unasked, except by ending.
    fn hear_engine(&mut self, gone: bool) {
        let Slot::Attached(attached) = &mut self.slot else { return };
        let heard = if gone { None } else { attached.engine.control.receive::<FromEngine>().ok() };
        match heard {
            Some((message, _)) => tracing::debug!(session = self.shared.id, ?message, "late answer of the engine"),
            None => {
                let finding = attached.engine.last_words(&self.shared.id);
                self.lose_engine(&finding.message);
            }
        }
    }

    /// Lets go of an engine, for certain: no thread of it may touch a ring once this returns.
    fn lose_engine(&mut self, why: &str) {
        let remedy = "see the engine's log lines above; a guest that used it must be restarted";
        let mut finding = finding(Reason::EngineFailed, why, remedy);
        if let Some(Err(waited)) = self.attached().map(|attached| attached.engine.process.stop_for_good(KILL_DEADLINE))
        {
            finding.message = format!("{}; it is stuck in a system call for more than {waited:?}", finding.message);
        }
        self.without_engine(finding);
    }

    /// The session goes on without an engine. What follows is decided by [`policy`].
    fn without_engine(&mut self, finding: Finding) {
        self.failures += 1;
        let served = self.record.rings.iter().any(|ring| ring.served);
        let try_again = match policy::after_failure(self.failures, served) {
            Next::TryAfter(pause) => Some(Instant::now() + pause),
            Next::Rest => None,
        };
        tracing::error!(session = self.shared.id, %finding, tried_again = try_again.is_some(), "no engine");
        self.slot = Slot::Failed { finding, try_again };
    }

    // What others see.

    fn state(&self) -> SessionState {
        let started = (0..self.record.rings.len()).any(|ring| self.record.servable(ring));
        match &self.slot {
            Slot::Failed { .. } | Slot::Starting { overdue: Some(_), .. } => SessionState::Failed,
            Slot::Attached(attached) if attached.serves() => SessionState::Serving,
            _ if self.ring_started && !started => SessionState::Stopped,
            _ => SessionState::Connecting,
        }
    }

    fn publish(&mut self) {
        let state = self.state();
        self.ring_started |= state == SessionState::Serving;
        if state == SessionState::Serving {
            self.failures = 0;
        }
        let mut view = self.shared.view();
        if view.state != state {
            tracing::info!(session = self.shared.id, from = ?view.state, to = ?state, "session state");
        }
        view.state = state;
        view.guest_memory = self.record.guest_memory();
        view.engine_pid = None;
        view.finding = None;
        match &self.slot {
            Slot::Attached(attached) => {
                view.engine_pid = Some(attached.engine.process.pid());
                view.config.clone_from(&attached.engine.config);
                view.preflight = Some(attached.engine.preflight.clone());
            }
            Slot::Starting { overdue, .. } => view.finding.clone_from(overdue),
            Slot::Failed { finding, .. } => view.finding = Some(finding.clone()),
            Slot::Unwanted => {}
        }
    }
}

/// The answer that a VMM now waits for, if it does.
fn owed(request: u32, answer: Answer, acknowledge: bool) -> Option<Reply> {
    let value = match answer {
        Answer::Value(value) => value,
        // The position follows once the ring has stopped.
        Answer::Base(ring) => ReplyValue::Vring { ring: ring as u32, base: 0 },
        Answer::Acknowledge if acknowledge => ReplyValue::U64(0),
        Answer::Acknowledge => return None,
    };
    Some(Reply { request, value })
}
