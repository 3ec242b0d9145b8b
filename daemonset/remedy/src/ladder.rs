//! Which remedies there are for a cause, the gentlest first, and what each changes.

use serde::{Deserialize, Serialize};
use virtiofs_config::{CachePolicy, EngineConfig, InodeFileHandles, LONG_TIMEOUT_MS};
use virtiofs_contract::preflight::{HandleOutcome, Preflight};

use crate::history::Amendment;
use crate::{Cause, Content, Moment, Observation};

/// Causes for which there are remedies, in the order in which they are seen to: what a root that is gone has made
/// stale, nothing else cures.
pub const CURABLE: [Cause; 3] = [Cause::SourceGone, Cause::HandleStale, Cause::FdExhausted];

/// As many open files as Linux lets a process have unless somebody has raised `fs.nr_open`.
const MOST_OPEN_FILES: u64 = 1_048_576;

/// One remedy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Rung {
    /// Inodes that the guest holds are kept as file handles rather than open files.
    FileHandles,
    /// Engines may open more files.
    OpenFiles {
        /// How many; none: as many as the hard limit of the place allows.
        to: Option<u64>,
    },
    /// Guests trust for a day what they were told, so that they ask less. Only for content that nobody changes.
    LongerCaching,
    /// Another engine, which finds everything anew.
    HandOver,
}

impl Rung {
    /// The word as it stands in status, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Rung::FileHandles => "FileHandles",
            Rung::OpenFiles { .. } => "OpenFiles",
            Rung::LongerCaching => "LongerCaching",
            Rung::HandOver => "HandOver",
        }
    }

    /// Does it change the configuration?
    pub fn amends(self) -> bool {
        self != Rung::HandOver
    }

    /// May it be tried again for the same trouble? Each time that a source is replaced is a trouble of its own.
    pub(crate) fn wears_off(self, cause: Cause) -> bool {
        cause == Cause::SourceGone
    }

    /// `config` with this remedy in it.
    pub(crate) fn amend(self, config: EngineConfig) -> EngineConfig {
        match self {
            // Not Mandatory: a file system of the share that makes no handles is served all the same.
            Rung::FileHandles => EngineConfig { inode_file_handles: InodeFileHandles::Prefer, ..config },
            Rung::OpenFiles { to } => EngineConfig { open_files: to, ..config },
            Rung::LongerCaching => Caching::LONGEST.put_in(config),
            Rung::HandOver => config,
        }
    }

    /// What `declared` says in the fields that this remedy changes.
    pub(crate) fn instead_of(self, declared: &EngineConfig) -> InsteadOf {
        match self {
            Rung::FileHandles => InsteadOf::FileHandles(declared.inode_file_handles),
            Rung::OpenFiles { .. } => InsteadOf::OpenFiles(declared.open_files),
            Rung::LongerCaching => InsteadOf::Caching(Caching::of(declared)),
            Rung::HandOver => InsteadOf::Nothing,
        }
    }

    /// Would it be what it promises? Asked of a trial engine with the amended configuration, before any guest is
    /// touched; `before` is what was found with the configuration in force.
    ///
    /// # Errors
    /// What stands in the way.
    pub fn holds(self, before: &Preflight, found: &Preflight) -> Result<(), Obstacle> {
        match self {
            Rung::FileHandles if found.inode_file_handles == InodeFileHandles::Never => Err(handles(found)),
            Rung::OpenFiles { .. } if found.open_files <= before.open_files => {
                Err(Obstacle::HardLimit { open_files: found.open_files })
            }
            _ => Ok(()),
        }
    }
}

/// What a share declared in the fields that a remedy has changed: if it says something else one day, somebody has
/// decided, and the remedy is taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum InsteadOf {
    FileHandles(InodeFileHandles),
    OpenFiles(Option<u64>),
    Caching(Caching),
    Nothing,
}

/// How boldly guests cache.
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

/// Why a remedy is not to be had, or has not helped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Obstacle {
    /// The file system makes no file handles.
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
    /// It was in force, and things went on as before.
    NotHelped,
    /// The broker would not have it; its words.
    Refused(String),
}

/// Why file handles do not work, given that they do not.
pub(crate) fn handles(found: &Preflight) -> Obstacle {
    let of = |outcome| found.mounts.iter().find(|mount| mount.file_handles == outcome);
    if let Some(mount) = of(HandleOutcome::Unsupported) {
        return Obstacle::NoHandles { fs_type: mount.fs_type.clone() };
    }
    let forbidden = of(HandleOutcome::NotPermitted).or_else(|| found.mounts.first());
    Obstacle::HandlesForbidden { fs_type: forbidden.map_or_else(String::new, |mount| mount.fs_type.clone()) }
}

/// The configuration that engines are to run with: what is declared, with the remedies in it.
pub(crate) fn amended(declared: &EngineConfig, amendments: &[Amendment]) -> EngineConfig {
    amendments.iter().fold(declared.clone(), |config, amendment| amendment.rung.amend(config))
}

