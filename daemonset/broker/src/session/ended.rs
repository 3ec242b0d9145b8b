//! What is counted of a session that has ended.

use virtiofs_contract::counters::{Counters, Totals};

use super::restore::RestoreError;
use super::shared::Shared;
use crate::engine::persistent::missing;
use crate::holder::Parts;
use crate::holder::names::Part;
use crate::record::store::Stored;
use crate::state_file::StateFile;

/// Counts of a session that has ended.
#[derive(Clone, Debug)]
pub(crate) struct EndedSession {
    /// True if the VMM has sent a valid message.
    pub(crate) begun: bool,
    pub(crate) engines_started: u64,
    pub(crate) totals: Totals,
}

impl EndedSession {
    /// A session of this broker.
    pub(crate) fn of(shared: &Shared) -> Self {
        let view = shared.view().clone();
        EndedSession { begun: view.begun, engines_started: view.engines_started, totals: shared.totals() }
    }

    /// A session of an earlier broker, and the name of its endpoint.
    ///
    /// # Errors
    /// Record or counter page are not held or not readable.
    pub(crate) fn read(parts: &Parts) -> Result<(String, Self), RestoreError> {
        let take = |part| parts.get(&part).ok_or_else(|| missing(part));
        let (record, page) = (take(Part::Record)?, take(Part::Counters)?);
        let (_, Stored { endpoint, progress, .. }) = StateFile::<Stored>::open(record.try_clone()?)?;
        let totals = Totals { replacements: progress.replacements, ..Counters::map(page)?.totals() };
        let ended = EndedSession { begun: progress.begun, engines_started: progress.engines_started, totals };
        Ok((endpoint, ended))
    }
}
