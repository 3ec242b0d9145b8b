//! States of a session.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// State of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum SessionState {
    /// The VMM is setting the device up.
    Connecting,
    /// The guest's driver has started the rings; requests are served.
    Serving,
    /// The rings are stopped (the VM is paused, or its driver is not loaded).
    Stopped,
    /// The engine has died; another one is about to take over.
    Recovering,
    /// The source is released; the guest waits until it is resumed.
    Released,
    /// There is no engine, and none is expected soon; see the finding.
    Failed,
}

impl SessionState {
    /// All states.
    pub const ALL: [SessionState; 6] = [
        SessionState::Connecting,
        SessionState::Serving,
        SessionState::Stopped,
        SessionState::Recovering,
        SessionState::Released,
        SessionState::Failed,
    ];

    /// The name used in status, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            SessionState::Connecting => "Connecting",
            SessionState::Serving => "Serving",
            SessionState::Stopped => "Stopped",
            SessionState::Recovering => "Recovering",
            SessionState::Released => "Released",
            SessionState::Failed => "Failed",
        }
    }
}
