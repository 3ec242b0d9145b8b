//! An engine that serves a session: brought into line with the session's record, step by step.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use thiserror::Error;
use virtiofs_contract::channel::ChannelError;
use virtiofs_contract::engine::{FromEngine, QUEUES, ToEngine};

use super::start::Engine;
use crate::descriptor::{Descriptor, ring_bell};
use crate::guest_memory::{position, used_index};
use crate::poll::{Interest, wait_readable};
use crate::record::SessionRecord;
use crate::record::plan::{RingEvent, RingStart, Step, Told, is_before_rings, may_cost_a_kick, plan};
use crate::session::journal::{Journal, JournalError};
use crate::vhost_user::codec::Request;
use crate::vhost_user::front_end::FrontEndError;
use crate::vhost_user::offer;

/// How long rings may take to come to rest. One that takes longer has a request stuck in a hung source.
const QUIESCE_DEADLINE: Duration = Duration::from_secs(5);

/// Why an engine can no longer be relied on.
#[derive(Debug, Error)]
pub(crate) enum AttachError {
    #[error("{0}")]
    FrontEnd(#[from] FrontEndError),
    #[error("control channel: {0}")]
    Control(#[from] ChannelError),
    #[error("a ring did not come to rest within {0:?}: a request is stuck in the source")]
    Restless(Duration),
    #[error("the engine lacks features {features:#x} and protocol features {protocol:#x}")]
    Features { features: u64, protocol: u64 },
    #[error("{0}")]
    Journal(#[from] JournalError),
    #[error("poll: {0}")]
    Poll(#[from] std::io::Error),
}

impl AttachError {
    /// Is it only that the engine did not come to rest? It can go on then. After anything else it is not known which
    /// rings it still serves: it may yet stop one that it was asked to stop in vain.
    pub(crate) fn is_unrest(&self) -> bool {
        matches!(self, AttachError::Restless(_))
    }
}

/// An engine and what it has been told.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) engine: Engine,
    told: Told<Descriptor>,
    /// Resumes that the engine has not acknowledged yet.
    resuming: u32,
    /// Has it been asked for the path of a node, and not answered yet?
    asked_for_path: bool,
    /// What it answered last: a node and its path.
    described: Option<(u64, Option<String>)>,
}

impl Attached {
    pub(crate) fn new(engine: Engine) -> Self {
        Attached { engine, told: Told::default(), resuming: 0, asked_for_path: false, described: None }
    }

    /// Tells the engine whatever it does not know yet. A new engine is taken through the whole handshake by
    /// this, a serving one learns of a change.
    pub(crate) fn bring_into_line(
        &mut self,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        let steps = plan(&self.told, record);
        for step in &steps {
            self.carry_out(step, record, journal)?;
            self.told.note(step);
        }
        if steps.iter().any(may_cost_a_kick) {
            kick_all(record);
        }
        Ok(())
    }

    /// Tells a new engine whatever it can know before it serves, while another one still does.
    pub(crate) fn prepare(
        &mut self,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        for step in plan(&self.told, record).into_iter().take_while(is_before_rings) {
            self.carry_out(&step, record, journal)?;
            self.told.note(&step);
        }
        Ok(())
    }

    /// Brings the engine to rest and its rings out of its hands: it hears no kick any more, so a successor can
    /// have them. [`Attached::take_back`] undoes it.
    pub(crate) fn let_go(&mut self, longest: Duration) -> Result<(), AttachError> {
        self.quiesce(longest)?;
        for ring in self.told.running().collect::<Vec<_>>() {
            self.engine.front_end.ask(&Request::<OwnedFd>::GetVringBase { ring: ring as u32 })?;
            self.told.note(&Step::Stop(ring));
        }
        Ok(())
    }

    /// Serves again after [`Attached::let_go`], or after an attempt at it that took too long. The rings that
    /// have come to rest go on; one whose request is stuck goes on when that ends.
    pub(crate) fn take_back(
        &mut self,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        self.resume()?;
        self.bring_into_line(record, journal)
    }

    /// Takes what the engine says unasked: the late end of an attempt to bring it to rest.
    pub(crate) fn overhear(&mut self) -> Result<(), AttachError> {
        let (message, _) = self.engine.control.receive::<FromEngine>()?;
        tracing::debug!(?message, engine_pid = self.engine.process.pid(), "late answer of the engine");
        self.note_word(&message);
        Ok(())
    }

    /// Asks for the path of a node; it is told when the engine gets to it. One question at a time: an engine that is
    /// busy coming to rest must not be sent more than it has room for.
    pub(crate) fn ask_for_path(&mut self, node: u64) -> Result<(), AttachError> {
        if !std::mem::replace(&mut self.asked_for_path, true) {
            self.engine.control.send(&ToEngine::Describe { node }, &[])?;
        }
        Ok(())
    }

    /// The node that was asked for last, and its path.
    pub(crate) fn described(&self) -> Option<&(u64, Option<String>)> {
        self.described.as_ref()
    }

    /// Has this engine been told to serve a ring?
    pub(crate) fn serves(&self) -> bool {
        self.told.running().next().is_some()
    }

    fn carry_out(
        &mut self,
        step: &Step<Descriptor>,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        match step {
            Step::Introduce => self.introduce()?,
            Step::Features(features) => self.confirm(Request::SetFeatures(*features | offer::PROTOCOL_FEATURES))?,
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

    fn introduce(&self) -> Result<(), AttachError> {
        let front_end = &self.engine.front_end;
        front_end.tell(&Request::<OwnedFd>::SetOwner)?;
        let features = offer::FEATURES & !front_end.ask(&Request::<OwnedFd>::GetFeatures)?;
        let protocol = offer::PROTOCOL & !front_end.ask(&Request::<OwnedFd>::GetProtocolFeatures)?;
        if features != 0 || protocol != 0 {
            return Err(AttachError::Features { features, protocol });
        }
        Ok(front_end.confirm(&Request::<OwnedFd>::SetProtocolFeatures(offer::PROTOCOL))?)
    }

    /// Sets a ring up, in the order that `vhost-user-backend` needs: at ADDR it reads the used index, at KICK
    /// the ring lives. The record says "served" before the engine can have touched the ring.
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
        front_end.tell(&Request::<Descriptor>::SetVringNum { ring: index, num: u32::from(start.size) })?;
        front_end.tell(&Request::<Descriptor>::SetVringBase { ring: index, base: u32::from(base) })?;
        front_end.tell(&Request::<Descriptor>::SetVringAddr { ring: index, address: start.address })?;
        for (event, fd) in [(RingEvent::Call, &start.call), (RingEvent::Err, &start.err)] {
            if fd.is_some() {
                front_end.tell(&event_request(ring, event, fd.clone()))?;
            }
        }
        Ok(front_end.confirm(&Request::SetVringKick { ring: index, fd: Some(start.kick.clone()) })?)
    }

    /// Stops a ring at a request boundary and notes where. The other rings rest meanwhile and then go on.
    fn stop_ring(
        &mut self,
        ring: usize,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        self.quiesce(QUIESCE_DEADLINE)?;
        let engine = self.engine.front_end.ask(&Request::<OwnedFd>::GetVringBase { ring: ring as u32 })? as u16;
        let used = used_index(record, ring).ok();
        let it = &mut record.rings[ring];
        // A VMM that set the ring up anew while it ran has said where it begins: that stands.
        if it.served {
            it.base = position(Some(engine), used, it.size, it.base);
        }
        journal.write(record)?;
        self.resume()
    }

    /// Brings all rings to rest. What an earlier attempt left unsaid is heard out first: a ring that rested
    /// then, and has gone on since, must not count as resting now.
    fn quiesce(&mut self, longest: Duration) -> Result<(), AttachError> {
        let end = Instant::now() + longest;
        self.hear_resumed(end)?;
        self.engine.control.send(&ToEngine::Quiesce, &[])?;
        let mut resting = [false; QUEUES];
        while !resting.iter().all(|ring| *ring) {
            let heard = self.hear(end)?.ok_or(AttachError::Restless(longest))?;
            if let FromEngine::Quiesced { ring } = heard
                && let Some(resting) = resting.get_mut(usize::from(ring))
            {
                *resting = true;
            }
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), AttachError> {
        self.engine.control.send(&ToEngine::Resume, &[])?;
        self.resuming += 1;
        Ok(())
    }

    fn hear_resumed(&mut self, end: Instant) -> Result<(), AttachError> {
        let begin = Instant::now();
        while self.resuming > 0 {
            self.hear(end)?.ok_or_else(|| AttachError::Restless(begin.elapsed()))?;
        }
        Ok(())
    }

    /// The engine's next word, if it comes in time.
    fn hear(&mut self, end: Instant) -> Result<Option<FromEngine>, AttachError> {
        let [spoke] = wait_readable(&[Interest::of(&self.engine.control)], Some(end))?;
        if !spoke {
            return Ok(None);
        }
        let (message, _) = self.engine.control.receive::<FromEngine>()?;
        self.note_word(&message);
        Ok(Some(message))
    }

    fn note_word(&mut self, message: &FromEngine) {
        match message {
            FromEngine::Resumed => self.resuming = self.resuming.saturating_sub(1),
            FromEngine::Described { node, path } => {
                self.asked_for_path = false;
                self.described = Some((*node, path.clone()));
            }
            _ => {}
        }
    }
}

/// Guests do not kick twice: an engine may have heard one while it could not look at the ring.
fn kick_all(record: &SessionRecord<Descriptor>) {
    let servable = (0..record.rings.len()).filter(|ring| record.servable(*ring));
    servable.filter_map(|ring| record.rings[ring].kick.as_ref()).for_each(ring_bell);
}

fn event_request(ring: usize, event: RingEvent, fd: Option<Descriptor>) -> Request<Descriptor> {
    let ring = ring as u32;
    match event {
        RingEvent::Call => Request::SetVringCall { ring, fd },
        RingEvent::Err => Request::SetVringErr { ring, fd },
    }
}
