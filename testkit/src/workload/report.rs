//! Results of a workload: failures by kind, with the details needed to reproduce them.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::fuse::call::CallError;
use crate::virtio::queue::QueueError;

/// Number of failures with details. All failures are counted.
const KEPT: usize = 64;

/// Kind of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Kind {
    /// An errno instead of success.
    UnexpectedError,
    /// Another errno than expected.
    WrongError,
    /// Success instead of an errno: the operation was done twice, or on another file.
    MissingError,
    /// File contents.
    WrongBytes,
    /// Attributes, link counts, extended attributes, link targets.
    WrongAttributes,
    /// A directory listing without an existing name, or with one that does not exist.
    WrongListing,
    /// A node id of another file, or one that changed while it was held.
    WrongNode,
    /// The host's directory differs from what the guest received.
    HostDiffers,
    /// A reply or a ring that breaks the protocol.
    Protocol,
    /// No reply in time.
    Hung,
    /// A reply without a call.
    LostWakeup,
    /// The back-end closed the connection, or the device was reset.
    Disconnected,
    /// A step of the script that the model does not support.
    Script,
}

/// A failure within a step.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Its kind.
    pub kind: Kind,
    /// Description.
    pub what: String,
    /// Number of wrong bytes.
    pub wrong_bytes: u64,
}

impl Fault {
    /// A fault without wrong bytes.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), wrong_bytes: 0 }
    }

    /// True if the lane cannot continue.
    pub fn is_fatal(&self) -> bool {
        matches!(self.kind, Kind::Hung | Kind::LostWakeup | Kind::Disconnected | Kind::Script)
    }
}

impl From<CallError> for Fault {
    fn from(error: CallError) -> Self {
        let kind = match &error {
            CallError::Errno { .. } => Kind::UnexpectedError,
            CallError::Protocol { .. } => Kind::Protocol,
            CallError::Queue { source, .. } => match source {
                QueueError::LostWakeup { .. } => Kind::LostWakeup,
                QueueError::Hung { .. } | QueueError::Full { .. } => Kind::Hung,
                QueueError::Disconnected { .. } | QueueError::Reset { .. } => Kind::Disconnected,
                QueueError::TooLong { .. } | QueueError::Memory(_) | QueueError::Event { .. } => Kind::Script,
            },
        };
        Self::new(kind, error.to_string())
    }
}

/// A fault with its context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// The lane's directory.
    pub lane: String,
    /// The seed of the lane.
    pub seed: u64,
    /// Number of the step in the lane.
    pub step: u64,
    /// The step.
    pub op: String,
    /// Its kind.
    pub kind: Kind,
    /// Description.
    pub what: String,
}

/// What a workload did, and its failures.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Number of steps.
    pub steps: u64,
    /// Number of steps by operation.
    pub by_op: BTreeMap<String, u64>,
    /// Number of steps that failed with the expected errno.
    pub refused: u64,
    /// Number of failures by kind.
    pub by_kind: BTreeMap<Kind, u64>,
    /// Number of wrong bytes.
    pub wrong_bytes: u64,
    /// Number of bytes that were read and compared.
    pub compared_bytes: u64,
    /// The first failures.
    pub failures: Vec<Failure>,
}

impl Report {
    /// Number of failures.
    pub fn errors(&self) -> u64 {
        self.by_kind.values().sum()
    }

    /// True if there are no failures.
    pub fn is_clean(&self) -> bool {
        self.errors() == 0 && self.wrong_bytes == 0
    }

    /// Counts a failure.
    pub fn record(&mut self, failure: Failure, wrong_bytes: u64) {
        *self.by_kind.entry(failure.kind).or_default() += 1;
        self.wrong_bytes += wrong_bytes;
        if self.failures.len() < KEPT {
            self.failures.push(failure);
        }
    }

    /// Counts a step.
    pub fn count(&mut self, op: &str) {
        self.steps += 1;
        match self.by_op.get_mut(op) {
            Some(count) => *count += 1,
            None => drop(self.by_op.insert(op.to_owned(), 1)),
        }
    }

    /// Adds another lane's report.
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.refused += other.refused;
        self.wrong_bytes += other.wrong_bytes;
        self.compared_bytes += other.compared_bytes;
        for (op, count) in &other.by_op {
            *self.by_op.entry(op.clone()).or_default() += count;
        }
        for (kind, count) in &other.by_kind {
            *self.by_kind.entry(*kind).or_default() += count;
        }
        let room = KEPT.saturating_sub(self.failures.len());
        self.failures.extend(other.failures.iter().take(room).cloned());
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} steps ({} rejected as expected), {} bytes compared: {} errors, {} wrong bytes",
            self.steps,
            self.refused,
            self.compared_bytes,
            self.errors(),
            self.wrong_bytes
        )?;
        for (kind, count) in &self.by_kind {
            write!(f, "\n  {kind:?}: {count}")?;
        }
        for failure in &self.failures {
            let Failure { lane, seed, step, op, kind, what } = failure;
            write!(f, "\n  {lane} seed {seed:#x} step {step}: {kind:?}: {op}: {what}")?;
        }
        Ok(())
    }
}
