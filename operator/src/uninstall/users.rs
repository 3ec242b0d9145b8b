//! Users of shares, which block the removal of the chart. Pure functions.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{PersistentVolume, Pod, Volume};
use kube::ResourceExt;
use virtiofs_crds::VirtiofsExport;
use virtiofs_crds::volume::{DRIVER, SHARE};

/// Largest number of users in the message.
const NAMED: usize = 20;

/// The shares of claims that are bound to volumes of this driver, by namespace and name of the claim.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims(BTreeMap<(String, String), String>);

impl Claims {
    /// Adds a volume, if it is bound and of this driver.
    pub(super) fn add(&mut self, volume: &PersistentVolume) {
        let spec = volume.spec.as_ref();
        let csi = spec.and_then(|spec| spec.csi.as_ref()).filter(|csi| csi.driver == DRIVER);
        let claim = spec.and_then(|spec| spec.claim_ref.as_ref());
        if let (Some(csi), Some(claim)) = (csi, claim) {
            let key = (claim.namespace.clone().unwrap_or_default(), claim.name.clone().unwrap_or_default());
            self.0.insert(key, share_of(csi.volume_attributes.as_ref()));
        }
    }

    fn share(&self, namespace: &str, claim: &str) -> Option<String> {
        self.0.get(&(namespace.to_owned(), claim.to_owned())).cloned()
    }
}

/// The sessions of an export; none if it has none.
pub(super) fn of_export(export: &VirtiofsExport) -> Option<String> {
    let status = export.status.as_ref()?;
    let sessions = status.sessions.filter(|sessions| *sessions > 0)?;
    let users = match status.users.is_empty() {
        true => String::new(),
        false => format!(": {}", status.users.join(", ")),
    };
    Some(format!("share {} on node {}, {sessions} sessions{users}", export.spec.share_name, export.spec.node_name))
}

/// The volumes of this driver that the kubelet has to unpublish for a pod; none if there are none.
pub(super) fn of_pod(pod: &Pod, claims: &Claims) -> Option<String> {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let spec = pod.spec.as_ref().filter(|_| !matches!(phase, Some("Succeeded" | "Failed")))?;
    let node = spec.node_name.as_deref()?;
    let namespace = pod.namespace().unwrap_or_default();
    let volumes = spec.volumes.as_deref().unwrap_or_default();
    let volumes: Vec<String> = volumes.iter().filter_map(|volume| of_volume(volume, &namespace, claims)).collect();
    let list = (!volumes.is_empty()).then(|| volumes.join(", "))?;
    Some(format!("pod {namespace}/{} on node {node}, {list}", pod.name_any()))
}

fn of_volume(volume: &Volume, namespace: &str, claims: &Claims) -> Option<String> {
    let inline = volume.csi.as_ref().filter(|csi| csi.driver == DRIVER);
    let claimed = volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.as_str());
    let share = match (inline, claimed) {
        (Some(csi), _) => share_of(csi.volume_attributes.as_ref()),
        (None, Some(claim)) => claims.share(namespace, claim)?,
        (None, None) => return None,
    };
    Some(format!("volume {} of share {share}", volume.name))
}

fn share_of(attributes: Option<&BTreeMap<String, String>>) -> String {
    attributes.and_then(|attributes| attributes.get(SHARE)).cloned().unwrap_or_else(|| "(none)".to_owned())
}

