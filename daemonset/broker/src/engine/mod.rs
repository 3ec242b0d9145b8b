//! Engine processes: found, started with nothing but what they need, talked to, and gone for certain.
//!
//! | module | |
//! |---|---|
//! | [`source`] | the shared directory, opened so that no guest can lead it astray |
//! | [`mount_point`] | which file system that is on |
//! | [`process`] | fork, exec, death |
//! | [`limits`] | what an engine may use of the host |
//! | [`log`] | what an engine prints, without ever making it wait |
//! | [`start`] | from a configuration to an engine that is ready, or a finding |
//! | [`attached`] | an engine brought into line with a session's record |

pub(crate) mod attached;
pub(crate) mod limits;
pub(crate) mod log;
pub(crate) mod mount_point;
pub(crate) mod process;
pub(crate) mod root;
pub(crate) mod source;
pub(crate) mod start;

use virtiofs_contract::preflight::{Finding, Reason};

/// A finding in its three parts.
pub(crate) fn finding(reason: Reason, message: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { reason, message: message.into(), remedy: remedy.into() }
}
