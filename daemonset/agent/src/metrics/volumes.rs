//! Metrics of volumes and of rejected volume requests.

use std::collections::BTreeMap;

use prometheus::proto::MetricFamily;
use virtiofs_client::endpoint::share_of;
use virtiofs_client::metrics::Family;

use crate::csi::RejectionCounts;
use crate::model::volume::VolumeState;

/// The families; empty for an agent that does not serve volumes.
pub(super) fn families(volumes: &BTreeMap<String, VolumeState>, rejections: &RejectionCounts) -> Vec<MetricFamily> {
    let mut counts: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (endpoint, state) in volumes.iter().filter(|(_, state)| **state != VolumeState::Terminating) {
        let (all, listening) = counts.entry(share_of(endpoint)).or_default();
        *all += 1;
        *listening += u64::from(*state == VolumeState::Listening);
    }
    let mut all = Family::gauge("virtiofs_volumes", "Volumes of pods on this node.");
    let mut listening = Family::gauge("virtiofs_volumes_listening", "Volumes of pods at which a VM may connect.");
    for (share, (count, served)) in counts {
        all.value(&[("share", share)], count as f64);
        listening.value(&[("share", share)], served as f64);
    }
    let mut rejected = Family::counter(
        "virtiofs_volume_rejections_total",
        "Rejected volume requests of pods; requests for unknown shares are counted together.",
    );
    for ((share, reason), count) in rejections.all() {
        rejected.count(&[("share", &share), ("reason", reason.as_str())], count);
    }
    [all, listening, rejected].into_iter().filter_map(Family::finish).collect()
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    #[test]
    fn volumes_are_counted_by_share() {
        let volumes = [
            ("a.volume.1", VolumeState::Listening),
            ("a.volume.2", VolumeState::Waiting),
            ("a.volume.3", VolumeState::Terminating),
            ("b.volume.1", VolumeState::Terminating),
        ];
        let volumes = volumes.into_iter().map(|(name, state)| (name.to_owned(), state)).collect();
        let text = TextEncoder::new().encode_to_string(&families(&volumes, &RejectionCounts::default())).unwrap();
        let values: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(values, ["virtiofs_volumes{share=\"a\"} 2", "virtiofs_volumes_listening{share=\"a\"} 1"]);
    }
}
