//! One VMM's session: a thread that waits for its VMM, its engine and commands, and for nothing else.
//!
//! The record is the truth. A VMM's message is looked at, checked, recorded, written down, consumed; then the
//! engine is brought into line with the record and the VMM is answered. Where there is no engine the VMM is
//! answered all the same: it must never see an error or a close that is not its own doing.

pub(crate) mod engines;
pub(crate) mod estate;
pub(crate) mod journal;
pub(crate) mod parking;
mod policy;
pub(crate) mod shared;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::SessionState;
use virtiofs_contract::preflight::Finding;

use crate::descriptor::{Descriptor, Numbering, Unacceptable};
use crate::engine::source::Place;
use crate::engine::start::{Engine, Starter};
use crate::guest_memory::{is_whole, position, used_index};
use crate::mailbox::{Mailbox, Post};
use crate::poll::{Interest, wait_readable};
use crate::record::SessionRecord;
use crate::record::transition::{Answer, Violation, apply};
use crate::vhost_user::codec::{Reply, ReplyValue};
use crate::vhost_user::offer;
use crate::vhost_user::socket::{ConnectionError, VmmSocket};
use engines::release::ReleaseOrder;
use engines::{Deeds, Engines};
use journal::{Journal, JournalError};
use shared::Shared;

/// How long a connection may stay silent before its first message. VMMs speak at once.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// A command to a session's thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// An engine that was ordered is ready, or cannot be.
    EngineStarted(Box<Result<Engine, Finding>>),
    /// Engines are to be like this from now on, the one that serves included: order of that number.
    Reconfigure(Box<EngineConfig>, u64),
    /// The engine that serves is to be replaced by a new one: order of that number.
    HandOver(u64),
    /// Let go of the source.
    Release(ReleaseOrder),
    /// Take the source up again.
    Resume,
    /// Ask the engine for the path of a node.
    Describe(u64),
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
    #[error("a file of guest memory has become shorter than the VMM said, which kills engines")]
    MemoryCut,
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
    pub(crate) place: Place,
    pub(crate) config: EngineConfig,
    /// The source is released; this is when it is taken up again.
    pub(crate) released_until: Option<Instant>,
}

/// One VMM's session.
#[derive(Debug)]
pub(crate) struct Session {
    vmm: VmmSocket,
    record: SessionRecord<Descriptor>,
    numbering: Numbering,
    journal: Journal,
    engines: Engines,
    has_served: bool,
    first_message_by: Option<Instant>,
    mailbox: Mailbox<Command>,
    shared: Arc<Shared>,
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
            engines: Engines::new(shared.id.clone(), service, shared.estate.clone(), post),
            has_served: false,
            first_message_by: Some(Instant::now() + FIRST_MESSAGE),
            mailbox,
            shared,
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.shared.id
    }

    /// Serves the VMM until it leaves, breaks the protocol, or the session is asked to end.
    pub(crate) fn run(mut self) -> End {
        loop {
            let turn = self.turn();
            if turn.is_err() {
                self.engines.end();
            }
            self.publish();
            if let Err(end) = turn {
                return end;
            }
        }
    }

    fn turn(&mut self) -> Result<(), End> {
        let (mail, vmm, engines) = self.wait()?;
        if self.first_message_by.is_some_and(|by| by <= Instant::now()) {
            return Err(End::Silent(FIRST_MESSAGE));
        }
        self.with_engines(|known, deeds| known.hear(&engines, deeds));
        if self.engines.is_recovering() && !is_whole(&self.record) {
            return Err(End::MemoryCut);
        }
        if mail {
            self.open_mail()?;
        }
        if vmm {
            self.vmm_message()?;
        }
        if self.first_message_by.is_none() {
            self.with_engines(Engines::act);
        }
        Ok(())
    }

    /// Waits for mail, the VMM, or the engines. A VMM that would have to be answered without an engine, while
    /// one is about to be there, is left waiting for it.
    fn wait(&self) -> io::Result<(bool, bool, [bool; 10])> {
        let vmm = Some(&self.vmm).filter(|_| !self.engines.is_recovering());
        let engines = self.engines.interests();
        let [e0, e1, e2, e3, e4, e5, e6, e7, e8, e9] = engines.each_ref().map(|fd| Interest::maybe(fd.as_ref()));
        let interests = [Interest::of(&self.mailbox), Interest::maybe(vmm), e0, e1, e2, e3, e4, e5, e6, e7, e8, e9];
        let deadline = [self.engines.next_deadline(), self.first_message_by].into_iter().flatten().min();
        let [mail, vmm, engines @ ..] = wait_readable(&interests, deadline)?;
        Ok((mail, vmm, engines))
    }

    fn with_engines<T>(&mut self, act: impl FnOnce(&mut Engines, &mut Deeds<'_>) -> T) -> T {
        act(&mut self.engines, &mut Deeds { record: &mut self.record, journal: &mut self.journal })
    }

    fn open_mail(&mut self) -> Result<(), End> {
        for command in self.mailbox.take() {
            match command {
                Command::End => return Err(End::Asked),
                Command::EngineStarted(result) => self.with_engines(|engines, deeds| engines.arrived(*result, deeds)),
                Command::Reconfigure(config, number) => self.engines.reconfigure(*config, number),
                Command::HandOver(number) => self.engines.renew(number),
                Command::Release(order) => self.engines.release(order),
                Command::Resume => self.engines.resume(),
                Command::Describe(node) => self.with_engines(|engines, deeds| engines.ask_for_path(node, deeds)),
            }
        }
        Ok(())
    }

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
        self.with_engines(Engines::bring_into_line);
        self.settle_stopped_rings();
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
        }
    }

    /// Where no engine stopped a ring, its used index says where it stopped.
    fn settle_stopped_rings(&mut self) {
        if self.engines.serving().is_some() {
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

    fn state(&self) -> SessionState {
        let started = (0..self.record.rings.len()).any(|ring| self.record.servable(ring));
        match self.engines.serving() {
            None if self.engines.is_released() => SessionState::Released,
            None if self.engines.is_about_to_recover() => SessionState::Recovering,
            None if self.engines.trouble().is_some() => SessionState::Failed,
            Some(engine) if engine.serves() => SessionState::Serving,
            _ if self.has_served && !started => SessionState::Stopped,
            _ => SessionState::Connecting,
        }
    }

    fn publish(&mut self) {
        let state = self.state();
        self.has_served |= state == SessionState::Serving;
        let mut view = self.shared.view();
        if view.state != state {
            tracing::info!(session = self.shared.id, from = ?view.state, to = ?state, "session state");
        }
        view.state = state;
        view.guest_memory = self.record.guest_memory();
        view.engines = self.engines.served();
        view.engines_started = self.engines.started();
        (view.desired_generation, view.active_generation) = self.engines.generations();
        view.last_replacement = self.engines.last_replacement().cloned();
        view.described = self.engines.serving().and_then(|engine| engine.described().cloned());
        view.finding = self.engines.trouble().cloned();
        view.replacements.clone_from(self.engines.replacements());
        let serving = self.engines.serving().map(|attached| &attached.engine);
        view.engine_pid = serving.map(|engine| engine.process.pid());
        view.root = serving.and_then(|engine| engine.root);
        view.engine_binary = serving.and_then(|engine| engine.binary.clone());
        if let Some(engine) = serving {
            view.config.clone_from(&engine.config);
            view.preflight = Some(engine.preflight.clone());
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
