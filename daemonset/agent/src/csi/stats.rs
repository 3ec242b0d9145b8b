//! Usage of a volume, which is that of its share's file system, and its condition.

use std::time::{Duration, UNIX_EPOCH};

use virtiofs_contract::control::LostSession;
use virtiofs_csi::v1::volume_usage::Unit;
use virtiofs_csi::v1::{VolumeCondition, VolumeUsage};

use crate::model::source::Space;
use crate::model::volume::VolumeState;

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

/// Abnormal if a guest lost the volume and hangs, or if no VM may connect to it. A broker that is being replaced is normal.
pub(super) fn condition(lost: Option<&LostSession>, state: Option<&VolumeState>) -> VolumeCondition {
    if let Some(LostSession { at, session }) = lost {
        let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(*at));
        let message = format!(
            "SessionLost: session {session} ended with the broker at {at} and could not be restored; the guest's mount \
             hangs: restart the VM"
        );
        return VolumeCondition { abnormal: true, message };
    }
    let (abnormal, message) = match state {
        Some(VolumeState::Rejected(notice)) => (true, format!("{}: {}", notice.reason.as_str(), notice.message)),
        Some(VolumeState::Terminating) => (false, "the volume is being removed".to_owned()),
        Some(VolumeState::Waiting) | None => (false, "the volume will be served in a moment".to_owned()),
        Some(VolumeState::Listening) => (false, "the volume is served".to_owned()),
    };
    VolumeCondition { abnormal, message }
}

#[cfg(test)]
mod tests {
    use virtiofs_client::notice::{Notice, NoticeReason};

    use super::*;

    #[test]
    fn a_volume_that_no_guest_can_use_is_abnormal() {
        let lost = LostSession { at: 1_764_561_600, session: "images.v-1-7".into() };
        let refused = VolumeState::Rejected(Notice::new(NoticeReason::NotServed, "no VM may connect", "r"));
        let of = |lost, state| {
            let VolumeCondition { abnormal, message } = condition(lost, state);
            (abnormal, message)
        };
        assert_eq!(of(None, Some(&VolumeState::Listening)), (false, "the volume is served".into()));
        assert!(!of(None, None).0 && !of(None, Some(&VolumeState::Waiting)).0);
        assert_eq!(of(None, Some(&refused)), (true, "NotServed: no VM may connect".into()));
        let (abnormal, message) = of(Some(&lost), Some(&VolumeState::Listening));
        assert!(abnormal && message.starts_with("SessionLost: session images.v-1-7 ended"), "{message}");
        assert!(message.contains("2025-12-01T04:00:00Z"), "{message}");
    }

    #[test]
    fn usage_is_in_bytes_and_inodes() {
        assert_eq!(usage(None), None);
        let usage = usage(Some(Space { bytes: (100, 30), inodes: (7, 9) })).unwrap();
        let usage: Vec<_> = usage.iter().map(|it| (it.unit(), it.total, it.used, it.available)).collect();
        assert_eq!(usage, [(Unit::Bytes, 100, 70, 30), (Unit::Inodes, 7, 0, 9)]);
    }
}
