//! Versions of the messages, and which one two processes speak. Pure.

use std::fmt;

/// Version of every message in this crate. It increases at most once a release, if a message has changed.
pub const VERSION: u32 = 5;

/// The oldest version that this release speaks: that of the release before it.
pub const OLDEST: u32 = 4;

/// The versions that a process speaks: from the oldest to the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The oldest one.
    pub oldest: u32,
    /// The newest one.
    pub newest: u32,
}

impl Versions {
    /// Those of this program.
    pub const OURS: Versions = Versions { oldest: OLDEST, newest: VERSION };

    /// Those of a first message. One of version 4 names no newest version.
    pub fn of_message(version: u32, newest: Option<u32>) -> Self {
        Versions { oldest: version, newest: newest.unwrap_or(version) }
    }

    /// The highest version that both speak.
    pub fn common(self, other: Versions) -> Option<u32> {
        let (oldest, newest) = (self.oldest.max(other.oldest), self.newest.min(other.newest));
        (oldest <= newest).then_some(newest)
    }

    /// True if the process speaks this version.
    pub fn include(self, version: u32) -> bool {
        (self.oldest..=self.newest).contains(&version)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Versions { oldest, newest } if oldest == newest => write!(f, "version {oldest}"),
            Versions { oldest, newest } => write!(f, "versions {oldest} to {newest}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn highest_common_version_is_spoken() {
        let versions = |oldest, newest| Versions { oldest, newest };
        for (ours, theirs, common) in [
            (versions(4, 5), versions(4, 5), Some(5)),
            (versions(4, 5), versions(5, 6), Some(5)),
            (versions(4, 5), versions(3, 4), Some(4)),
            (versions(4, 5), Versions::of_message(4, None), Some(4)),
            (versions(4, 5), versions(6, 7), None),
            (versions(4, 5), versions(2, 3), None),
            (versions(4, 5), versions(5, 4), None),
            (versions(0, u32::MAX), versions(4, 5), Some(5)),
        ] {
            assert_eq!(ours.common(theirs), common, "{ours} and {theirs}");
            assert_eq!(theirs.common(ours), common, "{theirs} and {ours}");
        }
    }

    #[test]
    fn neighbouring_releases_have_a_common_version() {
        let next = Versions { oldest: VERSION, newest: VERSION + 1 };
        let previous = Versions { oldest: OLDEST - 1, newest: OLDEST };
        assert_eq!(Versions::OURS.common(next), Some(VERSION));
        assert_eq!(Versions::OURS.common(previous), Some(OLDEST));
        assert!(Versions::OURS.include(OLDEST) && Versions::OURS.include(VERSION));
        assert!(!Versions::OURS.include(OLDEST - 1) && !Versions::OURS.include(VERSION + 1));
    }
}
