//! What all endpoints of a broker share.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::endpoint::supervisor::Supervisor;
use crate::engine::process::ProcessTable;
use crate::engine::start::Starter;
use crate::holder::names::{Group, Part};
use crate::holder::{Hold, Holder, Parts};
use crate::session_list::SessionList;
use crate::state_file::{StateFile, StateFileError};

/// Most bytes of [`Identity`].
const MOST: usize = 4096;

/// What the brokers of a host have in common that follow each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    /// Number of this series of brokers: their counts continue.
    instance: u64,
    /// Serial number of the next endpoint or session.
    next: u64,
}

/// What all endpoints share.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) starter: Arc<Starter>,
    pub(crate) engines: Arc<ProcessTable>,
    pub(crate) holder: Holder,
    pub(crate) list: Arc<SessionList>,
    pub(crate) supervisor: Supervisor,
    identity: Mutex<(StateFile<Identity>, Identity)>,
}

impl Host {
    /// `parts`: what the holder has of an earlier broker.
    pub(crate) fn new(
        starter: Arc<Starter>,
        engines: Arc<ProcessTable>,
        holder: Holder,
        list: SessionList,
        supervisor: Supervisor,
        parts: &mut Parts,
    ) -> Result<Self, StateFileError> {
        let held = parts.remove(&Part::State).map(|fd| StateFile::open(fd.try_clone()?)).transpose();
        let identity = match held {
            Ok(Some(identity)) => identity,
            Ok(None) => new_identity(&holder.group(Group::Broker))?,
            Err(error) => {
                tracing::error!(%error, "state of the earlier broker not read");
                holder.group(Group::Broker).remove(Part::State);
                new_identity(&holder.group(Group::Broker))?
            }
        };
        Ok(Host { starter, engines, holder, list: Arc::new(list), supervisor, identity: Mutex::new(identity) })
    }

    fn identity(&self) -> MutexGuard<'_, (StateFile<Identity>, Identity)> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of this series of brokers. Another one means that counts begin at zero.
    pub(crate) fn instance(&self) -> u64 {
        self.identity().1.instance
    }

    /// A serial number that no endpoint, session or engine has.
    pub(crate) fn next_serial(&self) -> u64 {
        let (file, identity) = &mut *self.identity();
        let serial = identity.next;
        identity.next += 1;
        if let Err(error) = file.write(identity) {
            tracing::warn!(%error, "serial number not recorded");
        }
        serial
    }

    /// Uses no serial number up to this one.
    pub(crate) fn skip_serials(&self, used: u64) {
        let (_, identity) = &mut *self.identity();
        identity.next = identity.next.max(used + 1);
    }
}

fn new_identity(hold: &Hold) -> Result<(StateFile<Identity>, Identity), StateFileError> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // JavaScript and JSON tools keep 53 bits of an integer; microseconds fit.
    let identity = Identity { instance: since.as_micros() as u64, next: 1 };
    let mut file = StateFile::create("virtiofs-broker", MOST)?;
    file.write(&identity)?;
    hold.deposit_copy(Part::State, &file)?;
    Ok((file, identity))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_file::check_layout;

    #[test]
    fn identity_is_stored_in_the_layout_of_its_version() {
        check_layout("identity", &Identity { instance: 1_750_000_000_000_000, next: 7 });
    }
}
