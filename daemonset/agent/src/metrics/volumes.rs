//! Volumes, and pods that were refused one.

use std::collections::BTreeMap;

use prometheus::proto::MetricFamily;

use super::sample::Family;
use crate::csi::RefusalCounts;
use crate::offer::share_name;
use crate::volume::Standing;

/// Families of an agent that serves volumes; others have none.
pub(super) fn families(volumes: &BTreeMap<String, Standing>, refusals: &RefusalCounts) -> Vec<MetricFamily> {
    let mut counts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (endpoint, standing) in volumes.iter().filter(|(_, standing)| **standing != Standing::Leaving) {
        let (all, listening) = counts.entry(share_name(endpoint)).or_default();
        *all += 1;
        *listening += u64::from(*standing == Standing::Listening);
    }
    let mut all = Family::gauge("virtiofs_volumes", "Volumes of pods on this node.");
    let mut listening = Family::gauge("virtiofs_volumes_listening", "Those of them at which a VM may connect.");
    for (share, (count, served)) in counts {
        all.value(&[("share", share)], count as f64);
        listening.value(&[("share", share)], served as f64);
    }
    let mut refused = Family::counter(
        "virtiofs_volume_refusals_total",
        "Requests of pods for a share that were refused; shares that the node does not have are counted together.",
    );
    for ((share, reason), count) in refusals.all() {
        refused.count(&[("share", &share), ("reason", reason.as_str())], count);
    }
    [all, listening, refused].into_iter().filter_map(Family::finish).collect()
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    #[test]
    fn volumes_are_counted_by_share() {
        let volumes = [
            ("a.v-1", Standing::Listening),
            ("a.v-2", Standing::Waiting),
            ("a.v-3", Standing::Leaving),
            ("b.v-1", Standing::Leaving),
        ];
        let volumes = volumes.into_iter().map(|(name, standing)| (name.to_owned(), standing)).collect();
        let text = TextEncoder::new().encode_to_string(&families(&volumes, &RefusalCounts::default())).unwrap();
        let values: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(values, ["virtiofs_volumes{share=\"a\"} 2", "virtiofs_volumes_listening{share=\"a\"} 1"]);
    }
}
