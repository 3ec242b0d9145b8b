//! Removes volumes whose pods ended without an unpublish call, for example while no agent ran.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::publish::Publisher;

/// Time between two sweeps.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Sweeps at once and then periodically.
pub(super) async fn run(publisher: Arc<Publisher>) {
    loop {
        let pods = publisher.kubelet.pods();
        for volume in publisher.registry.all() {
            if is_gone(&pods, &volume.pod_uid) {
                tracing::info!(share = volume.share, pod = volume.pod, "removing the volume of a pod that ended");
                if let Err(status) = publisher.unpublish(&volume.target_path).await {
                    tracing::warn!(%status, "volume of a pod that ended not removed; trying again");
                }
            }
        }
        sleep(SWEEP_EVERY).await;
    }
}

/// True if the pod has no directory any more. If no pod has one, the directory is probably not mounted: false.
fn is_gone(pods: &Path, uid: &str) -> bool {
    let missing = fs::symlink_metadata(pods.join(uid)).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    missing && fs::read_dir(pods).is_ok_and(|mut pods| pods.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_gone_only_if_others_are_seen() {
        let scratch = tempfile::tempdir().unwrap();
        let pods = scratch.path().join("pods");
        assert!(!is_gone(&pods, "u"));
        fs::create_dir_all(&pods).unwrap();
        assert!(!is_gone(&pods, "u"), "an empty directory may be one on which nothing is mounted yet");
        fs::create_dir(pods.join("other")).unwrap();
        assert!(is_gone(&pods, "u") && !is_gone(&pods, "other"));
    }
}
