//! The broker: a vhost-user back-end to every VMM, a front-end to each one's engine, and on no guest's path.
//!
//! | module | |
//! |---|---|
//! | `control`, `broker`, `endpoint` | what the agent asks for: places where VMMs connect |
//! | `endpoint_watch` | whether a source is still the directory that is served |
//! | `session` | one VMM: its record, its engine, its answers |
//! | `record` | what a VMM has set up; what an engine must be told; both pure |
//! | `engine` | processes that serve, and the directory they serve |
//! | `vhost_user` | the protocol between all of them |
//! | `store` | what the agent has the broker keep |
//! | `listen`, `runtime_dir` | sockets and directories on this host |
//! | `descriptor`, `guest_memory` | what a VMM hands in, and the one thing read from it |
//! | `mailbox`, `poll` | waiting |

mod broker;
mod control;
mod descriptor;
mod endpoint;
mod endpoint_watch;
mod endpoints;
mod engine;
mod guest_memory;
mod limits;
mod listen;
mod mailbox;
mod poll;
mod record;
mod run;
mod runtime_dir;
mod session;
mod store;
mod vhost_user;

pub use run::{Config, RunError, run};
