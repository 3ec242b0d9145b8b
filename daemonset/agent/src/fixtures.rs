//! Samples of the agent's data, for tests.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use virtiofs_client::fixtures::status;
use virtiofs_client::runtime_dir::RuntimeDir;
use virtiofs_contract::control::EndpointStatus;
use virtiofs_contract::preflight::Finding;
use virtiofs_crds::Share;

use crate::model::action::{Attempt, Outcome, Progress};
use crate::model::desired::Desired;
use crate::model::endpoint::own_endpoint;
use crate::model::observed::Observed;
use crate::model::site::Site;
use crate::model::source::{Probe, Source, SourceState};
use crate::model::volume::{Volume, Volumes};

/// A share with this name and source; everything else is default.
pub(crate) fn declared(name: &str, source: &str) -> Share {
    let document = json!({
        "apiVersion": "virtiofs.dev/v1alpha1",
        "kind": "VirtiofsShare",
        "metadata": {"name": name},
        "spec": {"source": {"hostPath": {"path": source}}},
    });
    Share::from_value(&document).unwrap().1
}

/// The desired state with these shares.
pub(crate) fn desired<const N: usize>(shares: [Share; N]) -> Desired {
    let shares = shares.into_iter().map(|share| (share.name.to_string(), share)).collect();
    Desired { shares, ..Desired::default() }
}

/// Paths of a host.
pub(crate) fn site() -> Site {
    Site { runtime_dir: RuntimeDir::at(Path::new("/run/virtiofs")), manifests: None }
}

/// A directory.
pub(crate) fn source(path: &str, inode: u64) -> Source {
    Source { path: PathBuf::from(path), identity: (1, inode) }
}

/// What is known of one share's source, and was done about its own endpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct ShareProgress {
    pub(crate) source: SourceState,
    pub(crate) progress: Progress,
}

impl ShareProgress {
    /// The same after this attempt.
    pub(crate) fn tried(mut self, attempt: Attempt) -> Self {
        self.progress.attempt = Some(attempt);
        self
    }

    /// The same while a trial runs on this source.
    pub(crate) fn busy(mut self, since: Instant, source: &str) -> Self {
        (self.progress.busy_since, self.progress.trial) = (Some(since), Some(source.into()));
        self
    }
}

/// A share whose source was probed, with this result.
pub(crate) fn probed(at: Instant, found: Result<Source, Finding>) -> ShareProgress {
    let pinned = found.as_ref().ok().map(|source| source.path.clone());
    let probe = Some(Probe { at, found, bare: false, space: None });
    ShareProgress { source: SourceState { probe, pinned, ..SourceState::default() }, ..ShareProgress::default() }
}

/// A share whose source is there.
pub(crate) fn present(at: Instant, path: &str) -> ShareProgress {
    probed(at, Ok(source(path, 2)))
}

/// The state of a host with these endpoints and shares.
pub(crate) fn observed(endpoints: Vec<EndpointStatus>, shares: Vec<(&str, ShareProgress)>) -> Observed {
    let mut observed = Observed::default();
    observed.update_status(Instant::now(), 0, Some(&status(1, endpoints)));
    for (name, share) in shares {
        observed.sources.insert(name.to_owned(), share.source);
        observed.progress.insert(name.to_owned(), share.progress);
    }
    observed
}

/// An attempt to apply the own endpoint of a share from `/srv/a`.
pub(crate) fn attempt(at: Instant, share: &Share, repeated: u32, outcome: Outcome) -> Attempt {
    let source = source("/srv/a", 2);
    Attempt { at, endpoint: own_endpoint(&site().runtime_dir, share, &source), source, repeated, outcome }
}

/// A volume of this share in a directory of this name.
pub(crate) fn volume(share: &str, directory: &str) -> Volume {
    Volume {
        volume_id: format!("csi-{directory}"),
        target_path: Path::new("/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi").join(directory).join("mount"),
        share: share.into(),
        sub_path: None,
        namespace: "vms".into(),
        pod: "vm-1".into(),
        pod_uid: "u".into(),
        mount_group: None,
        published: false,
    }
}

/// The volumes of a node.
pub(crate) fn volumes<const N: usize>(volumes: [Volume; N]) -> Volumes {
    let by_endpoint = volumes.into_iter().map(|volume| (volume.endpoint_name(), volume)).collect();
    Volumes { by_endpoint, unreadable: BTreeSet::new() }
}
