//! Volumes as the loop sees them: further offers of a share, each at a socket in a directory of its own, which the broker
//! is handed. Who asks for them, and where they are remembered, is in [`crate::csi`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::hash::Hasher;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;
use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;
use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::control::{Endpoint, EndpointKind, SocketSpec};
use virtiofs_contract::preflight::{Finding, Preflight, Reason};

use crate::broker::client::{Client, ClientError};
use crate::notice::Notice;
use crate::observed::{Observed, Outcome};
use crate::offer::share_name;
use crate::report::{Report, ShareState};

/// Name of the socket in a volume's directory.
pub(crate) const SOCKET: &str = "virtiofs.sock";

/// The reason why a volume is not served whose share is not.
const NOT_SERVED: &str = "NotServed";

/// A volume that was published: what its pod asked for, whatever was or will be the default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Volume {
    /// What the kubelet calls it. A PersistentVolume has one for all pods that use it.
    pub(crate) volume_id: String,
    /// Its directory, which names it: no other volume has the same.
    pub(crate) target_path: PathBuf,
    /// The share.
    pub(crate) share: String,
    /// The directory below the share's that is served instead of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sub_path: Option<PathBuf>,
    /// The pod.
    pub(crate) namespace: String,
    pub(crate) pod: String,
    pub(crate) pod_uid: String,
    /// The group that the pod is to have access by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mount_group: Option<u32>,
    /// Has it been served? Then what its pod was permitted stays permitted.
    #[serde(default)]
    pub(crate) published: bool,
}

impl Volume {
    /// A short name for its directory.
    pub(crate) fn key(target_path: &Path) -> String {
        let mut hasher = SipHasher24::new();
        hasher.write(target_path.as_os_str().as_encoded_bytes());
        format!("v-{:016x}", hasher.finish())
    }

    /// Name of its endpoint.
    pub(crate) fn endpoint_name(&self) -> String {
        format!("{}.{}", self.share, Volume::key(&self.target_path))
    }

    /// Its endpoint, but for what follows from its share.
    pub(crate) fn endpoint(&self, name: &str) -> Endpoint {
        Endpoint {
            name: name.to_owned(),
            kind: EndpointKind::Volume,
            source: PathBuf::new(),
            sub_path: self.sub_path.clone(),
            socket: SocketSpec { path: self.target_path.join(SOCKET), owner: None, group: self.mount_group, mode: 0 },
            engine: EngineConfig::stock(Access::ReadOnly),
            exclusive: false,
            consumer: Some(format!("pod {}/{}", self.namespace, self.pod)),
        }
    }
}

/// The volumes of this node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Volumes {
    /// By the names of their endpoints.
    pub(crate) by_endpoint: BTreeMap<String, Volume>,
    /// Keys of those that are remembered in files that make no sense: they are left as they are.
    pub(crate) unreadable: BTreeSet<String>,
}

impl Volumes {
    /// Is there, or may there be, a volume with this endpoint?
    pub(crate) fn may_have(&self, endpoint: &str) -> bool {
        let key = endpoint.split_once('.').map_or("", |(_, key)| key);
        self.by_endpoint.contains_key(endpoint) || self.unreadable.contains(key)
    }

    /// The volume in this directory.
    pub(crate) fn at(&self, target_path: &Path) -> Option<&Volume> {
        self.by_endpoint.values().find(|volume| volume.target_path == target_path)
    }
}

/// True if this is the endpoint of a volume.
pub(crate) fn is_volume(endpoint: &Endpoint) -> bool {
    endpoint.kind == EndpointKind::Volume
}

/// How the endpoint of a volume is doing.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Standing {
    /// A VM may connect, or has done so.
    Listening,
    /// It is being brought about, or has not been tried yet.
    Waiting,
    /// It is not to be, for this reason. It is tried again.
    Refused(Notice),
    /// It is no volume any more, and on its way out.
    Leaving,
}

/// How all volumes are doing, and what is left of those that are no more.
pub(crate) fn standings(observed: &Observed, report: &Report) -> BTreeMap<String, Standing> {
    let Some(volumes) = &observed.volumes else { return BTreeMap::new() };
    let wanted = volumes.by_endpoint.keys().map(|name| (name.clone(), standing(name, observed, report)));
    let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
    let leaving = endpoints.filter(|it| is_volume(&it.endpoint) && !volumes.may_have(&it.endpoint.name));
    let leaving: Vec<_> = leaving.map(|it| (it.endpoint.name.clone(), Standing::Leaving)).collect();
    // What is being tried may be there in a moment.
    let busy = observed
        .efforts
        .iter()
        .filter(|(name, effort)| effort.busy_since.is_some() && is_volume_name(name) && !volumes.may_have(name));
    let busy = busy.map(|(name, _)| (name.clone(), Standing::Leaving));
    wanted.chain(leaving).chain(busy).collect()
}

/// Is this the name of a volume's endpoint?
pub(crate) fn is_volume_name(endpoint: &str) -> bool {
    endpoint.split_once('.').is_some_and(|(_, key)| key.starts_with("v-"))
}

