//! How each share of a host is doing: what the agent reports to every sink, be it a terminal, a file, a metric or an
//! API server.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_contract::preflight::Reason;
use virtiofs_crds::Refusal;

use crate::notice::{Notice, NoticeReason};
use crate::staleness::ShareStaleness;

/// State of a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ShareState {
    /// Nothing is known yet.
    Pending,
    /// Served as declared.
    Ready,
    /// Served, but not exactly as declared; the notices say how and why.
    Degraded,
    /// Not served to VMs that connect now; the notices say why.
    NotReady,
    /// No longer declared; VMs that were connected are still served.
    Draining,
}

impl ShareState {
    /// The name in status, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            ShareState::Pending => "Pending",
            ShareState::Ready => "Ready",
            ShareState::Degraded => "Degraded",
            ShareState::NotReady => "NotReady",
            ShareState::Draining => "Draining",
        }
    }

    /// True if a VM may connect and work.
    pub fn serves(self) -> bool {
        matches!(self, ShareState::Ready | ShareState::Degraded)
    }
}

/// One share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShareReport {
    /// Name of the share.
    pub name: String,
    /// Its state.
    pub state: ShareState,
    /// Why it is not `Ready`.
    #[serde(default)]
    pub notices: Vec<Notice>,
    /// The source as declared.
    pub source: PathBuf,
    /// Its socket.
    pub socket: PathBuf,
}

impl ShareReport {
    /// True if a new VM may connect and use its files now: the share serves and its source is not released.
    pub fn admits(&self) -> bool {
        let released = NoticeReason::Finding(Reason::SourceReleased);
        self.state.serves() && self.notices.iter().all(|notice| notice.reason != released)
    }
}

/// All shares of this host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// True if a broker answers.
    pub broker: bool,
    /// True if no broker has answered for longer than one takes to start.
    #[serde(default)]
    pub silent: bool,
    /// Shares in order of their names.
    pub shares: Vec<ShareReport>,
    /// Staleness of declared shares, by name.
    #[serde(default)]
    pub staleness: BTreeMap<String, ShareStaleness>,
    /// Documents that were rejected.
    pub problems: Vec<Problem>,
}

/// A declaration that was rejected.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// The file that contains it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Which document of that file, counted from 1; 0 for the file as a whole.
    #[serde(default)]
    pub document: usize,
    /// The share it declares, if the document names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<String>,
    /// Path of the field; empty for the document as a whole.
    pub field: String,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl From<&Refusal> for Problem {
    fn from(refusal: &Refusal) -> Self {
        Problem {
            file: refusal.origin.as_ref().map(|origin| origin.file.clone()),
            document: refusal.origin.as_ref().map_or(0, |origin| origin.document),
            share: refusal.share.clone(),
            field: refusal.field.clone(),
            message: refusal.message.clone(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}", file.display())?;
            if self.document > 0 {
                write!(f, ", document {}", self.document)?;
            }
            f.write_str(": ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}
