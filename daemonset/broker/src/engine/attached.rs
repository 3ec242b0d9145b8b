//! An engine that is kept in sync with a session's record, message by message.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use thiserror::Error;
use virtiofs_contract::channel::ChannelError;
use virtiofs_contract::engine::{FromEngine, QUEUES, ToEngine};

use super::start::Engine;
use crate::descriptor::Descriptor;
use crate::fault;
use crate::guest_memory::{position, used_index};
use crate::poll::{Interest, wait_readable};
use crate::record::SessionRecord;
use crate::record::journal::{Journal, JournalError};
use crate::record::plan::{RingEvent, RingStart, SentState, Step, is_before_rings, may_lose_a_kick, plan};
use crate::record::store::StoredEngine;
use crate::vhost_user::codec::Request;
use crate::vhost_user::features;
use crate::vhost_user::front_end::FrontEndError;

/// Deadline for stopping one ring. A ring that takes longer has a request stuck in a hung source.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// Why an engine cannot be used. Displays its cause, so no variant has a `source` besides.
#[derive(Debug, Error)]
pub(crate) enum AttachError {
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    #[error("control channel: {0}")]
    Control(ChannelError),
    #[error("a ring did not quiesce within {0:?}: a request is stuck in the source")]
    NotQuiesced(Duration),
    #[error("the engine lacks features {features:#x} and protocol features {protocol:#x}")]
    Features { features: u64, protocol: u64 },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("poll: {0}")]
    Poll(std::io::Error),
}

from_cause!(AttachError::Control(ChannelError));
from_cause!(AttachError::Poll(std::io::Error));

impl AttachError {
    /// True if the engine only did not quiesce in time. It can resume then. After any other error it is unknown which
    /// rings it still serves, because it may stop a ring late.
    pub(crate) fn can_resume(&self) -> bool {
        matches!(self, AttachError::NotQuiesced(_))
    }
}

/// An engine and the state that was sent to it.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) engine: Engine,
    sent: SentState<Descriptor>,
    /// Resume messages that the engine has not acknowledged yet.
    unacknowledged_resumes: u32,
    /// A node that does not exist, whose description shows that the engine's earlier messages have arrived. Resumes before
    /// it were those of an earlier broker.
    marker: Option<u64>,
    /// True while a `Describe` is not answered.
    path_requested: bool,
    /// The last node that was described, and its path.
    described: Option<(u64, Option<String>)>,
}

impl Attached {
    pub(crate) fn new(engine: Engine) -> Self {
        Attached {
            engine,
            sent: SentState::default(),
            unacknowledged_resumes: 0,
            marker: None,
            path_requested: false,
            described: None,
        }
    }

    /// An engine that an earlier broker started, and the state that was sent to it. `marker`: a number that no earlier
    /// broker used.
    ///
    /// # Errors
    /// The engine, which does not take messages.
    pub(crate) fn restored(
        engine: Engine,
        sent: SentState<Descriptor>,
        marker: u64,
    ) -> Result<Self, (Box<Engine>, AttachError)> {
        match engine.control.send(&ToEngine::Describe { node: marker }, &[]) {
            Ok(()) => Ok(Attached { sent, marker: Some(marker), ..Attached::new(engine) }),
            Err(error) => Err((Box::new(engine), error.into())),
        }
    }

    /// What the next broker needs to know to continue with it.
    pub(crate) fn stored(&self) -> StoredEngine {
        let Ok(sent) = self.sent.try_map(|descriptor| Ok::<u32, Infallible>(descriptor.number()));
        let engine = &self.engine;
        StoredEngine {
            serial: engine.held.serial,
            version: engine.version,
            config: engine.config.clone(),
            generation: engine.generation,
            preflight: engine.preflight.clone(),
            binary: engine.binary.clone(),
            root: engine.root.map(Into::into),
            groups: engine.process.groups().own.clone(),
            sent,
        }
    }

    /// Sends everything that the engine does not have yet: the whole handshake to a new engine, changes to one that
    /// serves.
    pub(crate) fn sync(
        &mut self,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        let steps = plan(&self.sent, record);
        if !steps.is_empty() {
            journal.begin_change()?;
        }
        for step in &steps {
            fault::step();
            self.send_step(step, record, journal)?;
            fault::step();
            self.sent.record(step);
        }
        if steps.iter().any(may_lose_a_kick) {
            self.engine.control.send(&ToEngine::Kick, &[])?;
        }
        Ok(())
    }

