//! Which namespaces may use a share. Pure, except that the labels of a namespace are read if they matter.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt};
use kube::{Api, Client};
use tonic::Status;
use virtiofs_crds::v1alpha1::Consumers;

/// The verdict from a share's consumers and a namespace's name.
#[derive(Debug, PartialEq)]
enum Verdict {
    Admitted,
    Rejected,
    /// Depends on the namespace's labels.
    Selected(LabelSelector),
}

fn verdict(consumers: &Consumers, namespace: &str) -> Verdict {
    let Some(namespaces) = &consumers.namespaces else { return Verdict::Rejected };
    if namespaces.match_names.iter().any(|name| name == namespace) {
        return Verdict::Admitted;
    }
    namespaces.selector.as_ref().map_or(Verdict::Rejected, |selector| Verdict::Selected(LabelSelector::from(selector)))
}

/// An invalid selector selects nothing.
fn selects(selector: LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    Selector::try_from(selector).is_ok_and(|selector| !selector.selects_all() && selector.matches(labels))
}

/// True if pods of this namespace may use the share.
///
/// # Errors
/// `UNAVAILABLE`: the labels matter and cannot be read now.
pub(super) async fn admits(client: &Client, consumers: &Consumers, namespace: &str) -> Result<bool, Status> {
    let selector = match verdict(consumers, namespace) {
        Verdict::Admitted => return Ok(true),
        Verdict::Rejected => return Ok(false),
        Verdict::Selected(selector) => selector,
    };
    let found = Api::<Namespace>::all(client.clone()).get_opt(namespace).await.map_err(|error| {
        Status::unavailable(format!(
            "whether namespace {namespace} is among the share's consumers depends on its labels, which cannot be read \
             from the API server now: {error}"
        ))
    })?;
    let labels = found.and_then(|namespace| namespace.metadata.labels);
    Ok(labels.is_some_and(|labels| selects(selector, &labels)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_named_or_selected_namespaces_are_admitted() {
        let consumers = |value| serde_json::from_value::<Consumers>(value).unwrap();
        let named = consumers(json!({"namespaces": {"matchNames": ["vms", "ci"]}}));
        assert_eq!(verdict(&named, "vms"), Verdict::Admitted);
        for other in ["vm", "vms2", "", "VMS"] {
            assert_eq!(verdict(&named, other), Verdict::Rejected, "{other:?}");
        }
        assert_eq!(verdict(&Consumers::default(), "vms"), Verdict::Rejected);
        let selected = consumers(json!({"namespaces": {
            "matchNames": ["ci"],
            "selector": {"matchLabels": {"team": "a"}, "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["x"]}]},
        }}));
        assert_eq!(verdict(&selected, "ci"), Verdict::Admitted);
        let Verdict::Selected(selector) = verdict(&selected, "vms") else { panic!("its labels matter") };
        for (labels, expected) in [
            (json!({"team": "a"}), true),
            (json!({"team": "a", "tier": "x"}), false),
            (json!({"team": "b"}), false),
            (json!({}), false),
        ] {
            let labels: BTreeMap<String, String> = serde_json::from_value(labels).unwrap();
            assert_eq!(selects(selector.clone(), &labels), expected, "{labels:?}");
        }
        assert!(!selects(LabelSelector::default(), &BTreeMap::new()), "an empty selector admits nobody");
    }
}
