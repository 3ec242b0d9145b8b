//! Volumes whose pods are gone without anybody having said so: their directories were removed while no agent ran, say.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::publish::Publisher;

/// How often it is looked for them.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Looks for them from time to time, and at once.
pub(super) async fn run(publisher: Arc<Publisher>) {
    loop {
        let pods = publisher.kubelet.pods();
        for volume in publisher.registry.all() {
            if is_gone(&pods, &volume.pod_uid) {
                tracing::info!(share = volume.share, pod = volume.pod, "the volume's pod is gone");
                if let Err(status) = publisher.unpublish(&volume.target_path).await {
                    tracing::warn!(%status, "a volume whose pod is gone is not taken away yet");
                }
            }
        }
        sleep(SWEEP_EVERY).await;
    }
}

/// Has the pod no directory any more? Where that of all pods cannot be seen, nothing is known of any.
fn is_gone(pods: &Path, uid: &str) -> bool {
    let missing = fs::symlink_metadata(pods.join(uid)).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    missing && fs::read_dir(pods).is_ok_and(|mut pods| pods.next().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_gone_only_where_others_can_be_seen() {
        let scratch = tempfile::tempdir().unwrap();
        let pods = scratch.path().join("pods");
        assert!(!is_gone(&pods, "u"));
        fs::create_dir_all(&pods).unwrap();
        assert!(!is_gone(&pods, "u"), "an empty directory may be one on which nothing is mounted yet");
        fs::create_dir(pods.join("other")).unwrap();
        assert!(is_gone(&pods, "u") && !is_gone(&pods, "other"));
    }
}
