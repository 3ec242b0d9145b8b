//! A volume brought about, and taken away. The loop does it; here it is permitted, remembered and waited for.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kube::Client;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::{Code, Status};
use virtiofs_contract::preflight::Reason;
use virtiofs_crds::{ExportMode, VirtiofsExport};

use super::refusals::{self, Refusals};
use super::registry::Registry;
use super::request::KubeletDir;
use super::{consumers, directory};
use crate::kubernetes::Exports;
use crate::notice::Notice;
use crate::reconcile::Turn;
use crate::report::ShareState;
use crate::volume::{Standing, Volume};

/// How long a socket may take to be there, or to be gone. The kubelet asks again.
const PATIENCE: Duration = Duration::from_secs(15);

/// Publishes volumes.
pub(super) struct Publisher {
    pub(super) node: String,
    pub(super) kubelet: KubeletDir,
    pub(super) client: Client,
    pub(super) exports: watch::Receiver<Exports>,
    pub(super) turns: watch::Receiver<Turn>,
    pub(super) registry: Arc<Registry>,
    pub(super) refusals: Refusals,
    pub(super) busy: Busy,
}

impl Publisher {
    /// Has a volume served in its directory. Doing it twice is doing it once.
    ///
    /// # Errors
    /// `UNAVAILABLE` is tried again by the kubelet, and so is `ABORTED`. All else is final; nothing is left of the volume
    /// then that was not there before.
    pub(super) async fn publish(&self, asked: Volume) -> Result<(), Status> {
        let _busy = self.busy.take(&asked.target_path)?;
        let known = self.registry.at(&asked.target_path);
        let volume = match &known {
            Some(known) => same(known, &asked)?.clone(),
            None => asked,
        };
        if let Err(status) = self.may(&volume, known.is_none()).await {
            if known.is_some() && !stays(&volume, true, &status) {
                self.withdraw(&volume.target_path).await?;
            }
            return Err(status);
        }
        let Err(status) = self.bring_about(&volume).await else { return Ok(()) };
        tracing::warn!(share = volume.share, pod = pod(&volume), %status, "volume not published");
        if !stays(&volume, known.is_some(), &status) {
            self.withdraw(&volume.target_path).await?;
        }
        Err(status)
    }

    /// May it be published now? What has been, may.
    async fn may(&self, volume: &Volume, new: bool) -> Result<(), Status> {
        if !volume.published {
            self.permit(volume).await?;
        }
        match new {
            true => self.ready(&volume.share),
            false => Ok(()),
        }
    }

    async fn bring_about(&self, volume: &Volume) -> Result<(), Status> {
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

    /// Takes a volume away, with all sessions of it. One that is not there has been taken away, whatever it was of.
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
        // A pod may have put a lot there.
        let removed = tokio::task::spawn_blocking(move || directory::remove(&directory)).await;
        removed.map_err(std::io::Error::other).flatten().map_err(internal)
    }

    /// May the pod's namespace use the share, as far as this node knows?
    async fn permit(&self, volume: &Volume) -> Result<(), Status> {
        let (share, namespace) = (volume.share.as_str(), volume.namespace.as_str());
        let export = self.export(share).inspect_err(|status| {
            if status.code() == Code::NotFound {
                self.refusals.refuse(None, volume, refusals::Reason::UnknownShare);
            }
        })?;
        if consumers::admits(&self.client, &export.spec.consumers, namespace).await? {
            return Ok(());
        }
        self.refusals.refuse(Some(&export), volume, refusals::Reason::NotAConsumer);
        Err(Status::permission_denied(format!(
            "pods of namespace {namespace} may not use share {share}: have an admin add the namespace to \
             spec.consumers.namespaces.matchNames of VirtiofsShare {share}"
        )))
    }

    fn export(&self, share: &str) -> Result<VirtiofsExport, Status> {
        let exports = self.exports.borrow();
        if let Some(export) = exports.all().find(|export| export.spec.share_name == share) {
            return Ok(export.clone());
        }
        let node = &self.node;
        if exports.old {
            return Err(Status::unavailable(format!(
                "node {node} has not heard from the API server yet which shares it has; {share} is not among those that \
                 it knows of"
            )));
        }
        Err(Status::not_found(format!(
            "node {node} has no share {share}: see `kubectl get virtiofsshares` for its name, and have the pod run where \
             it is, with nodeSelector share.virtiofs.dev/{share}: \"true\""
        )))
    }

