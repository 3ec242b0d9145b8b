//! The CSI node service: pods' volumes of shares. A pod that names a share gets a directory with a socket of its own. Nothing
//! is mounted.
//!
//! ```text
//! kubelet ──publish──> request (pure) ──Volume──> consumers (pure) ──> registry ──watch──> reconcile loop ──> broker
//!    ^                                                                                       |
//!    └───────────────────────── response once the volume listens <───────────────Pass────────┘
//! ```

mod consumers;
mod csi_node;
mod directory;
mod empty;
mod identity;
mod limits;
mod loss_events;
mod node;
mod publish;
mod registration;
mod registry;
mod rejections;
mod request;
mod socket;
mod stats;
mod sweep;

use std::path::PathBuf;
use std::sync::Arc;

use kube::Client;
use tokio::sync::watch;
use tonic::transport::Server;
use virtiofs_csi::registration::registration_server::RegistrationServer;
use virtiofs_csi::v1::identity_server::IdentityServer;
use virtiofs_csi::v1::node_server::NodeServer;

use crate::kubernetes::Exports;
use crate::model::pass::Pass;
use identity::Identity;
pub(crate) use limits::VolumeLimits;
use loss_events::LossEvents;
use node::Node;
use publish::Publisher;
use registration::Registration;
pub(crate) use registry::Registry;
pub(crate) use rejections::RejectionCounts;
pub(crate) use request::KubeletDir;
use socket::{Bound, PluginLock};

/// What the plugin works with.
pub(crate) struct Plugin {
    /// Name of this node.
    pub(crate) node: String,
    /// The kubelet's directory.
    pub(crate) kubelet: KubeletDir,
    /// The API server.
    pub(crate) client: Client,
    /// This node's exports.
    pub(crate) exports: watch::Receiver<Exports>,
    /// State of shares and volumes.
    pub(crate) passes: watch::Receiver<Pass>,
    /// The volumes.
    pub(crate) registry: Arc<Registry>,
    /// Rejected volume requests.
    pub(crate) rejections: RejectionCounts,
    /// How many volumes may exist.
    pub(crate) limits: VolumeLimits,
}

impl Plugin {
    /// Serves the kubelet. The sockets are removed when this is dropped, unless another plugin has replaced them.
    ///
    /// # Errors
    /// A socket cannot be created.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Two agents may be started for one node; the second waits here and changes nothing before.
        let _lock = PluginLock::take(&self.kubelet.plugin()).await?;
        let publisher = Arc::new(Publisher {
            node: self.node.clone(),
            kubelet: self.kubelet.clone(),
            exports: self.exports,
            passes: self.passes.clone(),
            registry: self.registry.clone(),
            rejections: rejections::Rejections::start(&self.client, &self.node, self.rejections),
            client: self.client.clone(),
            limits: self.limits,
            busy: publish::Busy::default(),
        });
        tokio::spawn(sweep::run(publisher.clone()));
        let events = LossEvents::new(self.client.clone(), &self.node, self.registry.clone());
        tokio::spawn(events.run(self.passes.clone()));
        let (_csi, incoming) = Bound::at(&self.kubelet.plugin().join("csi.sock"))?;
        let node = Node { name: self.node.clone(), publisher };
        let server = Server::builder()
            .add_service(IdentityServer::new(Identity))
            .add_service(NodeServer::new(node))
            .serve_with_incoming(incoming);
        let server = tokio::spawn(server);
        // The kubelet calls the driver as soon as it is registered, so registration comes second.
        let registered = csi_node::stay_registered(self.client, self.node, move || {
            let service = Registration { endpoint: self.kubelet.plugin().join("csi.sock") };
            let (bound, incoming) = Bound::at(&self.kubelet.registration())?;
            let server = Server::builder().add_service(RegistrationServer::new(service)).serve_with_incoming(incoming);
            Ok((bound, tokio::spawn(server)))
        });
        tokio::select! {
            ended = registered => ended,
            ended = server => Ok(ended??),
        }
    }
}

/// Directory of the registry.
pub(crate) fn registry_in(kubelet: &KubeletDir) -> PathBuf {
    kubelet.plugin().join("volumes")
}
