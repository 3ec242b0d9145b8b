//! The remedies for each cause, the gentlest first, and what each changes.

use serde::{Deserialize, Serialize};
use virtiofs_config::{CachePolicy, EngineConfig, InodeFileHandles, LONG_TIMEOUT_MS};
use virtiofs_contract::preflight::{HandleOutcome, Preflight};

use crate::{Cause, Content, Moment, Observation};

/// Causes with remedies, in the order in which they are handled: nothing else helps while the root is gone.
pub const CURABLE: [Cause; 3] = [Cause::SourceGone, Cause::HandleStale, Cause::FdExhausted];

/// Linux's default of `fs.nr_open`, the largest limit of open files.
const MOST_OPEN_FILES: u64 = 1_048_576;

/// A remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Remedy {
    /// Engines refer to inodes by file handle instead of by open file.
    FileHandles,
    /// Engines may open more files.
    OpenFiles {
        /// How many; `None`: as many as the hard limit allows.
        to: Option<u64>,
    },
    /// Guests cache names and attributes for a day. Only for content that nobody changes.
    LongerCaching,
    /// A new engine, which resolves everything again.
    HandOver,
}

impl Remedy {
    /// The name in status, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Remedy::FileHandles => "FileHandles",
            Remedy::OpenFiles { .. } => "OpenFiles",
            Remedy::LongerCaching => "LongerCaching",
            Remedy::HandOver => "HandOver",
        }
    }

    /// True if it changes the configuration.
    pub fn amends(self) -> bool {
        self != Remedy::HandOver
    }

    /// True if it may be repeated within an episode: each replacement of a source is a new problem.
    pub(crate) fn is_repeatable(self, cause: Cause) -> bool {
        cause == Cause::SourceGone
    }

    /// `config` with this remedy.
    pub(crate) fn amend(self, config: EngineConfig) -> EngineConfig {
        match self {
            // Not Mandatory: a file system of the share without file handles is served as well.
            Remedy::FileHandles => EngineConfig { inode_file_handles: InodeFileHandles::Prefer, ..config },
            Remedy::OpenFiles { to } => EngineConfig { open_files: to, ..config },
            Remedy::LongerCaching => Caching::LONGEST.put_in(config),
            Remedy::HandOver => config,
        }
    }

    /// The declared values of the fields that this remedy changes.
    pub(crate) fn replaced(self, declared: &EngineConfig) -> Replaced {
        match self {
            Remedy::FileHandles => Replaced::FileHandles(declared.inode_file_handles),
            Remedy::OpenFiles { .. } => Replaced::OpenFiles(declared.open_files),
            Remedy::LongerCaching => Replaced::Caching(Caching::of(declared)),
            Remedy::HandOver => Replaced::Nothing,
        }
    }

    /// Checks with a trial engine's result for the amended configuration whether the remedy has an effect; `before` is the
    /// result for the active configuration. No guest is affected.
    ///
    /// # Errors
    /// Why it has none.
    pub fn check(self, before: &Preflight, found: &Preflight) -> Result<(), Blocker> {
        match self {
            Remedy::FileHandles if found.inode_file_handles == InodeFileHandles::Never => Err(handles(found)),
            Remedy::OpenFiles { .. } if found.open_files <= before.open_files => {
                Err(Blocker::HardLimit { open_files: found.open_files })
            }
            _ => Ok(()),
        }
    }
}

/// A change of the configuration by a remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Amendment {
    /// The remedy.
    pub remedy: Remedy,
    /// The cause it is for.
    pub cause: Cause,
    /// Since when.
    pub since: Moment,
    pub(crate) replaced: Replaced,
}

/// The declared values that a remedy replaced. When a person changes one of them, the remedy is reverted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Replaced {
    FileHandles(InodeFileHandles),
    OpenFiles(Option<u64>),
    Caching(Caching),
    Nothing,
}

/// How long guests cache.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Caching {
    cache: CachePolicy,
    entry_ms: u64,
    attr_ms: u64,
    negative_ms: u64,
}

impl Caching {
    const LONGEST: Caching = Caching {
        cache: CachePolicy::Always,
        entry_ms: LONG_TIMEOUT_MS,
        attr_ms: LONG_TIMEOUT_MS,
        negative_ms: LONG_TIMEOUT_MS,
    };

