//! What an engine found when it tried, inside its sandbox, what its configuration asks for.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{InodeFileHandles, Limits, Sandbox};

/// Why a share cannot be served, or not as asked. The same word stands in conditions, metrics and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Reason {
    /// The source does not exist.
    SourceMissing,
    /// The source is not a directory.
    SourceNotDirectory,
    /// The source, or a path on the way to it, may not be entered or read.
    SourceUnreadable,
    /// The source is a place that must never be shared: a kernel file system or the runtime directory.
    SourceForbidden,
    /// The share is writable, but its source is on a read-only file system.
    SourceReadOnly,
    /// A capability that the configuration needs is missing.
    CapabilityMissing,
    /// File handles do not work here; inodes are held by file descriptors instead.
    FileHandlesUnavailable,
    /// The configuration demands file handles, and they do not work here.
    FileHandlesRequired,
    /// A file system of the share does not keep positions in a directory, so a listing that a guest has begun may
    /// miss or repeat entries when its engine is exchanged in the middle of it.
    DirectoryPositionsUnstable,
    /// The sandbox that was asked for cannot be built here.
    SandboxUnavailable,
    /// The limit of open files leaves too few for a guest.
    OpenFilesTooFew,
    /// The socket could not be made where it was asked for.
    SocketUnavailable,
    /// The configuration changes what the guest agreed on when it mounted: it can be in force at its next mount.
    NextMount,
    /// The engine could not be started, or ended before it answered.
    EngineFailed,
    /// The engine does not come to rest, or does not end: a request is stuck in the source.
    EngineStuck,
    /// The source was released, so that the host can unmount it; guests wait until it is taken up again.
    SourceReleased,
    /// The source cannot be released without guests losing files: they have files open that no name leads to.
    FilesHeld,
    /// A limit that was asked for is not in force: the host's cgroups do not allow it.
    LimitUnavailable,
}

impl Reason {
    /// The word as it stands in conditions, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::SourceMissing => "SourceMissing",
            Reason::SourceNotDirectory => "SourceNotDirectory",
            Reason::SourceUnreadable => "SourceUnreadable",
            Reason::SourceForbidden => "SourceForbidden",
            Reason::SourceReadOnly => "SourceReadOnly",
            Reason::CapabilityMissing => "CapabilityMissing",
            Reason::FileHandlesUnavailable => "FileHandlesUnavailable",
            Reason::FileHandlesRequired => "FileHandlesRequired",
            Reason::DirectoryPositionsUnstable => "DirectoryPositionsUnstable",
            Reason::SandboxUnavailable => "SandboxUnavailable",
            Reason::OpenFilesTooFew => "OpenFilesTooFew",
            Reason::SocketUnavailable => "SocketUnavailable",
            Reason::NextMount => "NextMount",
            Reason::EngineFailed => "EngineFailed",
            Reason::EngineStuck => "EngineStuck",
            Reason::SourceReleased => "SourceReleased",
            Reason::FilesHeld => "FilesHeld",
            Reason::LimitUnavailable => "LimitUnavailable",
        }
    }
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Which kind of trouble.
    pub reason: Reason,
    /// What was found, with names and numbers.
    pub message: String,
    /// What would make it right.
    pub remedy: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} ({})", self.reason.as_str(), self.message, self.remedy)
    }
}

/// Did file handles work on one file system of the share?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HandleOutcome {
    /// A regular file was opened by its handle.
    Works,
    /// The file system makes no handles.
    Unsupported,
    /// A handle was made, but opening by it was refused: `CAP_DAC_READ_SEARCH` is missing or is one of a
    /// user namespace.
    NotPermitted,
    /// No regular file was found to try it on; the directory itself worked.
    DirectoryOnly,
    /// Not tried: the configuration says never.
    NotTried,
}

/// What was found on one file system of the share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MountPreflight {
    /// Mount point relative to the share's root; `.` is the root itself.
    pub path: String,
    /// Type of the file system, as the kernel names it.
    pub fs_type: String,
    /// Did file handles work?
    pub file_handles: HandleOutcome,
}

/// What an engine found when it tried. Everything here was done, not deduced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Preflight {
    /// The sandbox that was built.
    pub sandbox: Sandbox,
    /// Is the sandbox's user namespace one of the engine's own (an engine without root)?
    pub user_namespace: bool,
    /// Capabilities read back from the kernel after the others were dropped, by name without `CAP_`.
    pub capabilities: Vec<String>,
    /// How inodes are referred to, after trying.
    pub inode_file_handles: InodeFileHandles,
    /// What was found, one per file system of the share.
    pub mounts: Vec<MountPreflight>,
    /// Limit of open files in force.
    pub open_files: u64,
    /// How many of them a guest may use.
    pub guest_open_files: u64,
    /// Limits in force, read back from the kernel.
    #[serde(default)]
    pub limits: Limits,
    /// What is not as it should be, but does not keep the share from being served.
    pub findings: Vec<Finding>,
}
