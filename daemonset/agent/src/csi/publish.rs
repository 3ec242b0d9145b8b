//! Publishes and unpublishes volumes: checks permission, stores the volume, and waits for the reconcile loop to serve it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kube::Client;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::{Code, Status};
use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::report::ShareState;
use virtiofs_contract::preflight::Reason;
use virtiofs_crds::{ExportMode, VirtiofsExport};

use super::limits::VolumeLimits;
use super::registry::Registry;
use super::rejections::{self, Rejections};
use super::request::KubeletDir;
use super::{consumers, directory};
use crate::kubernetes::Exports;
use crate::model::pass::Pass;
use crate::model::volume::{Volume, VolumeState};

/// How long a socket may take to appear or to disappear. The kubelet repeats its call after an error.
const PATIENCE: Duration = Duration::from_secs(15);

/// Publishes volumes.
pub(super) struct Publisher {
    pub(super) node: String,
    pub(super) kubelet: KubeletDir,
    pub(super) client: Client,
    pub(super) exports: watch::Receiver<Exports>,
    pub(super) passes: watch::Receiver<Pass>,
    pub(super) registry: Arc<Registry>,
    pub(super) rejections: Rejections,
    pub(super) limits: VolumeLimits,
    pub(super) busy: Busy,
}

impl Publisher {
    /// Publishes a volume. Idempotent.
    ///
    /// # Errors
    /// The kubelet repeats the call after `UNAVAILABLE` and `ABORTED`. Other errors are terminal and leave nothing of a new
    /// volume behind.
    pub(super) async fn publish(&self, requested: Volume) -> Result<(), Status> {
        let _busy = self.busy.take(&requested.target_path)?;
        let known = self.registry.at(&requested.target_path);
        let volume = match &known {
            Some(known) => same(known, &requested)?.clone(),
            None => requested,
        };
        if let Err(status) = self.check(&volume, known.is_none()).await {
            if known.is_some() && !remains(&volume, true, &status) {
                self.withdraw(&volume.target_path).await?;
            }
            return Err(status);
        }
        let Err(status) = self.serve(&volume).await else { return Ok(()) };
        tracing::warn!(share = volume.share, pod = pod(&volume), %status, "volume not published");
        if !remains(&volume, known.is_some(), &status) {
            self.withdraw(&volume.target_path).await?;
        }
        Err(status)
    }

    /// Checks whether a volume may be published now. A volume that was published before keeps its permission.
    async fn check(&self, volume: &Volume, new: bool) -> Result<(), Status> {
        if !volume.published {
            self.permit(volume).await?;
        }
        match new {
            true => self.ready(&volume.share),
            false => Ok(()),
        }
    }

    async fn serve(&self, volume: &Volume) -> Result<(), Status> {
        // No other call runs between this check and the volume's entry in the registry.
        self.limit(volume)?;
        let since = self.prepare(volume).map_err(|error| {
            Status::internal(format!("directory {} of the volume: {error}", volume.target_path.display()))
        })?;
        self.until_listening(volume, since).await?;
        if !volume.published {
            self.registry.note_published(volume).map_err(|error| Status::internal(error.to_string()))?;
            tracing::info!(share = volume.share, pod = pod(volume), "volume published");
        }
        Ok(())
    }

    /// Unpublishes a volume and ends its sessions. Idempotent.
    ///
    /// # Errors
    /// `ABORTED`: it is being published. `INTERNAL`: its directory cannot be removed.
    pub(super) async fn unpublish(&self, target_path: &Path) -> Result<(), Status> {
        let _busy = self.busy.take(target_path)?;
        let known = self.registry.at(target_path);
        if known.is_none() && self.kubelet.pod_of(target_path).is_none() {
            return Ok(());
        }
        self.withdraw(target_path).await?;
        if let Some(volume) = known {
            tracing::info!(share = volume.share, pod = pod(&volume), "volume unpublished");
        }
        Ok(())
    }