/// The message that lists the users.
pub(super) fn refusal(users: &[String]) -> String {
    let mut text = String::from("shares are in use, and nothing has been removed:");
    for user in users.iter().take(NAMED) {
        text.push_str("\n  ");
        text.push_str(user);
    }
    if users.len() > NAMED {
        text.push_str(&format!("\n  and {} more", users.len() - NAMED));
    }
    text.push_str("\nstop or move them first: their sessions end with the brokers, and the kubelet needs the driver to remove volumes");
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use virtiofs_config::{Access, EngineConfig};
    use virtiofs_crds::v1alpha1::ResolvedEngine;

    use super::*;

    fn pod(spec: Value, phase: &str) -> Pod {
        let pod = json!({"metadata": {"name": "vm-1", "namespace": "vms"}, "spec": spec, "status": {"phase": phase}});
        serde_json::from_value(pod).unwrap()
    }

    fn inline(driver: &str) -> Value {
        json!({"name": "data", "csi": {"driver": driver, "volumeAttributes": {"share": "images"}}})
    }

    fn claimed(claim: &str) -> Value {
        json!({"name": "pv", "persistentVolumeClaim": {"claimName": claim}})
    }

    fn on_node(volumes: &[Value]) -> Value {
        json!({"containers": [], "nodeName": "n1", "volumes": volumes})
    }

    fn volume(driver: &str, claim: Option<(&str, &str)>) -> PersistentVolume {
        let mut volume = json!({"metadata": {"name": "pv"}, "spec": {
            "csi": {"driver": driver, "volumeHandle": "h", "volumeAttributes": {"share": "isos"}},
        }});
        if let Some((namespace, name)) = claim {
            volume["spec"]["claimRef"] = json!({"namespace": namespace, "name": name});
        }
        serde_json::from_value(volume).unwrap()
    }

    #[test]
    fn pods_with_published_volumes_are_users() {
        let mut claims = Claims::default();
        claims.add(&volume(DRIVER, Some(("vms", "ours"))));
        claims.add(&volume("other.example.com", Some(("vms", "theirs"))));
        claims.add(&volume(DRIVER, Some(("others", "elsewhere"))));
        claims.add(&volume(DRIVER, None));
        let of = |spec: Value, phase: &str| of_pod(&pod(spec, phase), &claims);
        assert_eq!(
            of(on_node(&[claimed("other"), inline(DRIVER), claimed("ours")]), "Running").as_deref(),
            Some("pod vms/vm-1 on node n1, volume data of share images, volume pv of share isos")
        );
        for (what, spec, phase) in [
            ("another driver's", on_node(&[inline("other.example.com"), claimed("theirs")]), "Running"),
            ("a claim of that name elsewhere", on_node(&[claimed("elsewhere")]), "Running"),
            ("no volume", on_node(&[]), "Running"),
            ("on no node", json!({"containers": [], "volumes": [inline(DRIVER)]}), "Pending"),
            ("over", on_node(&[inline(DRIVER)]), "Succeeded"),
            ("over", on_node(&[inline(DRIVER)]), "Failed"),
        ] {
            assert_eq!(of(spec, phase), None, "{what}");
        }
        assert!(of(on_node(&[inline(DRIVER)]), "Pending").is_some());
    }

    #[test]
    fn exports_with_sessions_are_users() {
        let export = |status: Value| {
            let export = json!({
                "apiVersion": "virtiofs.dev/v1alpha1", "kind": "VirtiofsExport", "metadata": {"name": "e"},
                "spec": {"shareName": "images", "nodeName": "n1", "revision": "r", "mode": "Serve", "access": "ReadOnly",
                    "content": "Shared", "source": {"hostPath": {"path": "/srv"}}, "socket": {},
                    "engine": ResolvedEngine::from(&EngineConfig::stock(Access::ReadOnly)), "staleness": {}},
                "status": status,
            });
            of_export(&serde_json::from_value(export).unwrap())
        };
        let named = export(json!({"sessions": 2, "users": ["vms/vm-0", "vms/vm-1"]}));
        assert_eq!(named.as_deref(), Some("share images on node n1, 2 sessions: vms/vm-0, vms/vm-1"));
        assert_eq!(export(json!({"sessions": 1})).as_deref(), Some("share images on node n1, 1 sessions"));
        assert_eq!(export(json!({"sessions": 0, "users": []})), None);
        assert_eq!(export(json!({})), None);
    }

    #[test]
    fn the_message_lists_the_first_of_many() {
        let users: Vec<String> = (0..NAMED + 2).map(|n| format!("pod vms/vm-{n}")).collect();
        let text = refusal(&users);
        assert!(text.contains("\n  pod vms/vm-19\n  and 2 more\n") && !text.contains("vm-20"), "{text}");
        assert!(!refusal(&users[..1]).contains("more\n"));
    }
}