    /// Sends a standby engine everything that it can have while another engine still serves.
    pub(crate) fn prepare(
        &mut self,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        for step in plan(&self.sent, record).into_iter().take_while(is_before_rings) {
            self.send_step(&step, record, journal)?;
            self.sent.record(&step);
        }
        Ok(())
    }

    /// Quiesces the engine and stops its rings, so that it no longer polls their kicks and a successor can take them.
    /// [`Attached::resume_rings`] undoes it.
    pub(crate) fn stop_rings(&mut self, longest: Duration, journal: &mut Journal) -> Result<(), AttachError> {
        journal.begin_change()?;
        self.quiesce(longest)?;
        for ring in self.sent.running().collect::<Vec<_>>() {
            fault::step();
            self.engine.front_end.request(&Request::<OwnedFd>::GetVringBase { ring: ring as u32 })?;
            self.sent.record(&Step::Stop(ring));
        }
        Ok(())
    }

    /// Serves again after [`Attached::stop_rings`] succeeded or timed out. Quiesced rings resume; a ring whose request
    /// is stuck resumes when that request ends.
    pub(crate) fn resume_rings(
        &mut self,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        self.resume()?;
        self.sync(record, journal)
    }

    /// Receives a message that nothing waits for, such as a late reply to Quiesce.
    pub(crate) fn receive_late(&mut self) -> Result<(), AttachError> {
        let (message, _) = self.engine.control.receive::<FromEngine>()?;
        tracing::debug!(?message, engine_pid = self.engine.process.pid(), "late message of the engine");
        self.handle(&message);
        Ok(())
    }

    /// Requests the path of a node; [`Attached::described`] has it once the engine replies. Only one request is open at
    /// a time, so that an engine that does not read cannot fill the channel.
    pub(crate) fn request_path(&mut self, node: u64) -> Result<(), AttachError> {
        if !std::mem::replace(&mut self.path_requested, true) {
            self.engine.control.send(&ToEngine::Describe { node }, &[])?;
        }
        Ok(())
    }

    /// The last node that was described, and its path.
    pub(crate) fn described(&self) -> Option<&(u64, Option<String>)> {
        self.described.as_ref()
    }

    /// True if a ring was started on this engine.
    pub(crate) fn serves(&self) -> bool {
        self.sent.running().next().is_some()
    }

    fn send_step(
        &mut self,
        step: &Step<Descriptor>,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        match step {
            Step::Negotiate => self.negotiate()?,
            Step::Features(features) => self.confirm(Request::SetFeatures(*features | features::PROTOCOL_FEATURES))?,
            Step::Memory(regions) => self.confirm(Request::SetMemTable(regions.clone()))?,
            Step::AddRegion(region) => self.confirm(Request::AddMemReg(region.clone()))?,
            Step::RemoveRegion(region) => self.confirm(Request::RemMemReg(region.layout))?,
            Step::Event { ring, event, fd } => self.confirm(event_request(*ring, *event, fd.clone()))?,
            Step::Enable { ring, enable } => {
                self.confirm(Request::SetVringEnable { ring: *ring as u32, enable: *enable })?;
            }
            Step::Start { ring, start } => self.start_ring(*ring, start, record, journal)?,
            Step::Stop(ring) => self.stop_ring(*ring, record, journal)?,
            Step::Reset => {
                self.confirm(Request::ResetDevice)?;
                record.reset_owed = false;
                journal.write(record)?;
            }
        }
        Ok(())
    }

    fn confirm(&self, request: Request<Descriptor>) -> Result<(), FrontEndError> {
        self.engine.front_end.confirm(&request)
    }

    fn negotiate(&self) -> Result<(), AttachError> {
        let front_end = &self.engine.front_end;
        front_end.send(&Request::<OwnedFd>::SetOwner)?;
        let features = features::FEATURES & !front_end.request(&Request::<OwnedFd>::GetFeatures)?;
        let protocol = features::PROTOCOL & !front_end.request(&Request::<OwnedFd>::GetProtocolFeatures)?;
        if features != 0 || protocol != 0 {
            return Err(AttachError::Features { features, protocol });
        }
        Ok(front_end.confirm(&Request::<OwnedFd>::SetProtocolFeatures(features::PROTOCOL))?)
    }

