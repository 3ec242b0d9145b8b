//! The user and group ids that this process's user namespace maps.
//!
//! The engine of an ordinary user has a user namespace in which that user's ids are the only ones. The kernel answers
//! `EINVAL` to a change to any other id, which programs in a guest take for a mistake of their own. The right answer is
//! `EPERM`: the id is valid, and this engine may not use it.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::{getegid, geteuid};
use virtiofs_config::EngineConfig;
use virtiofs_contract::preflight::{Finding, Reason};

/// Ids that distributions give to people and services. Fewer than these are worth a notice.
const ORDINARY_IDS: u64 = 65_534;

/// Reads the maps of this process, also after it has left the directory tree that /proc is in.
pub(crate) struct IdMapFiles {
    proc_self: std::os::fd::OwnedFd,
}

impl IdMapFiles {
    /// Opens `/proc/self`.
    pub(crate) fn open() -> io::Result<Self> {
        let proc_self = open("/proc/self", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(IdMapFiles { proc_self })
    }

    /// The ids that are mapped now.
    pub(crate) fn read(&self) -> io::Result<MappedIds> {
        Ok(MappedIds { users: ranges(&self.text("uid_map")?), groups: ranges(&self.text("gid_map")?) })
    }

    fn text(&self, name: &str) -> io::Result<String> {
        let file = openat(&self.proc_self, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }
}

/// Ids that exist in this process's user namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MappedIds {
    users: Vec<Range<u64>>,
    groups: Vec<Range<u64>>,
}

impl MappedIds {
    /// True if the user exists.
    pub(crate) fn has_user(&self, uid: u32) -> bool {
        has(&self.users, uid)
    }

    /// True if the group exists.
    pub(crate) fn has_group(&self, gid: u32) -> bool {
        has(&self.groups, gid)
    }

    /// The notice for a writable share that few users of a guest can create files in: few ids are mapped, or the engine
    /// may not switch to others (`switches`). None if the configuration translates ids: which ones the guest has then is
    /// its author's concern.
    pub(crate) fn finding(&self, config: &EngineConfig, switches: bool) -> Option<Finding> {
        let translated = !config.uid_translation.is_empty() && !config.gid_translation.is_empty();
        let count = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>();
        let few = count(&self.users) < ORDINARY_IDS || count(&self.groups) < ORDINARY_IDS;
        (config.writable() && (few || !switches) && !translated).then(few_ids)
    }
}

fn few_ids() -> Finding {
    let (uid, gid) = (geteuid(), getegid());
    Finding {
        reason: Reason::GuestUsersRestricted,
        message: format!(
            "the broker runs as an ordinary user: only root and uid {uid}, gid {gid} of a guest can create files, others \
             get EPERM, and no file can be given to another owner"
        ),
        remedy: format!(
            "let all users of the guest act as this user: set spec.engine.uidTranslation to \
             [{{type: SquashGuest, from: 0, to: {uid}, count: 4294967295}}] and gidTranslation likewise to {gid}; or run the \
             broker as root"
        ),
    }
}

fn has(ranges: &[Range<u64>], id: u32) -> bool {
    ranges.iter().any(|range| range.contains(&id.into()))
}

/// The ranges of ids inside the namespace, from the text of a map.
fn ranges(map: &str) -> Vec<Range<u64>> {
    let range = |line: &str| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().ok());
        let (first, _outside, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        Some(first..first.saturating_add(count))
    };
    map.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use virtiofs_config::{Access, IdTranslation, IdTranslationKind};

    use super::*;

    fn mapped(map: &str) -> MappedIds {
        MappedIds { users: ranges(map), groups: ranges(map) }
    }

    #[test]
    fn only_mapped_ids_exist() {
        let one = mapped("      1234       1234          1\n");
        assert!(one.has_user(1234) && one.has_group(1234));
        assert!(!one.has_user(0) && !one.has_group(1235));
        let more = mapped("0 1234 1\n1 100000 65536\n");
        assert!(more.has_user(65_536) && !more.has_user(65_537));
        assert!(mapped("0 0 4294967295\n").has_group(u32::MAX - 1));
    }

    #[test]
    fn a_writable_share_with_few_ids_has_a_notice() {
        let (few, all) = (mapped("1234 1234 1\n"), mapped("0 0 4294967295\n"));
        let writable = EngineConfig::stock(Access::ReadWrite);
        assert_eq!(few.finding(&writable, true).unwrap().reason, Reason::GuestUsersRestricted);
        assert_eq!(few.finding(&EngineConfig::stock(Access::ReadOnly), false), None);
        assert_eq!(all.finding(&writable, true), None);
        assert!(all.finding(&writable, false).is_some());
        let squash = IdTranslation { kind: IdTranslationKind::SquashGuest, from: 0, to: 1234, count: u32::MAX };
        let squashed =
            EngineConfig { uid_translation: vec![squash.clone()], gid_translation: vec![squash], ..writable };
        assert_eq!(few.finding(&squashed, false), None);
    }
}