    async fn withdraw(&self, target_path: &Path) -> Result<(), Status> {
        let internal = |error: std::io::Error| Status::internal(format!("{}: {error}", target_path.display()));
        let known = self.registry.at(target_path);
        let since = Instant::now();
        self.registry.remove(target_path).map_err(internal)?;
        if let Some(volume) = known
            && !self.until_gone(&volume, since).await
        {
            tracing::warn!(share = volume.share, pod = pod(&volume), "sessions of the volume are still ending");
        }
        let directory = target_path.to_path_buf();
        // On a blocking thread: a pod may have left many files there.
        let removed = tokio::task::spawn_blocking(move || directory::remove(&directory)).await;
        removed.map_err(std::io::Error::other).flatten().map_err(internal)
    }

    /// Checks whether the pod's namespace may use the share.
    async fn permit(&self, volume: &Volume) -> Result<(), Status> {
        let (share, namespace) = (volume.share.as_str(), volume.namespace.as_str());
        let export = self.export(share).inspect_err(|status| {
            if status.code() == Code::NotFound {
                self.rejections.record(None, volume, rejections::Reason::UnknownShare);
            }
        })?;
        if consumers::admits(&self.client, &export.spec.consumers, namespace).await? {
            return Ok(());
        }
        self.rejections.record(Some(&export), volume, rejections::Reason::NotAConsumer);
        Err(Status::permission_denied(format!(
            "pods of namespace {namespace} may not use share {share}: let an admin add the namespace to \
             spec.consumers.namespaces.matchNames of VirtiofsShare {share}"
        )))
    }

    /// Checks whether another volume may exist.
    fn limit(&self, volume: &Volume) -> Result<(), Status> {
        let Err(exceeded) = self.limits.check(&self.registry.all(), volume) else { return Ok(()) };
        self.rejections.record(self.export(&volume.share).ok().as_ref(), volume, rejections::Reason::TooManyVolumes);
        Err(Status::resource_exhausted(exceeded))
    }

    fn export(&self, share: &str) -> Result<VirtiofsExport, Status> {
        let exports = self.exports.borrow();
        if let Some(export) = exports.of(share) {
            return Ok(export.clone());
        }
        let node = &self.node;
        if exports.old {
            return Err(Status::unavailable(format!(
                "node {node} has not received its shares from the API server yet; share {share} is not among the last known \
                 ones"
            )));
        }
        Err(Status::not_found(format!(
            "node {node} has no share {share}: check its name with `kubectl get virtiofsshares`, and schedule the pod to \
             a node that serves it, with nodeSelector share.virtiofs.dev/{share}: \"true\""
        )))
    }

    /// Checks whether a VM can connect to the share now.
    fn ready(&self, share: &str) -> Result<(), Status> {
        if self.export(share)?.spec.mode == ExportMode::Drain {
            return Err(Status::unavailable(format!("share {share} is being withdrawn from node {}", self.node)));
        }
        let pass = self.passes.borrow();
        let report = pass.report.shares.iter().find(|it| it.name == share);
        match report {
            Some(report) if report.admits() => Ok(()),
            Some(report) if report.state == ShareState::NotReady || report.state.serves() => {
                let why = report.notices.first().map(|notice| format!(": {}", for_the_pod(notice, None)));
                Err(Status::unavailable(format!(
                    "share {share} is not ready on node {}{}",
                    self.node,
                    why.unwrap_or_default()
                )))
            }
            _ => Err(Status::unavailable(format!("share {share} is not ready yet on node {}", self.node))),
        }
    }

    /// Creates the directory and wakes the reconcile loop. Returns when.
    fn prepare(&self, volume: &Volume) -> std::io::Result<Instant> {
        directory::make(&volume.target_path)?;
        let since = Instant::now();
        match self.registry.at(&volume.target_path) {
            Some(known) if known == *volume => self.registry.wake(),
            _ => self.registry.put(volume)?,
        }
        Ok(since)
    }