fn standing(name: &str, observed: &Observed, report: &Report) -> Standing {
    let known = observed.endpoints.as_ref().and_then(|endpoints| endpoints.get(name));
    if known.is_some_and(|it| it.listening) {
        return Standing::Listening;
    }
    let in_use = known.is_some_and(|it| !it.sessions.is_empty());
    match report.shares.iter().find(|share| share.name == share_name(name)) {
        // Where it is served, it listens again in a moment.
        Some(share) if !matches!(share.state, ShareState::NotReady | ShareState::Draining) => {}
        // A share that was taken from a VM that has it is nothing that its pod would have to be told.
        _ if in_use => return Standing::Listening,
        Some(share) if share.state == ShareState::NotReady => {
            return share.notices.first().cloned().map_or(Standing::Waiting, Standing::Refused);
        }
        _ => {
            let remedy = "end the pod, or have an admin declare the share for this node again";
            return Standing::Refused(Notice::new(NOT_SERVED, "no VM may connect to it here any more", remedy));
        }
    }
    let effort = observed.efforts.get(name);
    if effort.is_some_and(|effort| effort.busy_since.is_some()) {
        return Standing::Waiting;
    }
    match effort.and_then(|effort| effort.attempt.as_ref()).map(|attempt| &attempt.outcome) {
        Some(Outcome::Refused(finding)) => Standing::Refused(Notice::from(finding)),
        _ => Standing::Waiting,
    }
}

/// Has the broker serve a volume in its directory. It blocks.
pub(crate) fn apply(socket: &Path, endpoint: &Endpoint) -> Result<Preflight, ClientError> {
    let path = endpoint.socket.path.parent().unwrap_or(Path::new("/"));
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let directory = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|error| {
        ClientError::Refused(Finding {
            reason: Reason::SocketUnavailable,
            message: format!("directory {} of the volume: {error}", path.display()),
            remedy: "the kubelet makes it anew when it publishes the volume again".to_owned(),
        })
    })?;
    // What is found when all of a share is tried holds for the volume as well.
    let reuse_preflight_of = endpoint.sub_path.is_none().then(|| share_name(&endpoint.name).to_owned());
    Client::connect(socket)?.apply_in(endpoint.clone(), directory.as_fd(), reuse_preflight_of)
}

#[cfg(test)]
pub(crate) mod tests {
    use virtiofs_contract::control::EndpointStatus;

    use super::*;
    use crate::desired::Desired;
    use crate::desired::tests::{declared, desired};
    use crate::plan::tests::{listening, site};
    use crate::report::report;
    use crate::report::tests::session;

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

    pub(crate) fn volumes<const N: usize>(volumes: [Volume; N]) -> Volumes {
        let by_endpoint = volumes.into_iter().map(|volume| (volume.endpoint_name(), volume)).collect();
        Volumes { by_endpoint, unreadable: BTreeSet::new() }
    }

    #[test]
    fn how_a_volume_is_doing_follows_from_its_endpoint_and_its_share() {
        let now = std::time::Instant::now();
        let volume = volume("a", "one");
        let name = volume.endpoint_name();
        let listens = || listening(volume.endpoint(&name));
        let stand = |desired: &Desired, endpoints: Vec<EndpointStatus>, known: bool| {
            let mut observed = Observed::default();
            let known = if known { volumes([volume.clone()]) } else { Volumes::default() };
            observed.hear(now, Some(&crate::plan::tests::status(1, endpoints)));
            observed.mount(Some(known));
            observed.remember(now, desired);
            let report = report(now, &site(), desired, &observed);
            standings(&observed, &report).remove(&name)
        };
        let (shared, none) = (desired([declared("a", "/srv/a")]), Desired::default());
        let mut deaf = listens();
        deaf.listening = false;
        let used = EndpointStatus { sessions: vec![session("a.v-1")], ..deaf.clone() };
        assert_eq!(stand(&shared, vec![], true), Some(Standing::Waiting));
        assert_eq!(stand(&shared, vec![listens()], true), Some(Standing::Listening));
        assert_eq!(stand(&shared, vec![deaf], true), Some(Standing::Waiting));
        assert_eq!(stand(&shared, vec![used.clone()], true), Some(Standing::Waiting), "it is about to listen again");
        assert_eq!(stand(&none, vec![used], true), Some(Standing::Listening), "its VM goes on");
        assert!(matches!(stand(&none, vec![], true), Some(Standing::Refused(notice)) if notice.reason == NOT_SERVED));
        assert_eq!(stand(&shared, vec![listens()], false), Some(Standing::Leaving));
        assert_eq!(stand(&shared, vec![], false), None);
    }

    #[test]
    fn a_volume_is_known_by_its_directory_and_its_endpoint_belongs_to_its_share() {
        let (one, two) = (volume("images", "one"), volume("images", "two"));
        assert_ne!(one.endpoint_name(), two.endpoint_name());
        assert_eq!(share_name(&one.endpoint_name()), "images");
        assert!(is_volume_name(&one.endpoint_name()) && !is_volume_name("images.vm-7") && !is_volume_name("images"));
        let all = volumes([one.clone()]);
        assert_eq!(all.at(&one.target_path), Some(&one));
        assert_eq!(all.at(&two.target_path), None);
        let mut lost = all.clone();
        lost.unreadable.insert(Volume::key(&two.target_path));
        assert!(lost.may_have(&two.endpoint_name()) && !all.may_have(&two.endpoint_name()));
    }
}
