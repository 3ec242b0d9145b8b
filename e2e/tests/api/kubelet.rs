//! The test as a kubelet: calls the node plugin over its sockets.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use e2e::cluster::{Kubectl, NodeDaemons, wait_for};
use serde_json::json;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use virtiofs_csi::registration::registration_client::RegistrationClient;
use virtiofs_csi::registration::{InfoRequest, PluginInfo, RegistrationStatus};
use virtiofs_csi::v1::identity_client::IdentityClient;
use virtiofs_csi::v1::node_client::NodeClient;
use virtiofs_csi::v1::volume_capability::{AccessType, MountVolume};
use virtiofs_csi::v1::{
    GetPluginInfoRequest, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest, VolumeCapability,
};

pub(crate) const DRIVER: &str = "csi.virtiofs.dev";

/// The kubelet's side of the sockets.
pub(crate) struct Kubelet {
    runtime: Runtime,
    dir: PathBuf,
}

/// A volume of a pod.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    pub(crate) namespace: &'static str,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) attributes: Vec<(&'static str, String)>,
    pub(crate) group: Option<u32>,
}

impl Pod {
    /// A pod in namespace `vms` with a volume of this share.
    pub(crate) fn of(name: &str, share: &str) -> Self {
        let attributes = vec![("share", share.to_owned())];
        Pod { namespace: "vms", name: name.to_owned(), uid: format!("u{name}"), attributes, group: None }
    }
}

impl Kubelet {
    pub(crate) fn of(daemons: &NodeDaemons) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build().context("a runtime")?;
        Ok(Kubelet { runtime, dir: daemons.kubelet_dir() })
    }

    pub(crate) fn csi_socket(&self) -> PathBuf {
        self.dir.join("plugins").join(DRIVER).join("csi.sock")
    }

    pub(crate) fn registration_socket(&self) -> PathBuf {
        self.dir.join("plugins_registry").join(format!("{DRIVER}-reg.sock@localhost"))
    }

    fn channel(&self, socket: &Path) -> Result<Channel> {
        let _inside = self.runtime.enter();
        Ok(Endpoint::try_from(format!("unix://{}", socket.display()))?.connect_lazy())
    }

    /// The driver's information, as soon as it answers.
    pub(crate) fn plugin_info(&self) -> Result<PluginInfo> {
        let mut client = RegistrationClient::new(self.channel(&self.registration_socket())?);
        wait_for("the driver to answer", || {
            Ok(self.runtime.block_on(client.get_info(InfoRequest {})).ok().map(tonic::Response::into_inner))
        })
    }

    /// Registers the driver as a kubelet does: requests its information, adds it to the CSINode, reports the result.
    pub(crate) fn register(&self, admin: &Kubectl, node: &str) -> Result<PluginInfo> {
        let info = self.plugin_info()?;
        let mut identity = IdentityClient::new(self.channel(Path::new(&info.endpoint))?);
        let name = self.runtime.block_on(identity.get_plugin_info(GetPluginInfoRequest {}))?.into_inner().name;
        let drivers = json!([{"name": name, "nodeID": node, "topologyKeys": []}]);
        admin.apply(&csi_node(node, drivers))?;
        let mut client = RegistrationClient::new(self.channel(&self.registration_socket())?);
        let status = RegistrationStatus { plugin_registered: true, error: String::new() };
        self.runtime.block_on(client.notify_registration_status(status))?;
        Ok(info)
    }

    /// Removes the driver's entry.
    pub(crate) fn deregister(&self, admin: &Kubectl, node: &str) -> Result<()> {
        admin.apply(&csi_node(node, json!([])))
    }

    pub(crate) fn target(&self, pod: &Pod) -> PathBuf {
        self.dir.join("pods").join(&pod.uid).join("volumes/kubernetes.io~csi/v/mount")
    }

    /// A request as a kubelet sends it.
    pub(crate) fn request(&self, pod: &Pod) -> NodePublishVolumeRequest {
        let added = [
            ("csi.storage.k8s.io/pod.name", pod.name.clone()),
            ("csi.storage.k8s.io/pod.namespace", pod.namespace.to_owned()),
            ("csi.storage.k8s.io/pod.uid", pod.uid.clone()),
            ("csi.storage.k8s.io/serviceAccount.name", "default".to_owned()),
            ("csi.storage.k8s.io/ephemeral", "true".to_owned()),
        ];
        let context = pod.attributes.iter().cloned().chain(added);
        let group = pod.group.map(|group| group.to_string()).unwrap_or_default();
        let mount = MountVolume { volume_mount_group: group, ..MountVolume::default() };
        NodePublishVolumeRequest {
            volume_id: format!("csi-{}", pod.name),
            target_path: self.target(pod).display().to_string(),
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(mount)),
                access_mode: None,
            }),
            readonly: true,
            volume_context: context.map(|(key, value)| (key.to_owned(), value)).collect(),
        }
    }

    /// Publishes a volume. The kubelet creates the parent of its directory.
    pub(crate) fn publish(&self, pod: &Pod) -> Result<Result<(), Status>> {
        let target = self.target(pod);
        fs::create_dir_all(target.parent().context("a target path has a parent directory")?)?;
        let mut client = NodeClient::new(self.channel(&self.csi_socket())?);
        Ok(self.runtime.block_on(client.node_publish_volume(self.request(pod))).map(drop))
    }

    /// Publishes a volume, and retries as long as the error is transient.
    pub(crate) fn publish_with_retries(&self, pod: &Pod) -> Result<()> {
        wait_for(&format!("a volume for {}", pod.name), || match self.publish(pod)? {
            Ok(()) => Ok(Some(())),
            Err(status) if status.code() == Code::Unavailable => Ok(None),
            Err(status) => Err(status.into()),
        })
    }

    pub(crate) fn unpublish(&self, pod: &Pod) -> Result<Result<(), Status>> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: format!("csi-{}", pod.name),
            target_path: self.target(pod).display().to_string(),
        };
        let mut client = NodeClient::new(self.channel(&self.csi_socket())?);
        Ok(self.runtime.block_on(client.node_unpublish_volume(request)).map(drop))
    }

    pub(crate) fn stats(&self, pod: &Pod) -> Result<Result<NodeGetVolumeStatsResponse, Status>> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: format!("csi-{}", pod.name),
            volume_path: self.target(pod).display().to_string(),
        };
        let mut client = NodeClient::new(self.channel(&self.csi_socket())?);
        let answer = self.runtime.block_on(client.node_get_volume_stats(request));
        Ok(answer.map(tonic::Response::into_inner))
    }
}

fn csi_node(node: &str, drivers: serde_json::Value) -> serde_json::Value {
    json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": node}, "spec": {"drivers": drivers},
    })
}
