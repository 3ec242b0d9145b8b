//! The CSI node service: the kubelet's calls.

use std::path::Path;
use std::sync::Arc;

use tonic::{Request, Response, Status};
use virtiofs_csi::v1::node_server;
use virtiofs_csi::v1::node_service_capability::{Rpc, Type, rpc};
use virtiofs_csi::v1::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
    NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodePublishVolumeResponse,
    NodeServiceCapability, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
};

use super::publish::Publisher;
use super::{request, stats};

/// The node service.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) publisher: Arc<Publisher>,
}

#[tonic::async_trait]
impl node_server::Node for Node {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let volume = request::publish(&request.into_inner(), &self.publisher.kubelet)?;
        self.publisher.publish(volume).await?;
        Ok(Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        request::required("target_path", &request.target_path)?;
        self.publisher.unpublish(Path::new(&request.target_path)).await?;
        Ok(Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        request::required("volume_id", &request.volume_id)?;
        request::required("volume_path", &request.volume_path)?;
        let volume = self.publisher.registry.at(Path::new(&request.volume_path));
        let volume = volume.filter(|volume| volume.volume_id == request.volume_id).ok_or_else(|| {
            Status::not_found(format!("volume {} is not published at {}", request.volume_id, request.volume_path))
        })?;
        // From the last pass: the source may hang, so it is not read now.
        let pass = self.publisher.passes.borrow();
        let usage = stats::usage(pass.spaces.get(&volume.share).copied()).ok_or_else(|| {
            Status::unavailable(format!("the space of share {} is unknown at the moment", volume.share))
        })?;
        let endpoint = volume.endpoint_name();
        let condition = stats::condition(pass.losses.unresolved(&endpoint), pass.volumes.get(&endpoint));
        Ok(Response::new(NodeGetVolumeStatsResponse { usage, volume_condition: Some(condition) }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability =
            |kind: rpc::Type| NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })) };
        let capabilities =
            [rpc::Type::GetVolumeStats, rpc::Type::VolumeCondition, rpc::Type::VolumeMountGroup].map(capability);
        Ok(Response::new(NodeGetCapabilitiesResponse { capabilities: capabilities.to_vec() }))
    }

    async fn node_get_info(&self, _: Request<NodeGetInfoRequest>) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse { node_id: self.name.clone() }))
    }
}
