//! Restores a session of an earlier broker from its held descriptors.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;

use super::engines::{Engines, RestoredEngines};
use super::shared::Shared;
use super::{Command, FIRST_MESSAGE, MESSAGE_BURST, MESSAGE_INTERVAL, Service, Session};
use crate::channel::{Receiver, Sender};
use crate::descriptor::{Descriptor, InvalidDescriptor, Numbering, check_restored};
use crate::disposal::{Account, Foreign};
use crate::engine::attached::Attached;
use crate::engine::fd_stash::StashServer;
use crate::engine::mount_point::MountPoint;
use crate::engine::persistent::{PersistentState, missing};
use crate::engine::process::{EngineProcess, ProcessTable, Purpose};
use crate::engine::start::{Engine, HeldEngine, Leftover, hang_up};
use crate::engine::unknown_fields;
use crate::holder::Parts;
use crate::holder::names::{EnginePart, Part};
use crate::holder::restore::{Condition, Found, OutOfReach, Rings, Verdict, decide};
use crate::poll::monotonic_ns;
use crate::rate::Allowance;
use crate::record::journal::Journal;
use crate::record::store::{MissingDescriptor, RingOwner, Stored, StoredEngine, with_descriptors};
use crate::record::transition::{Violation, check};
use crate::state_file::{StateFile, StateFileError};
use crate::vhost_user::pipe::Pipe;
use crate::vhost_user::socket::VmmSocket;
use virtiofs_contract::Versions;
use virtiofs_contract::channel::PacketChannel;

/// Reason why a session cannot be restored and is lost.
#[derive(Debug, Error)]
pub(crate) enum RestoreError {
    #[error("{0}")]
    Io(io::Error),
    #[error("record: {0}")]
    Record(StateFileError),
    #[error(transparent)]
    MissingDescriptor(#[from] MissingDescriptor),
    #[error(transparent)]
    Descriptor(#[from] InvalidDescriptor),
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error("engine {0} may still run, and its process is not held")]
    EngineOutOfReach(u64),
}

from_cause!(RestoreError::Io(io::Error));
from_cause!(RestoreError::Record(StateFileError));

impl From<OutOfReach> for RestoreError {
    fn from(OutOfReach(serial): OutOfReach) -> Self {
        RestoreError::EngineOutOfReach(serial)
    }
}

/// A session whose record is read.
pub(crate) struct Restoring {
    file: StateFile<Stored>,
    pub(crate) stored: Stored,
    /// Fields of its configurations that this broker does not know.
    pub(crate) unknown: Vec<String>,
    parts: Parts,
}

/// An engine of an earlier broker.
struct Remnant {
    process: Option<EngineProcess>,
    parts: BTreeMap<EnginePart, Arc<OwnedFd>>,
}

impl Restoring {
    /// Reads the record of a session.
    pub(crate) fn read(mut parts: Parts) -> Result<Self, RestoreError> {
        let record = parts.remove(&Part::Record).ok_or_else(|| missing(Part::Record))?;
        let (file, stored, unknown) = StateFile::open_newer(record.try_clone()?)?;
        Ok(Restoring { file, stored, unknown: unknown_fields::of_session(unknown), parts })
    }