    /// Can a VM connect to the share at the moment?
    fn ready(&self, share: &str) -> Result<(), Status> {
        if self.export(share)?.spec.mode == ExportMode::Drain {
            return Err(Status::unavailable(format!("share {share} is being withdrawn from node {}", self.node)));
        }
        let turn = self.turns.borrow();
        let report = turn.report.shares.iter().find(|it| it.name == share);
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

    /// Makes the directory, and has the loop know; since when it does.
    fn prepare(&self, volume: &Volume) -> std::io::Result<Instant> {
        directory::make(&volume.target_path)?;
        let since = Instant::now();
        match self.registry.at(&volume.target_path) {
            Some(known) if known == *volume => self.registry.look(),
            _ => self.registry.put(volume)?,
        }
        Ok(since)
    }

    async fn until_listening(&self, volume: &Volume, since: Instant) -> Result<(), Status> {
        let name = volume.endpoint_name();
        let mut turns = self.turns.clone();
        let standing = timeout(PATIENCE, async {
            loop {
                // What is refused now may have been so by an attempt of earlier.
                match standing(&turns.borrow_and_update(), &name, since) {
                    Some(Standing::Listening) => return Ok(()),
                    Some(Standing::Refused(notice)) => {
                        tracing::warn!(endpoint = name, reason = notice.reason, why = notice.message, "volume refused");
                        return Err(for_the_pod(&notice, volume.sub_path.as_deref()));
                    }
                    _ => {}
                }
                if turns.changed().await.is_err() {
                    return Err("the agent ends".to_owned());
                }
            }
        });
        let failed = |why: &str| {
            let what =
                volume.sub_path.as_ref().map(|path| format!("subPath {} of ", path.display())).unwrap_or_default();
            Status::unavailable(format!("{what}share {} is not served on node {}: {why}", volume.share, self.node))
        };
        match standing.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(why)) => Err(failed(&why)),
            Err(_) => Err(failed("it takes long; it is tried again")),
        }
    }

    /// Says whether nothing of the volume is left.
    async fn until_gone(&self, volume: &Volume, since: Instant) -> bool {
        let name = volume.endpoint_name();
        let mut turns = self.turns.clone();
        let gone = |turn: &Turn| {
            // Of a broker that does not answer nothing is left, or it tells when it does again.
            let known = turn.at.is_some_and(|at| at >= since);
            known && (!turn.report.broker || !turn.volumes.contains_key(&name))
        };
        timeout(PATIENCE, turns.wait_for(gone)).await.is_ok()
    }
}

/// Why there is no volume, for whoever wrote the pod. They can name a share, and are not to learn where it lies.
fn for_the_pod(notice: &Notice, sub_path: Option<&Path>) -> String {
    let reason = notice.reason.as_str();
    let of = |known: Reason| sub_path.is_some() && reason == known.as_str();
    let why = if of(Reason::SourceMissing) {
        "the share has no such directory"
    } else if of(Reason::SourceNotDirectory) {
        "that is not a directory"
    } else if of(Reason::SourceForbidden) {
        "it leads through a symbolic link, or may not be shared"
    } else {
        "an admin sees why in the status of the share's export (kubectl get vfe)"
    };
    format!("{reason}: {why}")
}

fn standing(turn: &Turn, name: &str, since: Instant) -> Option<Standing> {
    let fresh = turn.at.is_some_and(|at| at >= since);
    fresh.then(|| turn.volumes.get(name).cloned()).flatten()
}

/// Does a volume stay that was not published with this answer? `known`: it was there before it was asked for. After an
/// answer that is final the kubelet believes that there is nothing, and never takes it away.
fn stays(volume: &Volume, known: bool, status: &Status) -> bool {
    let tried_again = matches!(status.code(), Code::Unavailable | Code::Aborted);
    volume.published || (known && tried_again)
}

fn pod(volume: &Volume) -> String {
    format!("{}/{}", volume.namespace, volume.pod)
}

/// What was published in a directory, if that is what is asked for.
fn same<'a>(known: &'a Volume, asked: &Volume) -> Result<&'a Volume, Status> {
    let of = |volume: &Volume| (volume.volume_id.clone(), volume.share.clone(), volume.sub_path.clone());
    if of(known) == of(asked) {
        return Ok(known);
    }
    Err(Status::already_exists(format!(
        "{} is volume {} of share {}",
        known.target_path.display(),
        known.volume_id,
        known.share
    )))
}

/// Directories that somebody is at work on.
#[derive(Default)]
pub(super) struct Busy(Arc<Mutex<BTreeSet<PathBuf>>>);

/// Held while somebody works on one.
pub(super) struct Taken(Arc<Mutex<BTreeSet<PathBuf>>>, PathBuf);

impl Busy {
    fn take(&self, target_path: &Path) -> Result<Taken, Status> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !taken.insert(target_path.to_path_buf()) {
            return Err(Status::aborted(format!("{} is being worked on; ask again", target_path.display())));
        }
        Ok(Taken(self.0.clone(), target_path.to_path_buf()))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

#[cfg(test)]
mod tests;
