//! Usage of a volume: that of its share's file system.

use virtiofs_csi::v1::VolumeUsage;
use virtiofs_csi::v1::volume_usage::Unit;

use crate::model::source::Space;

/// Bytes and inodes; `None` if unknown.
pub(super) fn usage(space: Option<Space>) -> Option<Vec<VolumeUsage>> {
    let space = space?;
    let of = |unit: Unit, (total, free): (u64, u64)| {
        let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        let (total, available, used) = (number(total), number(free), number(total.saturating_sub(free)));
        VolumeUsage { available, total, used, unit: unit.into() }
    };
    Some(vec![of(Unit::Bytes, space.bytes), of(Unit::Inodes, space.inodes)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_in_bytes_and_inodes() {
        assert_eq!(usage(None), None);
        let usage = usage(Some(Space { bytes: (100, 30), inodes: (7, 9) })).unwrap();
        let usage: Vec<_> = usage.iter().map(|it| (it.unit(), it.total, it.used, it.available)).collect();
        assert_eq!(usage, [(Unit::Bytes, 100, 70, 30), (Unit::Inodes, 7, 0, 9)]);
    }
}
