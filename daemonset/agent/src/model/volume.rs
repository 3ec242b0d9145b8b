//! Pods' volumes as endpoints of a share, each with a socket in a directory of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hasher;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;
use virtiofs_client::endpoint::EndpointId;
use virtiofs_client::notice::Notice;
use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::control::{Endpoint, EndpointKind, SocketSpec};

/// Name of the socket in a volume's directory.
pub(crate) const SOCKET: &str = "virtiofs.sock";

/// A published volume: what its pod requested, independent of defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Volume {
    /// The kubelet's volume id. A PersistentVolume has one for all pods that use it.
    pub(crate) volume_id: String,
    /// Its directory, which identifies it.
    pub(crate) target_path: PathBuf,
    /// The share.
    pub(crate) share: String,
    /// The directory of the share to serve instead of all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sub_path: Option<PathBuf>,
    /// Namespace of the pod.
    pub(crate) namespace: String,
    /// Name of the pod.
    pub(crate) pod: String,
    /// Uid of the pod.
    pub(crate) pod_uid: String,
    /// The group by which the pod has access (`fsGroup`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mount_group: Option<u32>,
    /// True once it has been served. Its pod then keeps its permission.
    #[serde(default)]
    pub(crate) published: bool,
}

impl Volume {
    /// A short key for its directory.
    pub(crate) fn key(target_path: &Path) -> String {
        let mut hasher = SipHasher24::new();
        hasher.write(target_path.as_os_str().as_encoded_bytes());
        format!("{:016x}", hasher.finish())
    }

    /// Name of its endpoint.
    pub(crate) fn endpoint_name(&self) -> String {
        EndpointId::volume(&self.share, &Volume::key(&self.target_path)).to_string()
    }

    /// The part of its endpoint that does not follow from its share.
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
    /// Volumes by endpoint name.
    pub(crate) by_endpoint: BTreeMap<String, Volume>,
    /// Keys of volumes with invalid state files. Their endpoints are left as they are.
    pub(crate) unreadable: BTreeSet<String>,
}

impl Volumes {
    /// True if a volume with this endpoint exists or may exist.
    pub(crate) fn may_have(&self, endpoint: &str) -> bool {
        let id = EndpointId::parse(endpoint);
        let unreadable = id.kind == EndpointKind::Volume && self.unreadable.contains(id.key);
        unreadable || self.by_endpoint.contains_key(endpoint)
    }

    /// The volume in this directory.
    pub(crate) fn at(&self, target_path: &Path) -> Option<&Volume> {
        self.by_endpoint.values().find(|volume| volume.target_path == target_path)
    }
}

/// State of a volume's endpoint.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum VolumeState {
    /// A VM may connect, or is connected.
    Listening,
    /// Not applied yet.
    Waiting,
    /// Rejected for this reason. It is applied again later.
    Rejected(Notice),
    /// Not a volume any more; its sessions are ending.
    Terminating,
}

#[cfg(test)]
mod tests {
    use virtiofs_client::endpoint::{is_volume, share_of};

    use super::*;
    use crate::fixtures::{volume, volumes};

    #[test]
    fn a_volume_is_identified_by_its_directory() {
        let (one, two) = (volume("images", "one"), volume("images", "two"));
        assert_ne!(one.endpoint_name(), two.endpoint_name());
        assert_eq!(share_of(&one.endpoint_name()), "images");
        assert!(is_volume(&one.endpoint_name()));
        let all = volumes([one.clone()]);
        assert_eq!(all.at(&one.target_path), Some(&one));
        assert_eq!(all.at(&two.target_path), None);
        let mut lost = all.clone();
        lost.unreadable.insert(Volume::key(&two.target_path));
        assert!(lost.may_have(&two.endpoint_name()) && !all.may_have(&two.endpoint_name()));
    }
}
