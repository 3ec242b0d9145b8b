//! The session of one VMM: a thread that waits for its VMM, its engines and commands, and for nothing else.
//!
//! The record is authoritative. A VMM's message is peeked, checked, recorded, written to the journal and consumed; then
//! the engine is synced with the record and the VMM is answered. If there is no engine, the VMM is answered from the
//! record: it must never see an error or a close that it did not cause.

pub(crate) mod ended;
pub(crate) mod engines;
pub(crate) mod lifeline;
mod policy;
pub(crate) mod restore;
pub(crate) mod shared;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use thiserror::Error;
use virtiofs_config::EngineConfig;
use virtiofs_contract::control::SessionState;
use virtiofs_contract::preflight::Finding;

use crate::channel::{Receiver, Sender};
use crate::descriptor::{Descriptor, InvalidDescriptor, Numbering};
use crate::engine::source::SourceLocation;
use crate::engine::start::{Engine, Starter};
use crate::engine::unknown_fields::UnknownFields;
use crate::guest_memory::{is_whole, position, used_index};
use crate::holder::Hold;
use crate::holder::names::Part;
use crate::poll::wait_any;
use crate::rate::Allowance;
use crate::record::SessionRecord;
use crate::record::journal::{Journal, JournalError};
use crate::record::store::{MessageState, Progress, RingOwner, Stored};
use crate::record::transition::{Answer, Violation, apply};
use crate::session_list::SessionList;
use crate::vhost_user::codec::{Reply, ReplyValue};
use crate::vhost_user::features;
use crate::vhost_user::socket::{ConnectionError, VmmSocket};
use engines::release::ReleaseRequest;
use engines::{DeviceState, EngineEvent, Engines};
use lifeline::Lifeline;
use shared::Shared;

/// Time within which a connection must send its first message. VMMs send it at once.
pub(crate) const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// Messages of a VMM that are handled at once: several times what the set-up and the reboots of a VM need. Each message
/// costs the broker and the engine more than it costs the VMM.
const MESSAGE_BURST: u32 = 512;

/// After that burst, one more message is handled in this time. The others wait in the socket, and then in the VMM.
const MESSAGE_INTERVAL: Duration = Duration::from_millis(20);

/// A command to a session's thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// An engine is ready, or could not be started.
    EngineStarted(Box<Result<Engine, Finding>>),
    /// Set the desired configuration, with its generation.
    Reconfigure(Box<EngineConfig>, u64),
    /// Replace the serving engine, with the new generation.
    HandOver(u64),
    /// Release the source.
    Release(ReleaseRequest),
    /// Use the source again.
    Resume,
    /// Request the path of a node from the engine.
    Describe(u64),
    /// End the session.
    End,
    /// Leave the session to the next broker.
    Leave,
    /// The VMM has hung up.
    HungUp,
}

/// An event that a session waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Command,
    Vmm,
    Engine(EngineEvent),
}

impl Event {
    fn of_engine(&self) -> Option<EngineEvent> {
        match self {
            Event::Engine(event) => Some(*event),
            Event::Command | Event::Vmm => None,
        }
    }
}

/// Why a session ended.
#[derive(Debug, Error)]
pub(crate) enum End {
    #[error("the VMM disconnected")]
    Disconnected,
    #[error("ended by request")]
    Requested,
    #[error("left to the next broker")]
    Left,
    #[error("its thread is blocked; engines, memory and connection were taken from it")]
    Detached,
    #[error("no message within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Connection(ConnectionError),
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error(transparent)]
    Descriptor(#[from] InvalidDescriptor),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("a file of guest memory is shorter than the VMM declared, which kills engines")]
    MemoryCut,
    #[error("poll: {0}")]
    Poll(io::Error),
}

from_cause!(End::Poll(io::Error));

impl End {
    /// True if engines cannot share the guest's memory. The guest's mount hangs: its requests are never answered.
    pub(crate) fn rejects_memory(&self) -> bool {
        matches!(self, End::Descriptor(InvalidDescriptor::NotMemory | InvalidDescriptor::TooShort { .. }))
    }
}

impl From<ConnectionError> for End {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::Closed => End::Disconnected,
            other => End::Connection(other),
        }
    }
}

