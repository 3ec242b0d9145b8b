//! The broker: a vhost-user back-end to every VMM and a front-end to the engine of each. Guest requests do not pass
//! through it.
//!
//! | module | |
//! |---|---|
//! | `control`, `broker`, `endpoint` | requests of the agent; sockets that VMMs connect to |
//! | `session_list` | the sessions that exist |
//! | `source_watch` | detects that the path of a source leads to another directory |
//! | `holder` | descriptors that outlive the broker, and what to do with them afterwards |
//! | `state_file` | a value in a memfd that the next broker reads |
//! | `session` | one VMM: its record, its engines, its replies |
//! | `engine` | engine processes, the directory they serve, the state that outlives them |
//! | `record` | the vhost-user state of a VMM, and the messages an engine still needs; pure, except for its memfd |
//! | `vhost_user` | the protocol |
//! | `status_page` | the status in pages of a bounded size |
//! | `store` | the key-value store of the agent |
//! | `listen`, `runtime_dir` | sockets and directories of the host |
//! | `standby`, `readiness` | waits until another broker ends, and says whether it could take over |
//! | `await_engines` | the end of a broker whose engines serve until they are replaced |
//! | `descriptor`, `guest_memory` | descriptors that a VMM sends, and used indexes read from its memory |
//! | `disposal`, `interrupt` | closes descriptors that others made, on threads that nothing waits for |
//! | `channel`, `poll`, `rate`, `blocking` | waiting |
//! | `fault` | places at which tests end the broker |
//!
//! Imports point down: `session` uses `engine`, `engine` uses `record` and `vhost_user`, never the other way.

/// Implements `From` for a variant that displays its cause. thiserror's `#[from]` would expose the cause as `source` too,
/// and a printed chain would show it twice.
macro_rules! from_cause {
    ($error:ident::$variant:ident($cause:ty)) => {
        impl From<$cause> for $error {
            fn from(cause: $cause) -> Self {
                $error::$variant(cause)
            }
        }
    };
}

mod await_engines;
mod blocking;
mod broker;
mod channel;
mod control;
mod control_group;
mod descriptor;
mod disposal;
mod endpoint;
mod engine;
mod fault;
mod guest_memory;
mod holder;
mod interrupt;
mod limits;
mod listen;
mod poll;
mod rate;
mod readiness;
mod record;
mod run;
mod runtime_dir;
mod session;
mod session_list;
mod source_watch;
mod standby;
mod state_file;
mod status_page;
mod store;
mod vhost_user;

pub use await_engines::{await_engines, become_waiting};
pub use holder::{HolderChoice, HolderError};
pub use readiness::read_readiness;
pub use run::{Config, End, RunError, block_ending_signals, run};
