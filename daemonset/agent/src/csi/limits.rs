//! Limits of volumes: each volume is a socket with sessions, engines and memory of the node, and whoever creates pods creates
//! volumes. A pod, a namespace or a share that takes all of a node's sessions would shut others out.

use clap::Args;

use crate::model::volume::Volume;

/// How many volumes may exist on this node.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VolumeLimits {
    /// Largest number of volumes of one pod.
    #[arg(long = "volumes-per-pod", value_name = "NUMBER", default_value_t = 16)]
    pub(crate) pod: usize,
    /// Largest number of volumes of all pods of one namespace on this node.
    #[arg(long = "volumes-per-namespace", value_name = "NUMBER", default_value_t = 256)]
    pub(crate) namespace: usize,
    /// Largest number of volumes of one share on this node.
    #[arg(long = "volumes-per-share", value_name = "NUMBER", default_value_t = 512)]
    pub(crate) share: usize,
}

impl VolumeLimits {
    /// Checks whether another volume may exist beside these.
    ///
    /// # Errors
    /// The limit that it would exceed, and how to raise it.
    pub(super) fn check(&self, existing: &[Volume], requested: &Volume) -> Result<(), String> {
        let others = || existing.iter().filter(|it| it.target_path != requested.target_path);
        let of_pod = others().filter(|it| it.pod_uid == requested.pod_uid).count();
        let of_namespace = others().filter(|it| it.namespace == requested.namespace).count();
        let of_share = others().filter(|it| it.share == requested.share).count();
        let Volume { namespace, pod, share, .. } = requested;
        for (count, limit, of, option) in [
            (of_pod, self.pod, format!("pod {namespace}/{pod}"), "pod"),
            (of_namespace, self.namespace, format!("namespace {namespace}"), "namespace"),
            (of_share, self.share, format!("share {share}"), "share"),
        ] {
            if count >= limit {
                return Err(format!(
                    "{of} has {count} volumes on this node, the most that it may have; delete pods, or let an admin raise \
                     --volumes-per-{option} of the agents"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::volume;

    #[test]
    fn each_limit_is_checked_for_itself() {
        let limits = VolumeLimits { pod: 2, namespace: 3, share: 4 };
        let named = |share: &str, namespace: &str, pod: &str, path: &str| Volume {
            namespace: namespace.into(),
            pod_uid: pod.into(),
            target_path: path.into(),
            ..volume(share, path)
        };
        let existing = [
            named("images", "a", "1", "/1"),
            named("images", "a", "1", "/2"),
            named("other", "a", "2", "/3"),
            named("images", "b", "3", "/4"),
            named("images", "c", "4", "/5"),
        ];
        let refused = |share, namespace, pod, path| {
            let error = limits.check(&existing, &named(share, namespace, pod, path)).err();
            error.map(|error| error.split("--volumes-per-").nth(1).unwrap().split(' ').next().unwrap().to_owned())
        };
        assert_eq!(refused("other", "a", "1", "/9").as_deref(), Some("pod"));
        assert_eq!(refused("other", "a", "5", "/9").as_deref(), Some("namespace"));
        assert_eq!(refused("images", "d", "5", "/9").as_deref(), Some("share"));
        assert_eq!(refused("other", "d", "5", "/9"), None);
        assert_eq!(refused("images", "a", "1", "/1"), None, "it exists already");
    }
}