    async fn until_listening(&self, volume: &Volume, since: Instant) -> Result<(), Status> {
        let name = volume.endpoint_name();
        let mut passes = self.passes.clone();
        let listening = timeout(PATIENCE, async {
            loop {
                // A rejection may come from an earlier attempt.
                match volume_state(&passes.borrow_and_update(), &name, since) {
                    Some(VolumeState::Listening) => return Ok(()),
                    Some(VolumeState::Rejected(notice)) => {
                        tracing::warn!(
                            endpoint = name,
                            reason = notice.reason.as_str(),
                            why = notice.message,
                            "volume rejected"
                        );
                        return Err(for_the_pod(&notice, volume.sub_path.as_deref()));
                    }
                    _ => {}
                }
                if passes.changed().await.is_err() {
                    return Err("the agent is ending".to_owned());
                }
            }
        });
        let failed = |why: &str| {
            let what =
                volume.sub_path.as_ref().map(|path| format!("subPath {} of ", path.display())).unwrap_or_default();
            Status::unavailable(format!("{what}share {} is not served on node {}: {why}", volume.share, self.node))
        };
        match listening.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(failed(&why)),
            Err(_) => Err(failed("not ready in time; trying again")),
        }
    }

    /// Waits until nothing of the volume is left. False if that takes too long.
    async fn until_gone(&self, volume: &Volume, since: Instant) -> bool {
        let name = volume.endpoint_name();
        let mut passes = self.passes.clone();
        let gone = |pass: &Pass| {
            // A broker that does not answer has ended, or reports the volume when it answers again.
            let known = pass.at.is_some_and(|at| at >= since);
            known && (!pass.report.broker || !pass.volumes.contains_key(&name))
        };
        timeout(PATIENCE, passes.wait_for(gone)).await.is_ok()
    }
}

/// Why a volume is not served, for the author of the pod, who must not learn paths of the node.
fn for_the_pod(notice: &Notice, sub_path: Option<&Path>) -> String {
    let why = match (notice.reason, sub_path) {
        (NoticeReason::Finding(Reason::SourceMissing), Some(_)) => "the share has no such directory",
        (NoticeReason::Finding(Reason::SourceNotDirectory), Some(_)) => "that is not a directory",
        (NoticeReason::Finding(Reason::SourceForbidden), Some(_)) => {
            "it leads through a symbolic link, or may not be shared"
        }
        _ => "an admin sees why in the status of the share's export (kubectl get vfe)",
    };
    format!("{}: {why}", notice.reason.as_str())
}

/// The state of a volume in a pass that began after `since`.
fn volume_state(pass: &Pass, name: &str, since: Instant) -> Option<VolumeState> {
    let fresh = pass.at.is_some_and(|at| at >= since);
    fresh.then(|| pass.volumes.get(name).cloned()).flatten()
}

/// True if a volume remains after a failed publish call. `known`: it existed before the call. After a terminal error the
/// kubelet assumes that there is no volume and never unpublishes it.
fn remains(volume: &Volume, known: bool, status: &Status) -> bool {
    let repeated = matches!(status.code(), Code::Unavailable | Code::Aborted);
    volume.published || (known && repeated)
}

fn pod(volume: &Volume) -> String {
    format!("{}/{}", volume.namespace, volume.pod)
}

/// The volume published in a directory, if it is the requested one.
fn same<'a>(known: &'a Volume, requested: &Volume) -> Result<&'a Volume, Status> {
    let of = |volume: &Volume| (volume.volume_id.clone(), volume.share.clone(), volume.sub_path.clone());
    if of(known) == of(requested) {
        return Ok(known);
    }
    Err(Status::already_exists(format!(
        "{} is volume {} of share {}",
        known.target_path.display(),
        known.volume_id,
        known.share
    )))
}

/// Directories of running calls.
#[derive(Default)]
pub(super) struct Busy(Arc<Mutex<BTreeSet<PathBuf>>>);

/// Held while a call works on a directory.
pub(super) struct BusyGuard(Arc<Mutex<BTreeSet<PathBuf>>>, PathBuf);

impl Busy {
    fn take(&self, target_path: &Path) -> Result<BusyGuard, Status> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !taken.insert(target_path.to_path_buf()) {
            return Err(Status::aborted(format!(
                "another call for {} is running; repeat this one later",
                target_path.display()
            )));
        }
        Ok(BusyGuard(self.0.clone(), target_path.to_path_buf()))
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

#[cfg(test)]
mod tests;
