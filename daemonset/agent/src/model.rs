//! Plain data: what is desired, what is observed, and what a reconcile pass found. No I/O and no decisions; nothing here
//! uses any other part of the agent.
//!
//! | file | |
//! |---|---|
//! | `desired.rs`, `site.rs` | the shares to serve; where this host's sockets and manifests are |
//! | `source.rs` | sources and what a probe found of them |
//! | `endpoint.rs` | the endpoints at which a share is to be served |
//! | `volume.rs` | pods' volumes |
//! | `action.rs` | what can be done, and what came of it |
//! | `observed.rs` | everything observed so far, and how it is updated |
//! | `pass.rs` | the result of one reconcile pass, for every sink |

pub(crate) mod action;
pub(crate) mod desired;
pub(crate) mod endpoint;
pub(crate) mod losses;
pub(crate) mod observed;
pub(crate) mod pass;
pub(crate) mod site;
pub(crate) mod source;
pub(crate) mod volume;
