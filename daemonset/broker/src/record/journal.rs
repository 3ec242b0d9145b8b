//! Writes a session's record to its memfd.

use thiserror::Error;

use crate::descriptor::Descriptor;
use crate::record::SessionRecord;
use crate::record::store::{RecordStore, StoreError, Stored};

/// Why a record could not be written. Displays its cause, so it has no `source`.
#[derive(Debug, Error)]
#[error("session record: {0}")]
pub(crate) struct JournalError(StoreError);

impl From<StoreError> for JournalError {
    fn from(cause: StoreError) -> Self {
        JournalError(cause)
    }
}

/// Writes the record of one session before the broker acts on it.
#[derive(Debug)]
pub(crate) struct Journal {
    store: RecordStore,
    session: String,
    endpoint: String,
}

impl Journal {
    pub(crate) fn create(session: &str, endpoint: &str) -> Result<Self, JournalError> {
        Ok(Journal { store: RecordStore::create()?, session: session.into(), endpoint: endpoint.into() })
    }

    pub(crate) fn write(&mut self, record: &SessionRecord<Descriptor>) -> Result<(), JournalError> {
        let record = record.try_map(|descriptor| Ok::<u32, StoreError>(descriptor.number()))?;
        let stored = Stored { session: self.session.clone(), endpoint: self.endpoint.clone(), record };
        Ok(self.store.write(&stored)?)
    }
}
