//! An engine that serves a session: brought into line with the session's record, step by step.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use thiserror::Error;
use virtiofs_contract::channel::ChannelError;
use virtiofs_contract::engine::{FromEngine, QUEUES, ToEngine};

use super::start::Engine;
use crate::descriptor::Descriptor;
use crate::guest_memory::{position, used_index};
use crate::poll::{Interest, wait_readable};
use crate::record::SessionRecord;
use crate::record::plan::{RingEvent, RingStart, Step, Told, plan};
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
    #[error("no answer on the control channel within {0:?}")]
    Silent(Duration),
    #[error("the engine lacks features {features:#x} and protocol features {protocol:#x}")]
    Features { features: u64, protocol: u64 },
    #[error("{0}")]
    Journal(#[from] JournalError),
    #[error("poll: {0}")]
    Poll(#[from] std::io::Error),
}

/// An engine and what it has been told.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) engine: Engine,
    told: Told<Descriptor>,
}

impl Attached {
    pub(crate) fn new(engine: Engine) -> Self {
        Attached { engine, told: Told::default() }
    }

    /// Tells the engine whatever it does not know yet. A new engine is taken through the whole handshake by
    /// this, a serving one learns of a change.
    pub(crate) fn bring_into_line(
        &mut self,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        for step in plan(&self.told, record) {
            self.carry_out(&step, record, journal)?;
            self.told.note(&step);
        }
        Ok(())
    }

    /// Has this engine been told to serve a ring?
    pub(crate) fn serves(&self) -> bool {
        self.told.running().next().is_some()
    }

    fn carry_out(
        &self,
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
        &self,
        ring: usize,
        record: &mut SessionRecord<Descriptor>,
        journal: &mut Journal,
    ) -> Result<(), AttachError> {
        self.quiesce()?;
        let engine = self.engine.front_end.ask(&Request::<OwnedFd>::GetVringBase { ring: ring as u32 })? as u16;
        let used = used_index(record, ring).ok();
        let it = &mut record.rings[ring];
        it.base = position(Some(engine), used, it.size, it.base);
        journal.write(record)?;
        self.resume()
    }

    fn quiesce(&self) -> Result<(), AttachError> {
        self.engine.control.send(&ToEngine::Quiesce, &[])?;
        let end = Instant::now() + QUIESCE_DEADLINE;
        let mut resting = [false; QUEUES];
        while !resting.iter().all(|ring| *ring) {
            if let FromEngine::Quiesced { ring } = self.hear(end)?
                && let Some(resting) = resting.get_mut(usize::from(ring))
            {
                *resting = true;
            }
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), AttachError> {
        self.engine.control.send(&ToEngine::Resume, &[])?;
        let end = Instant::now() + QUIESCE_DEADLINE;
        while self.hear(end)? != FromEngine::Resumed {}
        Ok(())
    }

    fn hear(&self, end: Instant) -> Result<FromEngine, AttachError> {
        let [spoke] = wait_readable(&[Interest::of(&self.engine.control)], Some(end))?;
        if !spoke {
            return Err(AttachError::Silent(QUIESCE_DEADLINE));
        }
        Ok(self.engine.control.receive::<FromEngine>()?.0)
    }
}

fn event_request(ring: usize, event: RingEvent, fd: Option<Descriptor>) -> Request<Descriptor> {
    let ring = ring as u32;
    match event {
        RingEvent::Call => Request::SetVringCall { ring, fd },
        RingEvent::Err => Request::SetVringErr { ring, fd },
    }
}
