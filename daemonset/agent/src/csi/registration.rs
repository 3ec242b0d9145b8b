//! The kubelet's plugin registration.

use std::path::PathBuf;

use tonic::{Request, Response, Status};
use virtiofs_crds::volume::DRIVER;
use virtiofs_csi::registration::registration_server;
use virtiofs_csi::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};

/// The registration service.
pub(super) struct Registration {
    /// Path of the driver's socket.
    pub(super) endpoint: PathBuf,
}

#[tonic::async_trait]
impl registration_server::Registration for Registration {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.display().to_string(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let RegistrationStatus { plugin_registered, error } = request.into_inner();
        match plugin_registered {
            true => tracing::info!("the kubelet has registered the driver"),
            false => tracing::warn!(error, "the kubelet has not registered the driver"),
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