/// Everything that the engines of a session are started with.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) starter: Arc<Starter>,
    pub(crate) endpoint: String,
    /// In whose name its engines start: the consumer, or the endpoint.
    pub(crate) payer: String,
    pub(crate) location: SourceLocation,
    pub(crate) config: EngineConfig,
    /// Fields of the stored endpoint that this broker does not know.
    pub(crate) unknown: Arc<UnknownFields>,
    /// True if its lines are not logged: there are too many like it, and it has not served yet.
    pub(crate) quiet: Arc<AtomicBool>,
    /// The source is released until then.
    pub(crate) released_until: Option<Instant>,
    /// Descriptors that outlive the broker.
    pub(crate) hold: Hold,
    /// Where the session is listed while it exists.
    pub(crate) list: Arc<SessionList>,
}

/// One VMM's session.
#[derive(Debug)]
pub(crate) struct Session {
    vmm: VmmSocket,
    messages: Allowance,
    /// No message is handled before this.
    next_message_at: Option<Instant>,
    record: SessionRecord<Descriptor>,
    numbering: Numbering,
    journal: Journal,
    engines: Engines,
    has_served: bool,
    first_message_by: Option<Instant>,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    hold: Hold,
    list: Arc<SessionList>,
    /// How far an earlier broker was with a message.
    interrupted: MessageState,
}

impl Session {
    pub(crate) fn new(
        vmm: VmmSocket,
        service: Service,
        shared: Arc<Shared>,
        (sender, commands): (Sender<Command>, Receiver<Command>),
    ) -> Result<Self, JournalError> {
        let (hold, list) = (service.hold.clone(), service.list.clone());
        let journal = Journal::create(first_state(&service, &shared), &hold)?;
        hold.deposit_copy(Part::Message, &vmm.message)?;
        hold.deposit_copy(Part::Reply, &vmm.reply)?;
        // Last: what is held with a VMM is complete.
        hold.deposit(Part::Vmm, vmm.shared());
        Ok(Session {
            vmm,
            messages: Allowance::new(MESSAGE_BURST, MESSAGE_INTERVAL, Instant::now()),
            next_message_at: None,
            record: SessionRecord::default(),
            numbering: Numbering::default(),
            journal,
            engines: Engines::new(shared.id.clone(), service, shared.persistent.clone(), sender),
            has_served: false,
            first_message_by: Some(Instant::now() + FIRST_MESSAGE),
            commands,
            shared,
            hold,
            list,
            interrupted: MessageState::None,
        })
    }

    pub(crate) fn id(&self) -> &str {
        &self.shared.id
    }

    /// True if its engine runs in the container of an earlier broker, and ends with it, or writes pages of another layout.
    pub(crate) fn has_foreign_engine(&self) -> bool {
        let pages_of_ours = !self.shared.persistent.has_new_pages;
        self.engines.serving().is_some_and(|engine| !engine.engine.process.is_within_reach() || !pages_of_ours)
    }

    /// What others need to end it without its thread.
    pub(crate) fn lifeline(&self) -> Lifeline {
        Lifeline {
            vmm: self.vmm.shared(),
            registry: self.numbering.registry(),
            persistent: self.shared.persistent.clone(),
            hold: self.hold.clone(),
            thread: Arc::default(),
        }
    }

    /// Serves the VMM until it disconnects, violates the protocol, or the session ends by request.
    pub(crate) fn run(&mut self) -> End {
        let mut result = self.continue_message();
        loop {
            if matches!(result, Err(End::Left)) {
                self.leave();
                return End::Left;
            }
            if result.is_err() {
                self.engines.end();
            }
            self.publish();
            if let Err(end) = result.and_then(|()| self.settle()) {
                self.hold.end();
                return end;
            }
            result = self.handle_events();
        }
    }

    /// Records what the next broker continues with, at a point where no engine is being changed.
    fn settle(&mut self) -> Result<(), End> {
        if self.hold.is_present() {
            let begun = self.first_message_by.is_none();
            self.journal.settle(self.engines.ring_owner(), self.engines.progress(begun, self.has_served))?;
        }
        Ok(())
    }

    /// Ends without ending the session: the engines serve, and the holder has everything. The caller must not drop it,
    /// because that would end the engines.
    fn leave(&mut self) {
        if let Err(error) = self.settle() {
            tracing::error!(session = self.shared.id, %error, "state not recorded");
        }
    }

