//! The states of an engine in a session. Each transition consumes the state it leaves.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use virtiofs_contract::engine::Predecessor;

use super::{DeviceState, EngineEvent, Role, Signal};
use crate::engine::attached::{AttachError, Attached};
use crate::engine::fd_stash::StashServer;
use crate::engine::process::EngineProcess;
use crate::engine::start::{Leftover, START_DEADLINE};
use crate::record::journal::Journal;

/// Time within which no thread of a killed engine may be able to touch a ring any more.
const KILL_DEADLINE: Duration = Duration::from_secs(2);

/// The guest's number of mounts and of unmounts.
pub(super) type Mounts = (u64, u64);

/// Why an engine was lost.
#[derive(Debug)]
pub(super) enum LossCause {
    /// The process exited, or closed its control channel.
    Exited,
    /// It could not be used any more, and was killed.
    Error(AttachError),
}

impl fmt::Display for LossCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LossCause::Exited => f.write_str("it exited"),
            LossCause::Error(error) => write!(f, "{error}"),
        }
    }
}

/// An engine that is being started by a thread of its own.
#[derive(Debug)]
pub(super) struct Starting {
    /// When it left the queue of starts.
    pub(super) begun: Arc<OnceLock<Instant>>,
    pub(super) overdue: bool,
    /// The guest's mounts when it was requested.
    pub(super) mounts: Mounts,
    /// True if it must not be used, because the [`Predecessor`] that it received is no longer true.
    pub(super) discard: bool,
}

impl Starting {
    /// When it becomes overdue; while it waits in the queue, when to look again.
    pub(super) fn deadline(&self, now: Instant) -> Instant {
        self.begun.get().map_or(now + START_DEADLINE, |begun| *begun + START_DEADLINE)
    }
}

/// A prepared engine without rings.
#[derive(Debug)]
pub(super) struct Standby {
    pub(super) engine: Box<Attached>,
    /// The guest's mounts when its start was requested.
    pub(super) mounts: Mounts,
}

/// The engine that has the rings.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) engine: Box<Attached>,
    pub(super) since: Instant,
}

/// An engine that is quiesced and whose rings are stopped.
#[derive(Debug)]
pub(super) struct Stopped(Serving);

/// Lost engines of which a thread is still in a system call, so that it could still touch a ring.
#[derive(Debug)]
pub(super) struct Terminating(Remains);

/// Lost engines that cannot touch a ring any more.
#[derive(Debug)]
pub(super) struct Dead(Remains);

/// What is left of lost engines.
#[derive(Debug)]
enum Remains {
    /// The engine that this broker knew.
    Engine(Box<Attached>),
    /// Engines of an earlier broker: more than one if it ended during a hand-over.
    Leftovers(Vec<Leftover>),
}

impl Remains {
    fn processes(&self) -> Vec<&EngineProcess> {
        match self {
            Remains::Engine(engine) => vec![&engine.engine.process],
            Remains::Leftovers(engines) => engines.iter().map(|engine| &engine.process).collect(),
        }
    }

    fn drain_stash(&self) {
        match self {
            Remains::Engine(engine) => engine.engine.stash.drain(),
            Remains::Leftovers(engines) => {
                engines.iter().filter_map(|engine| engine.stash.as_ref()).for_each(StashServer::drain);
            }
        }
    }

    fn is_over(&self) -> bool {
        self.processes().iter().all(|process| process.is_over())
    }

    /// Kills all and waits, at most this long in total.
    fn stop_for_good(&self, longest: Duration) -> bool {
        let end = Instant::now() + longest;
        let left = || end.saturating_duration_since(Instant::now());
        // All are killed before any is awaited.
        match self {
            Remains::Engine(engine) => engine.engine.kill(),
            Remains::Leftovers(engines) => engines.iter().for_each(|engine| engine.process.kill()),
        }
        self.processes().iter().all(|process| process.stop_for_good(left()).is_ok())
    }
}

/// Result of killing an engine.
#[derive(Debug)]
pub(super) enum Killed {
    Dead(Dead),
    Terminating(Terminating),
}

impl Killed {
    /// The last line that the engine logged, as the end of a message.
    pub(super) fn last_line(&mut self, session: &str) -> String {
        let (Killed::Dead(Dead(remains)) | Killed::Terminating(Terminating(remains))) = self;
        match remains {
            Remains::Engine(engine) => engine.engine.last_line(session),
            Remains::Leftovers(_) => String::new(),
        }
    }

