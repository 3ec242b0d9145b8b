//! Writes what the next broker needs to know about a session, before this one acts on it.

use std::convert::Infallible;
use std::io;

use thiserror::Error;

use crate::descriptor::Descriptor;
use crate::fault;
use crate::holder::Hold;
use crate::holder::names::Part;
use crate::record::SessionRecord;
use crate::record::store::{MessageState, Progress, RingOwner, Stored};
use crate::state_file::{StateFile, StateFileError};

/// Most bytes of a stored session: several times the size of the largest.
const MOST: usize = 256 << 10;

/// Why a record could not be written. Displays its cause, so it has no `source`.
#[derive(Debug, Error)]
#[error("session record: {0}")]
pub(crate) struct JournalError(StateFileError);

impl From<StateFileError> for JournalError {
    fn from(cause: StateFileError) -> Self {
        JournalError(cause)
    }
}

impl From<io::Error> for JournalError {
    fn from(cause: io::Error) -> Self {
        JournalError(cause.into())
    }
}

/// The journal of one session.
#[derive(Debug)]
pub(crate) struct Journal {
    file: StateFile<Stored>,
    /// What was written last.
    stored: Stored,
}

impl Journal {
    /// Creates the journal of a new session and deposits it.
    pub(crate) fn create(stored: Stored, hold: &Hold) -> Result<Self, JournalError> {
        let mut file = StateFile::create("virtiofs-session", MOST)?;
        file.write(&stored)?;
        hold.deposit_copy(Part::Record, &file)?;
        hold.account().deposit_copy(Part::Record, &file)?;
        Ok(Journal { file, stored })
    }

    /// Continues the journal of an earlier broker.
    pub(crate) fn restored(file: StateFile<Stored>, stored: Stored) -> Self {
        Journal { file, stored }
    }

    /// Writes the record.
    pub(crate) fn write(&mut self, record: &SessionRecord<Descriptor>) -> Result<(), JournalError> {
        let Ok(record) = record.try_map(|descriptor| Ok::<u32, Infallible>(descriptor.number()));
        self.change(|stored| stored.record = record)
    }

    /// Writes the record, and how far the handling of a message is.
    pub(crate) fn write_message(
        &mut self,
        record: &SessionRecord<Descriptor>,
        message: MessageState,
    ) -> Result<(), JournalError> {
        let Ok(record) = record.try_map(|descriptor| Ok::<u32, Infallible>(descriptor.number()));
        self.change(|stored| {
            stored.record = record;
            stored.message = message;
        })
    }

    /// An engine is about to be changed, replaced or killed: until [`Journal::settle`], it is unknown who has the rings.
    pub(crate) fn begin_change(&mut self) -> Result<(), JournalError> {
        self.change(|stored| stored.rings = RingOwner::Unknown)
    }

    /// Writes who has the rings, and what has changed with the engines.
    pub(crate) fn settle(&mut self, rings: RingOwner, progress: Progress) -> Result<(), JournalError> {
        self.change(|stored| {
            stored.rings = rings;
            stored.progress = progress;
        })
    }

    fn change(&mut self, change: impl FnOnce(&mut Stored)) -> Result<(), JournalError> {
        let mut stored = self.stored.clone();
        change(&mut stored);
        if stored != self.stored {
            fault::step();
            self.file.write(&stored)?;
            fault::step();
            self.stored = stored;
        }
        Ok(())
    }
}