    /// Rebuilds the session. Everything is checked as if a VMM had just sent it.
    pub(crate) fn restore(
        self,
        service: Service,
        processes: &Arc<ProcessTable>,
        account: &Arc<Account>,
        (sender, commands): (Sender<Command>, Receiver<Command>),
    ) -> Result<(Session, Arc<Shared>), RestoreError> {
        let Restoring { file, stored, mut parts, .. } = self;
        let hold = service.hold.clone();
        hold.account().deposit_copy(Part::Record, &file)?;
        let vmm = restore_vmm(&mut parts, account)?;
        let (numbering, known) = restore_descriptors(&parts)?;
        let record = with_descriptors(&stored.record, |number| known.get(&number).cloned())?;
        check(&record)?;
        check_restored(&record.regions, &record.events())?;
        let mounted_at = stored.progress.mounted_at.clone().map(MountPoint::restored);
        let group = stored.progress.group.as_ref().and_then(|path| service.starter.restored_group(path));
        let persistent = PersistentState::restored(&mut parts, stored.max_inodes, mounted_at, group, hold.clone())?;
        let shared = Arc::new(Shared::restored(&stored, persistent));
        let engines = restore_engines(&stored, &parts, &service, &shared.persistent, &known, processes)?;
        let list = service.list.clone();
        let engines =
            Engines::restored(shared.id.clone(), service, shared.persistent.clone(), sender, &stored.progress, engines);
        let first_message_by = (!stored.progress.begun).then(|| Instant::now() + FIRST_MESSAGE);
        let session = Session {
            vmm,
            messages: Allowance::new(MESSAGE_BURST, MESSAGE_INTERVAL, Instant::now()),
            next_message_at: None,
            record,
            numbering,
            engines,
            has_served: stored.progress.has_served,
            first_message_by,
            commands,
            shared: shared.clone(),
            hold,
            list,
            interrupted: stored.message,
            journal: Journal::restored(file, stored),
        };
        Ok((session, shared))
    }
}

fn restore_vmm(parts: &mut Parts, account: &Arc<Account>) -> Result<VmmSocket, RestoreError> {
    let mut take = |part: Part| parts.remove(&part).ok_or_else(|| missing(part))?.try_clone();
    let (stream, message, reply) = (take(Part::Vmm)?, take(Part::Message)?, take(Part::Reply)?);
    let stream = Arc::new(Foreign::new(stream, account.clone()));
    Ok(VmmSocket::restored(stream, account.clone(), Pipe::restored(message), Pipe::restored(reply)))
}

fn restore_descriptors(parts: &Parts) -> Result<(Numbering, BTreeMap<u32, Descriptor>), RestoreError> {
    let mut held = BTreeMap::new();
    for (part, fd) in parts {
        if let Part::Descriptor(number) = part {
            held.insert(*number, fd.try_clone()?);
        }
    }
    let mut numbering = Numbering::default();
    let known = numbering.restore(held)?;
    Ok((numbering, known))
}

/// Decides what to do with the engines of the earlier broker, and does it.
fn restore_engines(
    stored: &Stored,
    parts: &Parts,
    service: &Service,
    persistent: &Arc<PersistentState>,
    known: &BTreeMap<u32, Descriptor>,
    processes: &Arc<ProcessTable>,
) -> Result<RestoredEngines, RestoreError> {
    let (owner, known_engine) = match &stored.rings {
        RingOwner::Nobody => (Rings::Nobody, None),
        RingOwner::Engine(engine) => (Rings::Engine(engine.serial), Some(&**engine)),
        RingOwner::Unknown => (Rings::Unknown, None),
    };
    let mut remnants = find_engines(parts, service, known_engine, persistent, processes);
    for pidfd in remnants.values().filter_map(|remnant| remnant.process.as_ref()?.pidfd()) {
        persistent.kill_switch.add(pidfd)?;
    }
    let found = |(serial, remnant): (&u64, &Remnant)| {
        // The messages of another version are unknown. Such an engine is replaced.
        let of_ours = |engine: &StoredEngine| Versions::OURS.include(engine.version);
        let speaks = known_engine.is_none_or(|engine| engine.serial != *serial || of_ours(engine));
        let condition = match remnant.condition() {
            Condition::Running if !speaks => Condition::Unusable,
            condition => condition,
        };
        Found { serial: *serial, condition }
    };
    let found: Vec<Found> = remnants.iter().map(found).collect();
    let Verdict { reattach, wait, end, lost } = decide(owner, &found)?;
    tracing::info!(session = stored.session, ?found, ?reattach, ?wait, ?end, lost, "engines of the earlier broker");
    let held = |serial| HeldEngine::new(service.hold.clone(), serial);
    for serial in end {
        // Dropping both ends it.
        drop((remnants.remove(&serial), held(serial)));
    }
    let mut leftovers = Vec::new();
    for serial in wait {
        let Some(Remnant { process: Some(process), mut parts }) = remnants.remove(&serial) else { continue };
        if let Some(control) = parts.get(&EnginePart::Control).filter(|_| !process.is_within_reach()) {
            hang_up(control);
        }
        let channel = parts.remove(&EnginePart::Stash).map(|fd| fd.try_clone()).transpose()?;
        let serve = |fd| StashServer::start(persistent.stash.clone(), PacketChannel::from_fd(fd));
        leftovers.push(Leftover::new(process, channel.map(serve).transpose()?, held(serial)));
    }
    if let (Some(serial), RingOwner::Engine(engine)) = (reattach, &stored.rings)
        && let Some(Remnant { process: Some(process), parts }) = remnants.remove(&serial)
    {
        let control = parts.get(&EnginePart::Control).cloned();
        match reattach_engine(process, engine, parts, persistent, held(serial), known) {
            Ok(mut engine) => {
                if engine.engine.process.is_within_reach() {
                    service.starter.renew_limits(&mut engine.engine);
                }
                return Ok(RestoredEngines::Serving(engine));
            }
            Err(leftover) => {
                if !leftover.process.is_within_reach() {
                    control.iter().for_each(hang_up);
                }
                leftovers.push(*leftover);
            }
        }
        return Ok(RestoredEngines::Lost(leftovers));
    }
    Ok(if lost { RestoredEngines::Lost(leftovers) } else { RestoredEngines::None })
}

fn find_engines(
    parts: &Parts,
    service: &Service,
    serving: Option<&StoredEngine>,
    persistent: &PersistentState,
    processes: &Arc<ProcessTable>,
) -> BTreeMap<u64, Remnant> {
    let mut remnants: BTreeMap<u64, Remnant> = BTreeMap::new();
    for (part, fd) in parts {
        if let Part::Engine(serial, part) = part {
            let remnant = remnants.entry(*serial);
            let remnant = remnant.or_insert_with(|| Remnant { process: None, parts: BTreeMap::new() });
            remnant.parts.insert(*part, fd.clone());
        }
    }
    for (serial, remnant) in &mut remnants {
        let groups = serving.filter(|engine| engine.serial == *serial).map(|engine| engine.groups.clone());
        let purpose = Purpose::Endpoint(service.endpoint.clone());
        let pidfd = remnant.parts.remove(&EnginePart::Process);
        let process = pidfd.and_then(|fd| fd.try_clone().ok()).map(|pidfd| {
            EngineProcess::restored(pidfd, purpose, groups.unwrap_or_default(), persistent.group(), processes)
        });
        remnant.process = process.and_then(Result::ok);
    }
    remnants
}

impl Remnant {
    fn condition(&self) -> Condition {
        let complete = [EnginePart::Control, EnginePart::FrontEnd, EnginePart::Stash];
        match &self.process {
            None => Condition::Unknown,
            Some(process) if process.is_over() => Condition::Ended,
            Some(_) if complete.iter().any(|part| !self.parts.contains_key(part)) => Condition::Unusable,
            Some(_) => Condition::Running,
        }
    }
}

/// Continues with an engine that serves.
///
/// # Errors
/// Returns the engine, which must be killed.
fn reattach_engine(
    process: EngineProcess,
    stored: &StoredEngine,
    mut parts: BTreeMap<EnginePart, Arc<OwnedFd>>,
    persistent: &Arc<PersistentState>,
    held: HeldEngine,
    known: &BTreeMap<u32, Descriptor>,
) -> Result<Box<Attached>, Box<Leftover>> {
    let sent = stored.sent.try_map(|number| known.get(number).cloned().ok_or(MissingDescriptor(*number)));
    let sent = match sent {
        Ok(sent) => sent,
        Err(error) => {
            tracing::error!(engine_pid = process.pid(), %error, "engine not usable");
            return Err(Box::new(Leftover::new(process, None, held)));
        }
    };
    let engine = Engine::restored(process, stored, &mut parts, persistent, held)?;
    // Above every node id, and different for each broker.
    let marker = 1 << 63 | monotonic_ns();
    match Attached::restored(engine, sent, marker) {
        Ok(engine) => Ok(Box::new(engine)),
        Err((engine, error)) => {
            tracing::error!(engine_pid = engine.process.pid(), %error, "engine not usable");
            let Engine { process, stash, held, .. } = *engine;
            Err(Box::new(Leftover::new(process, Some(stash), held)))
        }
    }
}
