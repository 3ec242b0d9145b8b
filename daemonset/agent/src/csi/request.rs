//! Parses a publish request: pure. Errors appear in the pod's events and are written for the author of the pod.

use std::path::{Component, Path, PathBuf};

use tonic::Status;
use virtiofs_crds::volume::{DRIVER, SHARE, SUB_PATH};
use virtiofs_crds::{ShareName, nearest};
use virtiofs_csi::v1::NodePublishVolumeRequest;
use virtiofs_csi::v1::volume_capability::AccessType;
use virtiofs_csi::v1::volume_capability::access_mode::Mode;

use crate::model::volume::Volume;

/// Prefix of the attributes that the kubelet adds.
const KUBELET: &str = "csi.storage.k8s.io/";
/// Attributes that the kubelet adds.
const ADDED: [&str; 6] =
    ["pod.name", "pod.namespace", "pod.uid", "serviceAccount.name", "serviceAccount.tokens", "ephemeral"];
/// Longest path below a share, in bytes.
const SUB_PATH_MAX: usize = 4000;

/// The kubelet's directory, as the kubelet names it.
#[derive(Clone, Debug)]
pub(crate) struct KubeletDir(PathBuf);

impl KubeletDir {
    /// `path` is absolute.
    pub(crate) fn new(path: PathBuf) -> Self {
        KubeletDir(path)
    }

    /// The plugin's own directory.
    pub(crate) fn plugin(&self) -> PathBuf {
        self.0.join("plugins").join(DRIVER)
    }

    /// The registration socket. The kubelet treats the path as a host name, for which the end of this one is valid.
    pub(crate) fn registration(&self) -> PathBuf {
        self.0.join("plugins_registry").join(format!("{DRIVER}-reg.sock@localhost"))
    }

    /// Directory of the pods.
    pub(super) fn pods(&self) -> PathBuf {
        self.0.join("pods")
    }

    /// The pod's uid if this is the path of a volume's directory: `pods/UID/volumes/kubernetes.io~csi/NAME/mount`.
    pub(super) fn pod_of<'a>(&self, target_path: &'a Path) -> Option<&'a str> {
        let below = target_path.strip_prefix(self.pods()).ok()?;
        let parts: Option<Vec<&str>> = below
            .components()
            .map(|part| match part {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .collect();
        // A path with `//` or `/./` has the same components, but identifies another volume.
        let normal = target_path.components().collect::<PathBuf>().as_os_str() == target_path.as_os_str();
        match parts?.as_slice() {
            [uid, "volumes", "kubernetes.io~csi", _, "mount"] if normal => Some(uid),
            _ => None,
        }
    }
}

/// An error if a field is empty.
pub(super) fn required(field: &str, value: &str) -> Result<(), Status> {
    match value {
        "" => Err(Status::invalid_argument(format!("{field} is missing"))),
        _ => Ok(()),
    }
}

/// The requested volume.
///
/// # Errors
/// `INVALID_ARGUMENT`, with the field and what would be right.
pub(super) fn publish(request: &NodePublishVolumeRequest, kubelet: &KubeletDir) -> Result<Volume, Status> {
    required("volume_id", &request.volume_id)?;
    required("target_path", &request.target_path)?;
    let mount_group = capability(request)?;
    if !request.readonly && !is_for_readers(request) {
        return Err(invalid(
            "the volume must be readOnly: true, or a PersistentVolume with accessModes: [ReadOnlyMany]. This concerns \
             the directory with the socket; the share's spec.access says whether a VM may write",
        ));
    }
    let target_path = PathBuf::from(&request.target_path);
    let uid = kubelet.pod_of(&target_path).ok_or_else(|| {
        let pods = kubelet.pods();
        invalid(&format!(
            "target_path {} is not that of a volume of a pod below {}",
            request.target_path,
            pods.display()
        ))
    })?;
    let pod = pod(request, uid)?;
    known_attributes(request)?;
    let share = request.volume_context.get(SHARE).ok_or_else(|| {
        invalid("the volume's attributes name no share: add share: NAME, the name of a VirtiofsShare")
    })?;
    let share = ShareName::parse(share).map_err(|refusal| invalid(&format!("attribute share: {}", refusal.message)))?;
    Ok(Volume {
        volume_id: request.volume_id.clone(),
        target_path,
        share: share.to_string(),
        sub_path: sub_path(request.volume_context.get(SUB_PATH))?,
        namespace: pod.namespace,
        pod: pod.name,
        pod_uid: pod.uid,
        mount_group,
        published: false,
    })
}

/// True for a read-only PersistentVolume. Some users of a claim cannot set `readOnly` on it, such as KubeVirt for its hooks,
/// and the kubelet does not pass on what the PersistentVolume declares.
fn is_for_readers(request: &NodePublishVolumeRequest) -> bool {
    let mode = request.volume_capability.as_ref().and_then(|capability| capability.access_mode);
    mode.is_some_and(|mode| mode.mode() == Mode::MultiNodeReaderOnly)
}

