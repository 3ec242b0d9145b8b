//! Decisions: pure functions of desired and observed state. No I/O, no clock.
//!
//! | file | decides |
//! |---|---|
//! | `plan.rs` | what to do next |
//! | `overlap.rs` | which sources must not be served next to each other |
//! | `report.rs` | the state of each share |
//! | `volumes.rs` | the state of each volume |
//! | `remedies.rs` | what to do about staleness, with the crate `virtiofs-remedy` |
//! | `backoff.rs` | how long to wait after failures |

pub(crate) mod backoff;
mod overlap;
pub(crate) mod plan;
pub(crate) mod remedies;
pub(crate) mod report;
pub(crate) mod volumes;
