//! What is observed of a share.

use std::collections::BTreeMap;

use virtiofs_config::EngineConfig;
use virtiofs_contract::preflight::Preflight;

use crate::Cause;

/// A share as observed now.
#[derive(Clone, Debug)]
pub struct Observation<'a> {
    /// Process id of the broker that counts; a new broker starts from zero.
    pub broker: u64,
    /// Stale events by cause, of all sessions, since that broker started. A source that hangs is not counted: see
    /// [`Session::hung`].
    pub counts: BTreeMap<Cause, u64>,
    /// The configuration that the share declares.
    pub declared: &'a EngineConfig,
    /// The declared content.
    pub content: Content,
    /// What the last trial of the share found.
    pub preflight: &'a Preflight,
    /// Sessions whose guests have mounted or may do so.
    pub sessions: Vec<Session<'a>>,
    /// What is at the source's path now.
    pub root: Root,
}

/// The declared content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Nobody changes it.
    Immutable,
    /// Nobody but one guest changes it.
    Exclusive,
    /// Anyone may change it.
    Shared,
}

/// One session as observed now.
#[derive(Clone, Copy, Debug)]
pub struct Session<'a> {
    /// Its id, unique in this broker.
    pub id: &'a str,
    /// Generation of the engine that serves it; each hand-over and each change of the configuration raises it.
    pub generation: u64,
    /// Configuration of the engine that serves.
    pub engine: &'a EngineConfig,
    /// What that engine found.
    pub preflight: Option<&'a Preflight>,
    /// True if its guest is at its inode limit.
    pub full: bool,
    /// True if the source's path leads to something other than what it serves.
    pub gone: bool,
    /// True if a request of its guest hangs.
    pub hung: bool,
}

/// What is at the source's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Root {
    /// A directory with content, or a mount point.
    Present,
    /// An empty directory that is no mount point, as an unmounted file system leaves.
    Bare,
    /// No directory, or one that cannot be read.
    Missing,
}

#[cfg(test)]
pub(crate) mod samples {
    use virtiofs_config::{Access, InodeFileHandles, Sandbox};
    use virtiofs_contract::preflight::{HandleOutcome, MountPreflight};

    use super::*;
    use crate::Remedy;

    /// A share on ext4 where everything works, with one session; 2000 open files.
    pub(crate) struct SampleShare {
        pub(crate) declared: EngineConfig,
        pub(crate) content: Content,
        pub(crate) preflight: Preflight,
        pub(crate) full: bool,
    }

    impl Default for SampleShare {
        fn default() -> Self {
            let mount = MountPreflight { path: ".".into(), fs_type: "ext4".into(), file_handles: HandleOutcome::Works };
            let preflight = serde_json::json!({
                "sandbox": Sandbox::Chroot, "userNamespace": false, "capabilities": [],
                "inodeFileHandles": InodeFileHandles::Prefer, "mounts": [mount],
                "openFiles": 2000, "guestOpenFiles": 1700, "findings": [],
            });
            SampleShare {
                declared: EngineConfig::stock(Access::ReadOnly),
                content: Content::Shared,
                preflight: serde_json::from_value(preflight).unwrap(),
                full: false,
            }
        }
    }

    impl SampleShare {
        pub(crate) fn observe(&self) -> Observation<'_> {
            let session = Session {
                id: "a-1",
                generation: 1,
                engine: &self.declared,
                preflight: Some(&self.preflight),
                full: self.full,
                gone: false,
                hung: false,
            };
            Observation {
                broker: 1,
                counts: BTreeMap::new(),
                declared: &self.declared,
                content: self.content,
                preflight: &self.preflight,
                sessions: vec![session],
                root: Root::Present,
            }
        }
    }

    pub(crate) fn files(to: u64) -> Remedy {
        Remedy::OpenFiles { to: Some(to) }
    }
}