/// The group of the volume.
fn capability(request: &NodePublishVolumeRequest) -> Result<Option<u32>, Status> {
    let capability = request.volume_capability.as_ref().ok_or_else(|| invalid("volume_capability is missing"))?;
    let mount = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => {
            return Err(invalid("a share is no block device: set volumeMode: Filesystem, or omit it"));
        }
        None => return Err(invalid("volume_capability.access_type is missing")),
    };
    if !mount.mount_flags.is_empty() {
        return Err(invalid("mountOptions have no effect, because nothing is mounted on the node: remove them"));
    }
    if mount.volume_mount_group.is_empty() {
        return Ok(None);
    }
    let group = mount.volume_mount_group.parse();
    group.map(Some).map_err(|_| invalid(&format!("fsGroup {:?} is not a group number", mount.volume_mount_group)))
}

struct Pod {
    name: String,
    namespace: String,
    uid: String,
}

/// The pod, from the kubelet's attributes.
fn pod(request: &NodePublishVolumeRequest, uid: &str) -> Result<Pod, Status> {
    let attribute = |what: &str| {
        let value = request.volume_context.get(&format!("{KUBELET}{what}")).filter(|value| !value.is_empty());
        value.cloned().ok_or_else(|| {
            invalid(&format!("the kubelet does not pass {what}: the CSIDriver {DRIVER} must have podInfoOnMount: true"))
        })
    };
    let pod = Pod { name: attribute("pod.name")?, namespace: attribute("pod.namespace")?, uid: attribute("pod.uid")? };
    if pod.uid != uid {
        return Err(invalid(&format!("pod.uid {} is not that of target_path {}", pod.uid, request.target_path)));
    }
    Ok(pod)
}

/// Unknown attributes are rejected: one may be meant to restrict something.
fn known_attributes(request: &NodePublishVolumeRequest) -> Result<(), Status> {
    for key in request.volume_context.keys() {
        match key.strip_prefix(KUBELET) {
            Some(added) if ADDED.contains(&added) => {}
            Some(_) => {
                return Err(invalid(&format!("attribute {key}: {KUBELET}* is reserved for the kubelet; remove it")));
            }
            None if key == SHARE || key == SUB_PATH => {}
            None => {
                let guess = nearest(key, [SHARE, SUB_PATH]);
                let guess = guess.map(|near| format!(" Did you mean {near}?")).unwrap_or_default();
                return Err(invalid(&format!("attribute {key:?} is unknown; use share and subPath.{guess}")));
            }
        }
    }
    Ok(())
}

fn sub_path(given: Option<&String>) -> Result<Option<PathBuf>, Status> {
    let Some(given) = given else { return Ok(None) };
    let plain = given.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if !plain || given.len() > SUB_PATH_MAX || given.contains(char::is_control) {
        return Err(invalid(&format!(
            "attribute subPath: {given:?} is not a relative path such as images/base, without . and .., without // and \
             without / at either end"
        )));
    }
    Ok(Some(given.into()))
}

