//! The hook as a side-car: gRPC at a socket in a directory shared with virt-launcher.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::hook::{HookError, on_define_domain};
use crate::protocol::info::info_server::{Info, InfoServer};
use crate::protocol::info::{HookPoint, InfoParams, InfoResult};
use crate::protocol::v1alpha3::callbacks_server::{Callbacks, CallbacksServer};
use crate::protocol::v1alpha3::{
    OnDefineDomainParams, OnDefineDomainResult, PreCloudInitIsoParams, PreCloudInitIsoResult, ShutdownParams,
    ShutdownResult,
};

/// Version of the callbacks: the first with `Shutdown`, without which the pod of a migrated machine does not end.
pub const VERSION: &str = "v1alpha3";
/// How long open connections are waited for at the end.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);

/// Serves until virt-launcher calls `Shutdown` or a signal arrives.
///
/// # Errors
/// The socket cannot be created, or its listener fails.
pub async fn serve(directory: &Path) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    // A unique name: a machine may have several hooks of one kind. The file is removed when it is dropped.
    let socket = tempfile::Builder::new()
        .prefix("virtiofs-")
        .suffix(".sock")
        .make_in(directory, |path| UnixListener::bind(path));
    let socket = socket.with_context(|| format!("cannot listen in {}", directory.display()))?;
    tracing::info!(socket = %socket.path().display(), "waiting for virt-launcher");
    let (listener, socket) = socket.into_parts();
    let shutdown = Arc::new(Notify::new());
    let ended = {
        let shutdown = shutdown.clone();
        async move {
            tokio::select! {
                () = shutdown.notified() => {}
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
    };
    let (ending, ended_receiver) = tokio::sync::oneshot::channel();
    let server = Server::builder()
        .add_service(InfoServer::new(Hook { shutdown: shutdown.clone() }))
        .add_service(CallbacksServer::new(Hook { shutdown }))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            ended.await;
            let _ = ending.send(());
        });
    let drained = async {
        let _ = ended_receiver.await;
        tokio::time::sleep(DRAIN_WITHIN).await;
    };
    tokio::select! {
        served = server => served.context("the socket failed")?,
        () = drained => {}
    }
    drop(socket);
    Ok(())
}

/// The hook.
struct Hook {
    shutdown: Arc<Notify>,
}

#[tonic::async_trait]
impl Info for Hook {
    async fn info(&self, _: Request<InfoParams>) -> Result<Response<InfoResult>, Status> {
        let point = |name: &str| HookPoint { name: name.to_owned(), priority: 0 };
        Ok(Response::new(InfoResult {
            name: "virtiofs".to_owned(),
            hook_points: vec![point("OnDefineDomain"), point("Shutdown")],
            versions: vec![VERSION.to_owned()],
        }))
    }
}

#[tonic::async_trait]
impl Callbacks for Hook {
    async fn on_define_domain(
        &self,
        request: Request<OnDefineDomainParams>,
    ) -> Result<Response<OnDefineDomainResult>, Status> {
        let OnDefineDomainParams { domain_xml, vmi } = request.into_inner();
        match on_define_domain(&vmi, &domain_xml) {
            Ok(domain) => Ok(Response::new(OnDefineDomainResult { domain_xml: domain.into_bytes() })),
            Err(error) => {
                tracing::error!(%error, "file systems not added to the domain");
                Err(status(&error))
            }
        }
    }

    /// Not subscribed to. Returns its input unchanged.
    async fn pre_cloud_init_iso(
        &self,
        request: Request<PreCloudInitIsoParams>,
    ) -> Result<Response<PreCloudInitIsoResult>, Status> {
        let PreCloudInitIsoParams { cloud_init_no_cloud_source, cloud_init_data, .. } = request.into_inner();
        Ok(Response::new(PreCloudInitIsoResult { cloud_init_no_cloud_source, cloud_init_data }))
    }

    async fn shutdown(&self, _: Request<ShutdownParams>) -> Result<Response<ShutdownResult>, Status> {
        tracing::info!("shutdown requested");
        self.shutdown.notify_one();
        Ok(Response::new(ShutdownResult {}))
    }
}

fn status(error: &HookError) -> Status {
    match error {
        HookError::Annotation(_) => Status::invalid_argument(error.to_string()),
        HookError::Domain(_) | HookError::NotText(_) => Status::failed_precondition(error.to_string()),
    }
}