    fn remains(remains: Remains) -> Self {
        match remains.stop_for_good(KILL_DEADLINE) {
            true => Killed::Dead(Dead(remains)),
            false => Killed::Terminating(Terminating(remains)),
        }
    }

    /// Kills engines of an earlier broker.
    pub(super) fn leftovers(engines: Vec<Leftover>) -> Self {
        Killed::remains(Remains::Leftovers(engines))
    }
}

/// An attempt to stop the rings of an engine that failed.
#[derive(Debug)]
pub(super) enum StopFailed {
    /// The engine did not quiesce in time; it can resume.
    NotQuiesced(Stopped, AttachError),
    /// It is unknown which rings it serves; it must be killed.
    Lost(Serving, AttachError),
}

impl Standby {
    /// Gives the rings to the engine, which notifies the guest.
    ///
    /// # Errors
    /// The engine and the error. It may serve rings already ([`Attached::serves`]).
    pub(super) fn take_rings(mut self, device: &mut DeviceState<'_>) -> Result<Serving, (Box<Attached>, AttachError)> {
        match self.engine.sync(device.record, device.journal) {
            Ok(()) => Ok(Serving::new(self.engine)),
            Err(error) => Err((self.engine, error)),
        }
    }
}

impl Serving {
    pub(super) fn new(engine: Box<Attached>) -> Self {
        Serving { engine, since: Instant::now() }
    }

    /// Stops the rings between two requests.
    pub(super) fn stop_rings(mut self, deadline: Duration, journal: &mut Journal) -> Result<Stopped, StopFailed> {
        match self.engine.stop_rings(deadline, journal) {
            Ok(()) => Ok(Stopped(self)),
            Err(error) if error.can_resume() => Err(StopFailed::NotQuiesced(Stopped(self), error)),
            Err(error) => Err(StopFailed::Lost(self, error)),
        }
    }

    /// Kills the engine.
    pub(super) fn kill(self) -> Killed {
        Killed::remains(Remains::Engine(self.engine))
    }
}

impl Stopped {
    pub(super) fn pid(&self) -> u32 {
        self.0.engine.engine.process.pid()
    }

    /// Handles its last requests to the fd stash.
    pub(super) fn drain_stash(&self) {
        self.0.engine.engine.stash.drain();
    }

    /// Serves again.
    ///
    /// # Errors
    /// The engine must be killed.
    pub(super) fn resume(mut self, device: &mut DeviceState<'_>) -> Result<Serving, (Serving, AttachError)> {
        match self.0.engine.resume_rings(device.record, device.journal) {
            Ok(()) => Ok(self.0),
            Err(error) => Err((self.0, error)),
        }
    }
}

impl Terminating {
    /// A process that has not ended.
    pub(super) fn pid(&self) -> u32 {
        let processes = self.0.processes();
        let running = processes.iter().find(|process| !process.is_over());
        running.or(processes.first()).map_or(0, |process| process.pid())
    }

    /// Checks whether its last thread has left its system call.
    pub(super) fn check(self) -> Killed {
        if self.0.is_over() { Killed::Dead(Dead(self.0)) } else { Killed::Terminating(self) }
    }
}

impl Dead {
    /// Handles its last requests to the fd stash and returns how it ended. Its process is reaped in the background.
    pub(super) fn reap(self) -> Predecessor {
        self.0.drain_stash();
        let fates: Vec<Predecessor> = self.0.processes().iter().map(|process| process.fate()).collect();
        // Of two, the one that died of a fault matters.
        fates.iter().copied().find(|fate| *fate == Predecessor::Faulted).unwrap_or(Predecessor::Killed)
    }
}

/// The events of an engine to wait for.
pub(super) fn watched(role: Role, engine: &Attached) -> impl Iterator<Item = (EngineEvent, BorrowedFd<'_>)> {
    let event = move |signal| EngineEvent { role, signal };
    let engine = &engine.engine;
    let exited = engine.process.exit_fds().map(move |fd| (event(Signal::Exited), fd));
    let log = engine.log.fd().map(|fd| (event(Signal::Log), fd));
    std::iter::once((event(Signal::Message), engine.control.as_fd())).chain(exited).chain(log)
}

/// Handles events of an engine. Returns true if the engine is lost.
pub(super) fn handle(engine: &mut Attached, role: Role, events: &[EngineEvent], session: &str) -> bool {
    let has = |signal| events.contains(&EngineEvent { role, signal });
    if has(Signal::Log) {
        engine.engine.log.drain(session);
    }
    has(Signal::Exited) || has(Signal::Message) && engine.receive_late().is_err()
}