fn invalid(message: &str) -> Status {
    Status::invalid_argument(message)
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use virtiofs_csi::v1::VolumeCapability;
    use virtiofs_csi::v1::volume_capability::{AccessMode, BlockVolume, MountVolume};

    use super::*;

    const TARGET: &str = "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/data/mount";

    fn kubelet() -> KubeletDir {
        KubeletDir::new("/var/lib/kubelet".into())
    }

    fn good() -> NodePublishVolumeRequest {
        let context = [
            ("share", "images"),
            ("csi.storage.k8s.io/pod.name", "vm-1"),
            ("csi.storage.k8s.io/pod.namespace", "vms"),
            ("csi.storage.k8s.io/pod.uid", "u-1"),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ];
        NodePublishVolumeRequest {
            volume_id: "csi-1".into(),
            target_path: TARGET.into(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume::default())),
                access_mode: None,
            }),
            readonly: true,
            volume_context: context.into_iter().map(|(key, value)| (key.into(), value.into())).collect(),
        }
    }

    #[test]
    fn a_request_is_parsed() {
        let mut request = good();
        request.volume_context.insert("subPath".into(), "a/b".into());
        request.volume_capability.as_mut().unwrap().access_type =
            Some(AccessType::Mount(MountVolume { volume_mount_group: "107".into(), ..MountVolume::default() }));
        let volume = publish(&request, &kubelet()).unwrap();
        assert_eq!((volume.share.as_str(), volume.sub_path.as_deref()), ("images", Some(Path::new("a/b"))));
        assert_eq!((volume.namespace.as_str(), volume.pod.as_str(), volume.pod_uid.as_str()), ("vms", "vm-1", "u-1"));
        assert_eq!((volume.mount_group, volume.target_path.as_path()), (Some(107), Path::new(TARGET)));
        assert_eq!(publish(&good(), &kubelet()).unwrap().sub_path, None);
    }

    #[test]
    fn a_volume_is_read_only_by_use_or_by_access_mode() {
        let modes = [
            (None, false),
            (Some(Mode::MultiNodeReaderOnly), true),
            (Some(Mode::MultiNodeMultiWriter), false),
            (Some(Mode::SingleNodeWriter), false),
        ];
        for (mode, is_enough) in modes {
            let mut request = NodePublishVolumeRequest { readonly: false, ..good() };
            request.volume_capability.as_mut().unwrap().access_mode = mode.map(|mode| AccessMode { mode: mode.into() });
            assert_eq!(publish(&request, &kubelet()).is_ok(), is_enough, "{mode:?}");
            request.readonly = true;
            assert!(publish(&request, &kubelet()).is_ok(), "{mode:?}");
        }
    }

    #[test]
    fn an_invalid_request_is_rejected_with_its_field() {
        let capability = |access_type| Some(VolumeCapability { access_type, access_mode: None });
        let mount = |mount| capability(Some(AccessType::Mount(mount)));
        type Change = Box<dyn Fn(&mut NodePublishVolumeRequest)>;
        let put = |key: &'static str, value: &'static str| -> Change {
            Box::new(move |it| _ = it.volume_context.insert(key.into(), value.into()))
        };
        let without = |key: &'static str| -> Change { Box::new(move |it| _ = it.volume_context.remove(key)) };
        let target = |path: &'static str| -> Change { Box::new(move |it| it.target_path = path.into()) };
        let (flags, group) = (
            mount(MountVolume { mount_flags: vec!["ro".into()], ..MountVolume::default() }),
            mount(MountVolume { volume_mount_group: "vms".into(), ..MountVolume::default() }),
        );
        let block = capability(Some(AccessType::Block(BlockVolume {})));
        let table: Vec<(Change, &str)> = vec![
            (Box::new(|it| it.volume_id.clear()), "volume_id is missing"),
            (target(""), "target_path is missing"),
            (Box::new(|it| it.volume_capability = None), "volume_capability is missing"),
            (Box::new(move |it| it.volume_capability = capability(None)), "access_type is missing"),
            (Box::new(move |it| it.volume_capability = block.clone()), "volumeMode: Filesystem"),
            (Box::new(move |it| it.volume_capability = flags.clone()), "mountOptions"),
            (Box::new(move |it| it.volume_capability = group.clone()), "fsGroup \"vms\""),
            (Box::new(|it| it.readonly = false), "readOnly: true"),
            (target("/srv/elsewhere"), "is not that of a volume of a pod"),
            (target("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/data"), "is not that of a volume"),
            (target("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/../x/mount"), "is not that of a volume"),
            (target("/var/lib/kubelet/pods/u-1/volumes//kubernetes.io~csi/x/mount"), "is not that of a volume"),
            (target("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/x/mount/"), "is not that of a volume"),
            (without("csi.storage.k8s.io/pod.namespace"), "podInfoOnMount"),
            (without("csi.storage.k8s.io/pod.uid"), "podInfoOnMount"),
            (put("csi.storage.k8s.io/pod.uid", "u-2"), "pod.uid u-2 is not that of target_path"),
            (put("csi.storage.k8s.io/anything", "x"), "reserved for the kubelet"),
            (put("subpath", "a"), "Did you mean subPath?"),
            (put("hostPath", "/"), "attribute \"hostPath\" is unknown"),
            (without("share"), "add share: NAME"),
            (put("share", "Images"), "attribute share"),
            (put("share", "../x"), "attribute share"),
            (put("subPath", ""), "attribute subPath"),
            (put("subPath", "/etc"), "attribute subPath"),
            (put("subPath", "a/../../etc"), "attribute subPath"),
            (put("subPath", "a/./b"), "attribute subPath"),
            (put("subPath", "a\nb"), "attribute subPath"),
        ];
        for (change, expected) in table {
            let mut request = good();
            change(&mut request);
            let status = publish(&request, &kubelet()).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument, "{expected}: {status}");
            assert!(status.message().contains(expected), "{expected}: {status}");
        }
    }

    /// True if the request is accepted. Whatever it says, the volume is in the pod's directory and its path below the share.
    fn request(input: &[u8]) -> bool {
        let Ok(request) = NodePublishVolumeRequest::decode(input) else { return false };
        let volume = match publish(&request, &kubelet()) {
            Ok(volume) => volume,
            Err(status) => {
                assert!(status.code() == tonic::Code::InvalidArgument && !status.message().is_empty(), "{status}");
                return false;
            }
        };
        assert!(volume.target_path.starts_with(format!("/var/lib/kubelet/pods/{}/volumes", volume.pod_uid)));
        let normal = |path: &Path| path.components().all(|part| matches!(part, Component::Normal(_)));
        assert!(normal(volume.target_path.strip_prefix("/").unwrap()));
        assert!(volume.sub_path.as_deref().is_none_or(normal), "{:?}", volume.sub_path);
        true
    }

    #[test]
    fn fuzz_publish_requests() {
        let words: [&[u8]; 6] = [b"..", b"/", b"subPath", b"share", b"\x0a\x07subPath\x12", b"images"];
        fuzz::run("csi", &words, request);
    }
}
