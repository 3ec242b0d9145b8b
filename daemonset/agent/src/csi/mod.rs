//! The node plugin: what a kubelet asks for, as volumes of shares. A pod that names a share gets a directory with a socket
//! in it, made for this pod alone. Nothing is mounted.
//!
//! ```text
//! kubelet ──publish──> request (pure) ──Volume──> consumers (pure) ──> registry ──watch──> the loop ──> broker
//!    ^                                                                                       |
//!    └───────────────────── answered when the loop says that it listens <────────────Turn────┘
//! ```

mod consumers;
mod csi_node;
mod directory;
mod empty;
mod identity;
mod node;
mod publish;
mod refusals;
mod registration;
mod registry;
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
use crate::reconcile::Turn;
use identity::Identity;
use node::Node;
use publish::Publisher;
pub(crate) use refusals::RefusalCounts;
use registration::Registration;
pub(crate) use registry::Registry;
pub(crate) use request::KubeletDir;
use socket::{Bound, Only};

/// What the plugin works with.
pub(crate) struct Plugin {
    /// Name of this node.
    pub(crate) node: String,
    /// The kubelet's directory.
    pub(crate) kubelet: KubeletDir,
    /// The API server.
    pub(crate) client: Client,
    /// What is asked of this node.
    pub(crate) exports: watch::Receiver<Exports>,
    /// How shares and volumes do.
    pub(crate) turns: watch::Receiver<Turn>,
    /// The volumes.
    pub(crate) registry: Arc<Registry>,
    /// How often somebody was refused.
    pub(crate) refusals: RefusalCounts,
}

impl Plugin {
    /// Serves the kubelet. Sockets go when this is dropped, if they are still this plugin's own.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        // Two agents may be started for one node; the second waits here, and touches nothing before.
        let _only = Only::take(&self.kubelet.plugin()).await?;
        let publisher = Arc::new(Publisher {
            node: self.node.clone(),
            kubelet: self.kubelet.clone(),
            exports: self.exports,
            turns: self.turns.clone(),
            registry: self.registry.clone(),
            refusals: refusals::Refusals::start(&self.client, &self.node, self.refusals),
            client: self.client.clone(),
            busy: publish::Busy::default(),
        });
        tokio::spawn(sweep::run(publisher.clone()));
        let (_csi, incoming) = Bound::at(&self.kubelet.plugin().join("csi.sock"))?;
        let node = Node { name: self.node.clone(), publisher };
        let server = Server::builder()
            .add_service(IdentityServer::new(Identity))
            .add_service(NodeServer::new(node))
            .serve_with_incoming(incoming);
        let server = tokio::spawn(server);
        // The kubelet asks the driver as soon as it knows of it: that comes second.
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

/// Where the registry is.
pub(crate) fn registry_in(kubelet: &KubeletDir) -> PathBuf {
    kubelet.plugin().join("volumes")
}
