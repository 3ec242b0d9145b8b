//! A cluster as a source of desired state and a sink of status: reads the spec of this node's exports and writes their
//! status.
//!
//! ```text
//! exports of this node ──source──> Desired ──> reconcile loop ──Pass──> export_status (pure) ──sink──> status of exports
//!                         |  ^
//!                    last good, in the runtime directory
//! ```

mod export_status;
pub(crate) mod exports;
mod last_good;
mod recoveries;
mod sink;
mod source;

pub(crate) use exports::Exports;
pub(crate) use sink::Sink;
pub(crate) use source::follow;
