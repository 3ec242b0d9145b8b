//! The hook as virt-launcher calls it: gRPC at a socket in a directory that both see.

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

/// Version of the callbacks: the first with a shutdown, without which a machine that migrates leaves its pod behind.
pub const VERSION: &str = "v1alpha3";
/// How long who is still connected is waited for at the end.
const FAREWELL: Duration = Duration::from_secs(5);

/// Serves until virt-launcher or a signal says that it is over.
///
/// # Errors
/// When there is no socket to be had, or its listener fails.
pub async fn serve(directory: &Path) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    // Of a name of its own: a machine may have several hooks of one kind. It goes when it is dropped.
    let socket = tempfile::Builder::new()
        .prefix("virtiofs-")
        .suffix(".sock")
        .make_in(directory, |path| UnixListener::bind(path));
    let socket = socket.with_context(|| format!("cannot listen in {}", directory.display()))?;
    tracing::info!(socket = %socket.path().display(), "waiting for virt-launcher");
    let (listener, socket) = socket.into_parts();
    let over = Arc::new(Notify::new());
    let ended = {
        let over = over.clone();
        async move {
            tokio::select! {
                () = over.notified() => {}
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
    };
    let (leave, left) = tokio::sync::oneshot::channel();
    let server = Server::builder()
        .add_service(InfoServer::new(Hook { over: over.clone() }))
        .add_service(CallbacksServer::new(Hook { over }))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            ended.await;
            let _ = leave.send(());
        });
    let patience = async {
        let _ = left.await;
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        served = server => served.context("the socket failed")?,
        () = patience => {}
    }
    drop(socket);
    Ok(())
}

/// The hook.
struct Hook {
    over: Arc<Notify>,
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
                tracing::error!(%error, "the machine cannot have its file systems");
                Err(status(&error))
            }
        }
    }

    /// Not subscribed to; whoever calls it all the same gets back what they gave.
    async fn pre_cloud_init_iso(
        &self,
        request: Request<PreCloudInitIsoParams>,
    ) -> Result<Response<PreCloudInitIsoResult>, Status> {
        let PreCloudInitIsoParams { cloud_init_no_cloud_source, cloud_init_data, .. } = request.into_inner();
        Ok(Response::new(PreCloudInitIsoResult { cloud_init_no_cloud_source, cloud_init_data }))
    }

    async fn shutdown(&self, _: Request<ShutdownParams>) -> Result<Response<ShutdownResult>, Status> {
        tracing::info!("the machine has ended");
        self.over.notify_one();
        Ok(Response::new(ShutdownResult {}))
    }
}

fn status(error: &HookError) -> Status {
    match error {
        HookError::Annotation(_) => Status::invalid_argument(error.to_string()),
        HookError::Domain(_) | HookError::NotText(_) => Status::failed_precondition(error.to_string()),
    }
}
