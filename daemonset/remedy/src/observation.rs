//! What is seen of a share.

use std::collections::BTreeMap;

use virtiofs_config::EngineConfig;
use virtiofs_contract::preflight::Preflight;

use crate::Cause;

/// A share as it is now.
#[derive(Clone, Debug)]
pub struct Observation<'a> {
    /// Which broker counts, by its process id: another one begins from nought.
    pub broker: u32,
    /// Stale events by cause, of all sessions, since that broker started. Of a source that hangs there are none:
    /// see [`Session::hung`].
    pub counts: BTreeMap<Cause, u64>,
    /// The configuration that the share declares.
    pub declared: &'a EngineConfig,
    /// What the share says is true of its data.
    pub content: Content,
    /// What the last trial of the share found.
    pub preflight: &'a Preflight,
    /// Sessions whose guests have mounted or may do so.
    pub sessions: Vec<Session<'a>>,
    /// What is at the source's path now.
    pub root: Root,
}

/// What a share says is true of its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Nobody changes it.
    Immutable,
    /// Nobody but one guest changes it.
    Exclusive,
    /// Anyone may change it.
    Shared,
}

/// One session as it is now.
#[derive(Clone, Copy, Debug)]
pub struct Session<'a> {
    /// Its name, unique among all that this broker has had.
    pub id: &'a str,
    /// Which order the engine that serves fulfils: each exchange, each change of configuration is one.
    pub generation: u64,
    /// Configuration of the engine that serves.
    pub engine: &'a EngineConfig,
    /// What that engine found.
    pub preflight: Option<&'a Preflight>,
    /// Does its guest hold as many inodes as it may?
    pub full: bool,
    /// Does the source's path lead to something else than what it serves?
    pub gone: bool,
    /// Has a request of its guest been going on for longer than is reasonable?
    pub hung: bool,
}

/// What is at the source's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Root {
    /// A directory with something in it, or a mount point with its mount.
    Present,
    /// An empty directory that is no mount point: what is left when a file system has been unmounted.
    Bare,
    /// No directory, or one that cannot be looked at.
    Missing,
}

#[cfg(test)]
pub(crate) mod samples {
    use virtiofs_config::{Access, InodeFileHandles, Sandbox};
    use virtiofs_contract::preflight::{HandleOutcome, MountPreflight};

    use super::*;
    use crate::Rung;

    /// A share on ext4 where everything works, with one session; 2000 open files.
    pub(crate) struct Place {
        pub(crate) declared: EngineConfig,
        pub(crate) content: Content,
        pub(crate) preflight: Preflight,
        pub(crate) full: bool,
    }

    impl Default for Place {
        fn default() -> Self {
            let mount = MountPreflight { path: ".".into(), fs_type: "ext4".into(), file_handles: HandleOutcome::Works };
            let preflight = serde_json::json!({
                "sandbox": Sandbox::Chroot, "userNamespace": false, "capabilities": [],
                "inodeFileHandles": InodeFileHandles::Prefer, "mounts": [mount],
                "openFiles": 2000, "guestOpenFiles": 1700, "findings": [],
            });
            Place {
                declared: EngineConfig::stock(Access::ReadOnly),
                content: Content::Shared,
                preflight: serde_json::from_value(preflight).unwrap(),
                full: false,
            }
        }
    }

    impl Place {
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

    pub(crate) fn files(to: u64) -> Rung {
        Rung::OpenFiles { to: Some(to) }
    }
}