/// The remedies for a cause that are possible as far as is known, in the order in which they are tried.
pub(crate) fn ladder(cause: Cause, seen: &Observation<'_>, amendments: &[Amendment]) -> Vec<Rung> {
    match cause {
        Cause::SourceGone | Cause::HandleStale => vec![Rung::HandOver],
        // More room for open files is no room for inodes.
        Cause::FdExhausted if seen.sessions.iter().any(|session| session.full) => Vec::new(),
        Cause::FdExhausted => room(seen, amendments),
        Cause::SourceReplaced | Cause::SourceRemoved | Cause::SourceHung | Cause::Fenced => Vec::new(),
    }
}

/// Remedies for an engine that has run out of open files.
fn room(seen: &Observation<'_>, amendments: &[Amendment]) -> Vec<Rung> {
    let config = amended(seen.declared, amendments);
    // With anything but Never they are in use where they work.
    let handles = (config.inode_file_handles == InodeFileHandles::Never).then_some(Rung::FileHandles);
    let longest = Caching::of(&config) == Caching::LONGEST;
    let caching = (seen.content == Content::Immutable && !longest).then_some(Rung::LongerCaching);
    [handles, more_files(seen, amendments), caching].into_iter().flatten().collect()
}

/// First as many as the place allows, then four times as many as are allowed, should that be permitted; no more.
fn more_files(seen: &Observation<'_>, amendments: &[Amendment]) -> Option<Rung> {
    let amended = amendments.iter().rev().find_map(|amendment| match amendment.rung {
        Rung::OpenFiles { to } => Some(to),
        _ => None,
    });
    if seen.declared.open_files.is_some() && amended.is_none() {
        return Some(Rung::OpenFiles { to: None });
    }
    let limits = seen.sessions.iter().filter_map(|session| session.preflight).map(|found| found.open_files);
    let limit = limits.min().unwrap_or(seen.preflight.open_files);
    let more = limit.saturating_mul(4).min(MOST_OPEN_FILES);
    (amended.flatten().is_none() && more > limit).then_some(Rung::OpenFiles { to: Some(more) })
}

/// An amendment as it is made now.
pub(crate) fn amendment(rung: Rung, cause: Cause, declared: &EngineConfig, since: Moment) -> Amendment {
    Amendment { rung, cause, since, instead_of: rung.instead_of(declared) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::samples::{Place, files};

    fn rungs(place: &Place, amendments: &[Rung]) -> Vec<Rung> {
        let made = |rung: &Rung| amendment(*rung, Cause::FdExhausted, &place.declared, Moment::default());
        ladder(Cause::FdExhausted, &place.observe(), &amendments.iter().map(made).collect::<Vec<_>>())
    }

    #[test]
    fn the_ladder_of_an_engine_that_is_out_of_files() {
        use Content::{Immutable, Shared};
        use InodeFileHandles::{Never, Prefer};
        use Rung::{FileHandles, LongerCaching, OpenFiles};
        let hard = OpenFiles { to: None };
        let beyond = files(8000);
        type Case<'a> = (&'a str, InodeFileHandles, Option<u64>, Content, bool, &'a [Rung], &'a [Rung]);
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
            let mut place = Place { content: *content, ..Place::default() };
            place.declared.inode_file_handles = *handles;
            place.declared.open_files = *open_files;
            if *longest {
                place.declared = Caching::LONGEST.put_in(place.declared);
            }
            assert_eq!(rungs(&place, amendments), *expected, "{what}");
        }
    }

    #[test]
    fn where_inodes_are_full_or_files_as_many_as_linux_allows_there_is_no_rung() {
        let mut place = Place { full: true, ..Place::default() };
        assert_eq!(rungs(&place, &[]), []);
        place.full = false;
        place.preflight.open_files = MOST_OPEN_FILES;
        assert_eq!(rungs(&place, &[]), []);
    }

    #[test]
    fn what_others_do_to_the_source_has_no_remedy_of_ours() {
        let place = Place::default();
        for cause in [Cause::SourceReplaced, Cause::SourceRemoved, Cause::SourceHung, Cause::Fenced] {
            assert_eq!(ladder(cause, &place.observe(), &[]), [], "{cause:?}");
        }
        for cause in [Cause::SourceGone, Cause::HandleStale] {
            assert_eq!(ladder(cause, &place.observe(), &[]), [Rung::HandOver], "{cause:?}");
        }
    }

    #[test]
    fn a_trial_that_finds_no_gain_is_an_obstacle() {
        let before = Place::default().preflight;
        let mut found = before.clone();
        assert_eq!(Rung::FileHandles.holds(&before, &found), Ok(()));
        assert_eq!(files(8000).holds(&before, &found), Err(Obstacle::HardLimit { open_files: 2000 }));
        found.open_files = 4000;
        assert_eq!(files(8000).holds(&before, &found), Ok(()));
        found.inode_file_handles = InodeFileHandles::Never;
        found.mounts[0].file_handles = HandleOutcome::NotPermitted;
        let forbidden = Obstacle::HandlesForbidden { fs_type: "ext4".into() };
        assert_eq!(Rung::FileHandles.holds(&before, &found), Err(forbidden));
        found.mounts[0].file_handles = HandleOutcome::Unsupported;
        assert_eq!(Rung::FileHandles.holds(&before, &found), Err(Obstacle::NoHandles { fs_type: "ext4".into() }));
    }
}
