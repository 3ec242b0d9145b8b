//! Engine processes: the directory they serve, their start, their end, and the state that outlives them.
//!
//! | module | |
//! |---|---|
//! | [`source`] | opens the shared directory so that no guest can redirect it |
//! | [`mount_point`] | the file system that the source is on |
//! | [`root`] | detects that a path leads to another directory |
//! | [`fork`] | starts the program in a PID namespace of its own |
//! | [`process`] | engine processes: start, detection of death, end |
//! | [`kill_switch`] | kills all processes of a session, from any thread |
//! | [`limits`] | host resources that an engine may use |
//! | [`log`] | log lines of an engine, read without blocking it |
//! | [`unknown_fields`] | what a newer broker has stored and this one does not know |
//! | [`start_queue`] | the order in which engines start |
//! | [`start`] | from a configuration to an engine that is ready, or a finding |
//! | [`attached`] | an engine that is kept in sync with a session's record |
//! | [`persistent`] | the state of a session that outlives its engines |
//! | [`fd_stash`] | open files that outlive their engine |

pub(crate) mod attached;
pub(crate) mod fd_stash;
mod fork;
pub(crate) mod kill_switch;
pub(crate) mod limits;
pub(crate) mod log;
pub(crate) mod mount_point;
pub(crate) mod persistent;
pub(crate) mod process;
pub(crate) mod root;
pub(crate) mod source;
pub(crate) mod start;
pub(crate) mod start_queue;
pub(crate) mod unknown_fields;

use virtiofs_contract::preflight::{Finding, Reason};

/// Builds a finding.
pub(crate) fn finding(reason: Reason, message: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { reason, message: message.into(), remedy: remedy.into() }
}
