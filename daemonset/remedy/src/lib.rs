//! What to do about staleness: a pure function of (policy, history, observation, now).
//!
//! Nothing here has a clock, a file or a socket. The caller observes the broker, calls [`decide`], stores the returned
//! history (serializable, so another process can store it while the caller is down), and executes the decision.
//!
//! | module | |
//! |---|---|
//! | [`policy`] | what a share allows |
//! | [`observation`] | what is observed of it |
//! | [`escalation`] | the remedies for each cause, and their order |
//! | [`history`] | what was counted, tried and changed so far |
//! | [`decide`](mod@decide) | the decision |
//! | [`transition`] | changes of state, for logs |
//! | [`advice`] | what a person can do where no remedy helps |
//!
//! # Guarantees
//! Whatever is observed, in whatever order, with whatever gaps:
//! - at most `budget` remedies are started in any hour, rejected ones included;
//! - one remedy at a time, and each of them ends;
//! - the history is bounded;
//! - with [`Mode::Report`] nothing is started, and what was changed is reverted.

pub mod advice;
pub mod decide;
pub mod escalation;
pub mod history;
mod moment;
pub mod observation;
pub mod policy;
mod recent;
mod track;
pub mod transition;

pub use advice::{Exhausted, Failure};
pub use decide::{CauseStatus, Command, Decision, Handling, decide};
pub use escalation::{Amendment, Blocker, Remedy};
pub use history::History;
pub use moment::Moment;
pub use observation::{Content, Observation, Root, Session};
pub use policy::{Mode, Policy, Window};
pub use transition::{Outcome, Transition};
pub use virtiofs_contract::staleness::Cause;