    /// Sets a ring up in the order that `vhost-user-backend` needs: it reads the used index at ADDR and starts the ring at
    /// KICK. The record says `served` before the engine can touch the ring.
    fn start_ring(
        &self,
        ring: usize,
        start: &RingStart<Descriptor>,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        let used = if record.rings[ring].served { used_index(record, ring).ok() } else { None };
        let base = position(None, used, start.size, record.rings[ring].base);
        record.rings[ring].served = true;
        journal.write(record)?;
        let index = ring as u32;
        let front_end = &self.engine.front_end;
        front_end.send(&Request::<Descriptor>::SetVringNum { ring: index, num: u32::from(start.size) })?;
        front_end.send(&Request::<Descriptor>::SetVringBase { ring: index, base: u32::from(base) })?;
        front_end.send(&Request::<Descriptor>::SetVringAddr { ring: index, address: start.address })?;
        for (event, fd) in [(RingEvent::Call, &start.call), (RingEvent::Err, &start.err)] {
            if fd.is_some() {
                front_end.send(&event_request(ring, event, fd.clone()))?;
            }
        }
        Ok(front_end.confirm(&Request::SetVringKick { ring: index, fd: Some(start.kick.clone()) })?)
    }

    /// Stops a ring at a request boundary and records its position. The other rings quiesce meanwhile and then resume.
    fn stop_ring(
        &mut self,
        ring: usize,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        self.quiesce(STOP_DEADLINE)?;
        let engine = self.engine.front_end.request(&Request::<OwnedFd>::GetVringBase { ring: ring as u32 })? as u16;
        let used = used_index(record, ring).ok();
        let it = &mut record.rings[ring];
        // If the VMM set the ring up again while it ran, the base that the VMM set stays.
        if it.served {
            it.base = position(Some(engine), used, it.size, it.base);
        }
        journal.write(record)?;
        self.resume()
    }

    /// Quiesces all rings. First receives the acknowledgements of earlier resumes: a ring that quiesced before and has
    /// resumed since must not count as quiesced now.
    fn quiesce(&mut self, longest: Duration) -> Result<(), AttachError> {
        let end = Instant::now() + longest;
        self.await_resumed(end)?;
        self.engine.control.send(&ToEngine::Quiesce, &[])?;
        let mut quiesced = [false; QUEUES];
        while !quiesced.iter().all(|ring| *ring) {
            let message = self.receive(end)?.ok_or(AttachError::NotQuiesced(longest))?;
            if let FromEngine::Quiesced { ring } = message
                && let Some(quiesced) = quiesced.get_mut(usize::from(ring))
            {
                *quiesced = true;
            }
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), AttachError> {
        self.engine.control.send(&ToEngine::Resume, &[])?;
        self.unacknowledged_resumes += 1;
        Ok(())
    }

    fn await_resumed(&mut self, end: Instant) -> Result<(), AttachError> {
        let begin = Instant::now();
        while self.unacknowledged_resumes > 0 || self.marker.is_some() {
            self.receive(end)?.ok_or_else(|| AttachError::NotQuiesced(begin.elapsed()))?;
        }
        Ok(())
    }

    /// The engine's next message; none: the deadline passed.
    fn receive(&mut self, end: Instant) -> Result<Option<FromEngine>, AttachError> {
        let [ready] = wait_readable(&[Interest::of(&self.engine.control)], Some(end))?;
        if !ready {
            return Ok(None);
        }
        let (message, _) = self.engine.control.receive::<FromEngine>()?;
        self.handle(&message);
        Ok(Some(message))
    }

    fn handle(&mut self, message: &FromEngine) {
        match message {
            FromEngine::Resumed if self.marker.is_some() => {}
            FromEngine::Described { node, .. } if self.marker == Some(*node) => self.marker = None,
            FromEngine::Resumed => self.unacknowledged_resumes = self.unacknowledged_resumes.saturating_sub(1),
            FromEngine::Described { node, path } => {
                self.path_requested = false;
                self.described = Some((*node, path.clone()));
            }
            _ => {}
        }
    }
}

fn event_request(ring: usize, event: RingEvent, fd: Option<Descriptor>) -> Request<Descriptor> {
    let ring = ring as u32;
    match event {
        RingEvent::Call => Request::SetVringCall { ring, fd },
        RingEvent::Err => Request::SetVringErr { ring, fd },
    }
}