    fn of(config: &EngineConfig) -> Self {
        Caching {
            cache: config.cache,
            entry_ms: config.entry_timeout_ms,
            attr_ms: config.attr_timeout_ms,
            negative_ms: config.negative_timeout_ms,
        }
    }

    fn put_in(self, config: EngineConfig) -> EngineConfig {
        EngineConfig {
            cache: self.cache,
            entry_timeout_ms: self.entry_ms,
            attr_timeout_ms: self.attr_ms,
            negative_timeout_ms: self.negative_ms,
            ..config
        }
    }
}

/// Why a remedy is not possible, or did not help.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Blocker {
    /// The file system has no file handles.
    NoHandles {
        /// Its type.
        fs_type: String,
    },
    /// Opening by file handle is not permitted.
    HandlesForbidden {
        /// Type of the file system.
        fs_type: String,
    },
    /// The limit of open files cannot be higher than this.
    HardLimit {
        /// The limit.
        open_files: u64,
    },
    /// It was applied, and the events continued.
    Ineffective,
    /// The broker rejected it; its message.
    Rejected(String),
}

/// Why file handles do not work here.
pub(crate) fn handles(found: &Preflight) -> Blocker {
    let of = |outcome| found.mounts.iter().find(|mount| mount.file_handles == outcome);
    if let Some(mount) = of(HandleOutcome::Unsupported) {
        return Blocker::NoHandles { fs_type: mount.fs_type.clone() };
    }
    let forbidden = of(HandleOutcome::NotPermitted).or_else(|| found.mounts.first());
    Blocker::HandlesForbidden { fs_type: forbidden.map_or_else(String::new, |mount| mount.fs_type.clone()) }
}

/// The declared configuration with the remedies.
pub(crate) fn amended(declared: &EngineConfig, amendments: &[Amendment]) -> EngineConfig {
    amendments.iter().fold(declared.clone(), |config, amendment| amendment.remedy.amend(config))
}

/// The remedies for a cause that are possible as far as known, in the order in which they are tried.
pub(crate) fn candidates(cause: Cause, observation: &Observation<'_>, amendments: &[Amendment]) -> Vec<Remedy> {
    match cause {
        Cause::SourceGone | Cause::HandleStale => vec![Remedy::HandOver],
        // More open files do not help a guest that is at its inode limit.
        Cause::FdExhausted if observation.sessions.iter().any(|session| session.full) => Vec::new(),
        Cause::FdExhausted => room(observation, amendments),
        Cause::SourceReplaced | Cause::SourceRemoved | Cause::SourceHung | Cause::Fenced => Vec::new(),
    }
}

/// Remedies for an engine that has no open files left.
fn room(observation: &Observation<'_>, amendments: &[Amendment]) -> Vec<Remedy> {
    let config = amended(observation.declared, amendments);
    // With any value but Never they are used where they work.
    let handles = (config.inode_file_handles == InodeFileHandles::Never).then_some(Remedy::FileHandles);
    let longest = Caching::of(&config) == Caching::LONGEST;
    let caching = (observation.content == Content::Immutable && !longest).then_some(Remedy::LongerCaching);
    [handles, more_files(observation, amendments), caching].into_iter().flatten().collect()
}

/// First the hard limit, then four times the present limit if that is permitted; not more.
fn more_files(observation: &Observation<'_>, amendments: &[Amendment]) -> Option<Remedy> {
    let amended = amendments.iter().rev().find_map(|amendment| match amendment.remedy {
        Remedy::OpenFiles { to } => Some(to),
        _ => None,
    });
    if observation.declared.open_files.is_some() && amended.is_none() {
        return Some(Remedy::OpenFiles { to: None });
    }
    let limits = observation.sessions.iter().filter_map(|session| session.preflight).map(|found| found.open_files);
    let limit = limits.min().unwrap_or(observation.preflight.open_files);
    let more = limit.saturating_mul(4).min(MOST_OPEN_FILES);
    (amended.flatten().is_none() && more > limit).then_some(Remedy::OpenFiles { to: Some(more) })
}