    /// Waits for events and handles them.
    fn handle_events(&mut self) -> Result<(), End> {
        let events = self.wait()?;
        if self.first_message_by.is_some_and(|by| by <= Instant::now()) {
            return Err(End::Silent(FIRST_MESSAGE));
        }
        // Commands come first: a session that is to end does not replace its engine.
        if events.contains(&Event::Command) {
            self.handle_commands()?;
        }
        let engines: Vec<EngineEvent> = events.iter().filter_map(Event::of_engine).collect();
        self.with_engines(|it, device| it.handle(&engines, device));
        if self.engines.is_recovering() && !is_whole(&self.record) {
            return Err(End::MemoryCut);
        }
        if events.contains(&Event::Vmm) || self.vmm.look_again_at().is_some() && self.may_read_vmm() {
            self.vmm_message()?;
        }
        if self.first_message_by.is_none() {
            self.with_engines(Engines::advance);
        }
        Ok(())
    }

    /// Waits for commands, the VMM and the engines. While an engine is being replaced, the VMM's messages wait, so that
    /// the new engine can take part in the answer.
    fn wait(&self) -> io::Result<Vec<Event>> {
        let mut interests: Vec<(Event, BorrowedFd<'_>)> = vec![(Event::Command, self.commands.as_fd())];
        let look_again_at = self.vmm.look_again_at();
        if self.may_read_vmm() && look_again_at.is_none() {
            interests.push((Event::Vmm, self.vmm.as_fd()));
        }
        interests.extend(self.engines.watched().into_iter().map(|(event, fd)| (Event::Engine(event), fd)));
        let next_message_at = self.next_message_at.filter(|at| *at > Instant::now());
        let deadlines = [self.engines.next_deadline(), self.first_message_by, look_again_at, next_message_at];
        wait_any(&interests, deadlines.into_iter().flatten().min())
    }

    fn may_read_vmm(&self) -> bool {
        !self.engines.is_recovering() && self.next_message_at.is_none_or(|at| at <= Instant::now())
    }

    fn with_engines<T>(&mut self, act: impl FnOnce(&mut Engines, &mut DeviceState<'_>) -> T) -> T {
        act(&mut self.engines, &mut DeviceState { record: &mut self.record, journal: &mut self.journal })
    }

    fn handle_commands(&mut self) -> Result<(), End> {
        for command in self.commands.take() {
            match command {
                Command::End => return Err(End::Requested),
                Command::Leave => return Err(End::Left),
                // Otherwise its last messages are handled first.
                Command::HungUp if self.engines.is_recovering() => return Err(End::Disconnected),
                Command::HungUp => {}
                Command::EngineStarted(result) => {
                    self.with_engines(|engines, device| engines.engine_started(*result, device));
                }
                Command::Reconfigure(config, generation) => self.engines.reconfigure(*config, generation),
                Command::HandOver(generation) => self.engines.replace(generation),
                Command::Release(request) => self.engines.release(request),
                Command::Resume => self.engines.resume(),
                Command::Describe(node) => self.with_engines(|engines, device| engines.request_path(node, device)),
            }
        }
        Ok(())
    }

    fn vmm_message(&mut self) -> Result<(), End> {
        let Some(peeked) = self.vmm.peek()? else { return Ok(()) };
        let now = Instant::now();
        self.next_message_at = (!self.messages.take(now)).then(|| self.messages.next_at());
        let (number, length) = (peeked.request.number(), peeked.length());
        let request = self.numbering.admit(&self.record.regions, &self.record.events(), peeked.request)?;
        let answer = apply(&mut self.record, request)?;
        let acknowledge = peeked.need_reply && self.record.protocol_features & features::REPLY_ACK != 0;
        self.record.reply_owed = owed(number, answer, acknowledge);
        // Deposited before the record names them.
        for descriptor in self.record.descriptors() {
            self.hold.deposit(Part::Descriptor(descriptor.number()), Arc::new(descriptor));
        }
        let base_of = match answer {
            Answer::Base(ring) => Some(ring),
            Answer::Value(_) | Answer::Acknowledge => None,
        };
        self.journal.write_message(&self.record, MessageState::Applied { length, base_of })?;
        self.vmm.consume(length)?;
        self.act_on_message(base_of)
    }

    /// Acts on a message that is recorded and consumed, and answers it.
    fn act_on_message(&mut self, base_of: Option<usize>) -> Result<(), End> {
        self.begin();
        self.with_engines(Engines::sync);
        self.update_stopped_rings();
        // Publish before the reply, so that whoever has the reply sees the new state.
        self.publish();
        if let Some(mut reply) = self.record.reply_owed {
            if let Some(ring) = base_of {
                reply.value = ReplyValue::Vring { ring: ring as u32, base: u32::from(self.record.rings[ring].base) };
            }
            self.vmm.prepare_reply(&reply)?;
            self.journal.write_message(&self.record, MessageState::Replying)?;
            self.vmm.send_reply()?;
        }
        self.end_message()
    }

    fn end_message(&mut self) -> Result<(), End> {
        self.record.reply_owed = None;
        self.journal.write_message(&self.record, MessageState::None)?;
        self.vmm.finish()?;
        let used: BTreeSet<u32> = self.record.descriptors().iter().map(Descriptor::number).collect();
        self.hold.retain(|part| !matches!(part, Part::Descriptor(number) if !used.contains(&number)));
        Ok(())
    }

    /// Continues with the message that an earlier broker was handling.
    fn continue_message(&mut self) -> Result<(), End> {
        match std::mem::take(&mut self.interrupted) {
            MessageState::None => Ok(self.vmm.finish()?),
            MessageState::Applied { length, base_of } => {
                self.vmm.consume(length)?;
                self.act_on_message(base_of)
            }
            MessageState::Replying => {
                self.vmm.send_reply()?;
                self.end_message()
            }
        }
    }

    /// The first valid message turns a connection into a session. Only then does it get an engine.
    fn begin(&mut self) {
        if self.first_message_by.take().is_some() {
            self.shared.view().begun = true;
            self.list.add(self.hold.serial(), self.engines.endpoint());
            if !self.shared.is_quiet() {
                tracing::info!(session = self.shared.id, vmm_pid = self.shared.vmm_pid(), "session began");
            }
        }
    }

    /// Sets the base of rings that no engine stopped from their used index.
    fn update_stopped_rings(&mut self) {
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
        let rings_started = (0..self.record.rings.len()).any(|ring| self.record.servable(ring));
        policy::session_state(self.engines.state(), self.has_served, rings_started)
    }

    fn publish(&mut self) {
        let state = self.state();
        if state == SessionState::Serving && !self.has_served {
            self.has_served = true;
            self.shared.speak();
        }
        let mut view = self.shared.view();
        if view.state != state && !self.shared.is_quiet() {
            tracing::info!(session = self.shared.id, from = ?view.state, to = ?state, "session state");
        }
        view.state = state;
        view.guest_memory = self.record.guest_memory();
        view.engines = self.engines.served();
        view.engines_started = self.engines.started();
        view.desired_generation = self.engines.desired_generation();
        view.active_generation = self.engines.active_generation();
        view.last_replacement = self.engines.last_replacement().cloned();
        view.described = self.engines.serving().and_then(|engine| engine.described().cloned());
        view.finding = self.engines.finding().cloned();
        view.replacements.clone_from(self.engines.replacements());
        let serving = self.engines.serving().map(|attached| &attached.engine);
        view.engine_pid = serving.filter(|engine| engine.process.is_within_reach()).map(|engine| engine.process.pid());
        view.root = serving.and_then(|engine| engine.root);
        view.engine_binary = serving.and_then(|engine| engine.binary.clone());
        if let Some(engine) = serving {
            view.config.clone_from(&engine.config);
            view.preflight = Some(engine.preflight.clone());
        }
    }
}

/// What is recorded of a connection before its first message.
fn first_state(service: &Service, shared: &Shared) -> Stored {
    Stored {
        session: shared.id.clone(),
        endpoint: service.endpoint.clone(),
        vmm_pid: shared.vmm_pid(),
        connected_at: shared.connected_at,
        max_inodes: shared.persistent.max_inodes,
        record: SessionRecord::default(),
        message: MessageState::None,
        rings: RingOwner::Nobody,
        progress: Progress::first(service.config.clone()),
    }
}

/// The reply that the VMM waits for, if it does.
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
