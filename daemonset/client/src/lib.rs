//! What the agent and `virtiofsctl` share on a node.
//!
//! | module | |
//! |---|---|
//! | [`broker`] | client of the broker's control socket |
//! | [`endpoint`] | names of endpoints: which share, and which kind |
//! | [`runtime_dir`] | paths in the runtime directory, and the lock that admits one agent |
//! | [`report`], [`notice`], [`staleness`] | how each share is doing, as the agent reports it |
//! | [`published`] | that report as a file, for readers without an agent |
//! | [`observation`] | what the remedy policy observes of sessions |
//! | [`totals`] | counts of the broker, summed over restarts |
//! | [`metrics`] | the Prometheus families, made from report and counts |
//! | [`text`], [`errno`] | how values, untrusted text and error numbers are shown |

pub mod broker;
pub mod endpoint;
pub mod errno;
pub mod metrics;
pub mod notice;
pub mod observation;
pub mod published;
pub mod report;
pub mod runtime_dir;
pub mod staleness;
pub mod text;
pub mod totals;

#[cfg(any(test, feature = "fixtures"))]
#[allow(clippy::unwrap_used)]
pub mod fixtures;
