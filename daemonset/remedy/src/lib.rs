//! What to do about staleness: a pure function of (policy, history, observation, now).
//!
//! Nothing here has a clock, a file or a socket. Whoever calls it looks at the broker, asks [`decide`], keeps the
//! history that comes back (it is plain data, and can be kept by somebody else while the caller dies), and does what
//! the decision says.
//!
//! | module | |
//! |---|---|
//! | [`policy`] | what a share allows |
//! | [`observation`] | what is seen of it |
//! | [`ladder`] | which remedies there are for a cause, and in what order |
//! | [`history`] | what has been counted, tried and changed so far |
//! | [`decide`](mod@decide) | the decision |
//! | [`advice`] | what somebody has to do where no remedy helps |
//!
//! # Guarantees
//! Whatever is observed, in whatever order, with whatever gaps:
//! - at most `budget` remedies are begun in any hour, refused ones included;
//! - one remedy at a time, and each comes to an end;
//! - the history is bounded;
//! - with [`Mode::Report`] nothing is begun, and what was changed is taken back.

pub mod advice;
pub mod decide;
pub mod history;
pub mod ladder;
mod moment;
pub mod observation;
pub mod policy;
mod recent;
mod track;

pub use advice::{End, Failure};
pub use decide::{Act, Change, Course, Decision, Standing, decide};
pub use history::{History, Outcome};
pub use ladder::Rung;
pub use moment::Moment;
pub use observation::{Content, Observation, Root, Session};
pub use policy::{Mode, Policy, Window};
pub use virtiofs_contract::staleness::Cause;
