//! A broker that stands by: another one has the runtime directory. Until it ends, this one touches none of its sockets,
//! tries its own engines on what is served, and says whether it is ready.

mod trial;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use nix::sys::signalfd::SignalFd;
use thiserror::Error;

use crate::poll::{Interest, wait_readable};
use crate::readiness::{Readiness, Role};
use crate::runtime_dir::{RuntimeDir, RuntimeDirError, StandbyLock, UnlockedDir};
pub(crate) use trial::Trial;

/// Interval at which a broker that is ready tries the lock.
const TRY_LOCK: Duration = Duration::from_millis(2);

/// Interval at which one that is not ready does.
const TRY_LOCK_UNREADY: Duration = Duration::from_millis(20);

/// Time for which the lock must be free before a broker takes it that is not ready: a broker that served may be started
/// again meanwhile.
const UNREADY_PATIENCE: Duration = Duration::from_secs(15);

/// Why a broker cannot stand by.
#[derive(Debug, Error)]
pub enum StandbyError {
    /// The lock cannot be used.
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
    /// A thread or a descriptor of signals could not be set up.
    #[error("set-up: {0}")]
    SetUp(std::io::Error),
}

from_cause!(StandbyError::SetUp(std::io::Error));

/// Waits until the runtime directory is free and takes it; none: this broker is to end.
pub(crate) fn stand_by(
    directory: &UnlockedDir,
    signals: &SigSet,
    trial: Trial,
    readiness: &Arc<Readiness>,
) -> Result<Option<RuntimeDir>, StandbyError> {
    let ending = SignalFd::new(signals).map_err(std::io::Error::from)?;
    tracing::info!(runtime_dir = %directory.path().display(), "another broker serves; this one stands by");
    trial.run_in_background(readiness.clone())?;
    let mut standby_lock = None;
    let mut free = FreeSince::default();
    loop {
        let ready = readiness.has_passed();
        update_lock(&mut standby_lock, ready, directory)?;
        // Not before: the broker that ends relies on it.
        readiness.set_role(if ready { Role::Standby } else { Role::Starting });
        let now = Instant::now();
        match directory.lock() {
            Ok(lock) if ready || free.has_lasted(now) => return Ok(Some(lock)),
            // Released again at once.
            Ok(_) => {}
            Err(RuntimeDirError::Held { .. }) => free = FreeSince::default(),
            Err(error) => return Err(error.into()),
        }
        let pause = if ready { TRY_LOCK } else { TRY_LOCK_UNREADY };
        if wait_readable(&[Interest::of(&ending)], Some(now + pause))?[0] {
            return Ok(None);
        }
    }
}

/// Since when nobody has the lock.
#[derive(Debug, Default)]
struct FreeSince(Option<Instant>);

impl FreeSince {
    /// True once the lock was found free for long.
    fn has_lasted(&mut self, now: Instant) -> bool {
        now.duration_since(*self.0.get_or_insert(now)) >= UNREADY_PATIENCE
    }
}

fn update_lock(held: &mut Option<StandbyLock>, ready: bool, directory: &UnlockedDir) -> Result<(), RuntimeDirError> {
    match (ready, &held) {
        (true, None) => *held = Some(directory.stand_by()?),
        (false, Some(_)) => *held = None,
        _ => {}
    }
    Ok(())
}
