//! A cluster as the source of what is to be served, and as a sink of how that goes: this node's exports, their spec
//! read and their status written. What lies between is the same as for a directory of manifests.
//!
//! ```text
//! exports of this node ──source──> Desired ──> the loop ──Turn──> answer (pure) ──sink──> status of exports
//!                          |  ^
//!                   last good, in the runtime directory
//! ```

mod answer;
pub(crate) mod exports;
mod last_good;
mod recoveries;
mod sink;
mod source;

pub(crate) use exports::Exports;
pub(crate) use sink::Sink;
pub(crate) use source::follow;
