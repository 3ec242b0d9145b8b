//! How full a volume is: as full as the file system of its share.

use virtiofs_csi::v1::VolumeUsage;
use virtiofs_csi::v1::volume_usage::Unit;

use crate::source::Space;

/// Bytes and inodes; none where nothing is known.
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
    fn room_is_told_in_bytes_and_inodes() {
        assert_eq!(usage(None), None);
        let told = usage(Some(Space { bytes: (100, 30), inodes: (7, 9) })).unwrap();
        let told: Vec<_> = told.iter().map(|it| (it.unit(), it.total, it.used, it.available)).collect();
        assert_eq!(told, [(Unit::Bytes, 100, 70, 30), (Unit::Inodes, 7, 0, 9)]);
    }
}
