//! Preflight: an engine tries, inside its sandbox, what its configuration needs, and reports the result.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use virtiofs_config::{InodeFileHandles, Limits, Sandbox};

/// Why a share cannot be served, or not as configured. Conditions, metrics and logs use the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Reason {
    /// The source does not exist.
    SourceMissing,
    /// The source is not a directory.
    SourceNotDirectory,
    /// The source, or a directory on its path, cannot be searched or read.
    SourceUnreadable,
    /// The source must not be shared: it is on a kernel file system, or overlaps the runtime directory.
    SourceForbidden,
    /// The share is writable, but its source is on a read-only file system.
    SourceReadOnly,
    /// A capability that the configuration needs is missing.
    CapabilityMissing,
    /// File handles do not work here; inodes are held by file descriptors instead.
    FileHandlesUnavailable,
    /// The configuration requires file handles, and they do not work here.
    FileHandlesRequired,
    /// A file system of the share has no stable directory positions: a directory listing that is in progress while the
    /// engine is replaced may miss or repeat entries.
    DirectoryPositionsUnstable,
    /// The configured sandbox cannot be built here.
    SandboxUnavailable,
    /// The sandbox hides other mounts of the broker from guests, but not from an engine that a guest has taken over.
    SandboxWeak,
    /// The limit of open files leaves too few for the guest.
    OpenFileLimitTooLow,
    /// The socket could not be created at its path.
    SocketUnavailable,
    /// The configuration changes what the guest negotiated at FUSE_INIT: it becomes active when the guest mounts again.
    RemountRequired,
    /// The engine could not be started, or exited before it replied.
    EngineFailed,
    /// The engine does not quiesce, or does not exit: a request is stuck in the source.
    EngineStuck,
    /// The source is released, so that the host can unmount it; guests wait until it is resumed.
    SourceReleased,
    /// The source cannot be released: guests have orphaned files open (no name leads to them) and would lose them.
    OrphanedFilesOpen,
    /// The engine runs as an ordinary user: other users of a guest cannot create files.
    GuestUsersRestricted,
    /// A configured limit is not active: the host's cgroups do not allow it.
    LimitUnavailable,
}

impl Reason {
    /// The name used in conditions, metrics and logs.
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
            Reason::SandboxWeak => "SandboxWeak",
            Reason::OpenFileLimitTooLow => "OpenFileLimitTooLow",
            Reason::SocketUnavailable => "SocketUnavailable",
            Reason::RemountRequired => "RemountRequired",
            Reason::EngineFailed => "EngineFailed",
            Reason::EngineStuck => "EngineStuck",
            Reason::SourceReleased => "SourceReleased",
            Reason::OrphanedFilesOpen => "OrphanedFilesOpen",
            Reason::GuestUsersRestricted => "GuestUsersRestricted",
            Reason::LimitUnavailable => "LimitUnavailable",
        }
    }
}

/// One problem that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// Kind of the problem.
    pub reason: Reason,
    /// What was found, on which object, with which value.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} ({})", self.reason.as_str(), self.message, self.remedy)
    }
}

/// Result of trying file handles on one file system of the share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HandleOutcome {
    /// A regular file was opened by its handle.
    Works,
    /// The file system has no file handles.
    Unsupported,
    /// Opening by handle was denied: `CAP_DAC_READ_SEARCH` is missing, or holds only in a user namespace.
    NotPermitted,
    /// A directory was opened by its handle; no regular file was found to try.
    DirectoryOnly,
    /// Not tried: the configuration is `Never`.
    NotTried,
}

/// Result for one file system of the share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MountPreflight {
    /// Mount point relative to the share's root; `.` is the root itself.
    pub path: String,
    /// Type of the file system, as the kernel names it.
    pub fs_type: String,
    /// Result of trying file handles.
    pub file_handles: HandleOutcome,
}

/// What confines an engine that a guest has taken over, besides the system call filter and the dropped capabilities.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Confinement {
    /// True if it is the first process of a PID namespace of its own: it can name no other process.
    pub pid_namespace: bool,
    /// True if no file outside the source can be opened by a path, whatever descriptors it starts from.
    pub source_only: bool,
    /// Version of the kernel's Landlock that is enforced; 0: none.
    pub landlock_abi: u32,
}

/// Result of a preflight. Everything in it was tried, not deduced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Preflight {
    /// The sandbox that was built.
    pub sandbox: Sandbox,
    /// True if the sandbox has a user namespace of its own (an engine without root).
    pub user_namespace: bool,
    /// What else confines it.
    #[serde(default)]
    pub confinement: Confinement,
    /// Capabilities read back from the kernel after the others were dropped, by name without `CAP_`.
    pub capabilities: Vec<String>,
    /// How inodes are referred to, as tried.
    pub inode_file_handles: InodeFileHandles,
    /// Results, one for each file system of the share.
    pub mounts: Vec<MountPreflight>,
    /// Active limit of open files.
    pub open_files: u64,
    /// Number of them that the guest may use.
    pub guest_open_files: u64,
    /// Active limits, read back from the kernel.
    #[serde(default)]
    pub limits: Limits,
    /// Problems that do not prevent the share from being served.
    pub findings: Vec<Finding>,
}