/// An amendment that is made now.
pub(crate) fn amendment(remedy: Remedy, cause: Cause, declared: &EngineConfig, since: Moment) -> Amendment {
    Amendment { remedy, cause, since, replaced: remedy.replaced(declared) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::samples::{SampleShare, files};

    fn of(share: &SampleShare, amendments: &[Remedy]) -> Vec<Remedy> {
        let made = |remedy: &Remedy| amendment(*remedy, Cause::FdExhausted, &share.declared, Moment::default());
        candidates(Cause::FdExhausted, &share.observe(), &amendments.iter().map(made).collect::<Vec<_>>())
    }

    #[test]
    fn candidates_for_an_engine_without_open_files() {
        use Content::{Immutable, Shared};
        use InodeFileHandles::{Never, Prefer};
        use Remedy::{FileHandles, LongerCaching, OpenFiles};
        let hard = OpenFiles { to: None };
        let beyond = files(8000);
        type Case<'a> = (&'a str, InodeFileHandles, Option<u64>, Content, bool, &'a [Remedy], &'a [Remedy]);
        let cases: &[Case<'_>] = &[
            ("all of it", Never, Some(2000), Immutable, false, &[], &[FileHandles, hard, LongerCaching]),
            ("handles in use", Prefer, Some(2000), Immutable, false, &[], &[hard, LongerCaching]),
            ("content that others change", Never, Some(2000), Shared, false, &[], &[FileHandles, hard]),
            ("nothing asked for: the hard limit is in force", Prefer, None, Shared, false, &[], &[beyond]),
            ("cached as long as can be", Prefer, None, Immutable, true, &[], &[beyond]),
            ("handles amended", Never, Some(2000), Shared, false, &[FileHandles], &[hard]),
            ("and the hard limit", Never, Some(2000), Shared, false, &[FileHandles, hard], &[beyond]),
            ("and more", Never, Some(2000), Shared, false, &[FileHandles, hard, beyond], &[]),
            ("everything", Prefer, None, Immutable, false, &[beyond, LongerCaching], &[]),
        ];
        for (what, handles, open_files, content, longest, amendments, expected) in cases {
            let mut share = SampleShare { content: *content, ..SampleShare::default() };
            share.declared.inode_file_handles = *handles;
            share.declared.open_files = *open_files;
            if *longest {
                share.declared = Caching::LONGEST.put_in(share.declared);
            }
            assert_eq!(of(&share, amendments), *expected, "{what}");
        }
    }

    #[test]
    fn there_is_no_remedy_for_full_inodes_or_the_largest_limit() {
        let mut share = SampleShare { full: true, ..SampleShare::default() };
        assert_eq!(of(&share, &[]), []);
        share.full = false;
        share.preflight.open_files = MOST_OPEN_FILES;
        assert_eq!(of(&share, &[]), []);
    }

    #[test]
    fn changes_of_the_source_have_no_remedy() {
        let share = SampleShare::default();
        for cause in [Cause::SourceReplaced, Cause::SourceRemoved, Cause::SourceHung, Cause::Fenced] {
            assert_eq!(candidates(cause, &share.observe(), &[]), [], "{cause:?}");
        }
        for cause in [Cause::SourceGone, Cause::HandleStale] {
            assert_eq!(candidates(cause, &share.observe(), &[]), [Remedy::HandOver], "{cause:?}");
        }
    }

    #[test]
    fn a_check_without_gain_is_a_blocker() {
        let before = SampleShare::default().preflight;
        let mut found = before.clone();
        assert_eq!(Remedy::FileHandles.check(&before, &found), Ok(()));
        assert_eq!(files(8000).check(&before, &found), Err(Blocker::HardLimit { open_files: 2000 }));
        found.open_files = 4000;
        assert_eq!(files(8000).check(&before, &found), Ok(()));
        found.inode_file_handles = InodeFileHandles::Never;
        found.mounts[0].file_handles = HandleOutcome::NotPermitted;
        let forbidden = Blocker::HandlesForbidden { fs_type: "ext4".into() };
        assert_eq!(Remedy::FileHandles.check(&before, &found), Err(forbidden));
        found.mounts[0].file_handles = HandleOutcome::Unsupported;
        assert_eq!(Remedy::FileHandles.check(&before, &found), Err(Blocker::NoHandles { fs_type: "ext4".into() }));
    }
}
