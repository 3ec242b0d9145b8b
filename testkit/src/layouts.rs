//! Byte fixtures of the layouts that processes of two releases share: `NAME/VERSION` below a crate's directory `layouts`.
//!
//! A change of a layout that is in a release raises its version and adds a fixture. The fixture of a released version
//! never changes. `VIRTIOFS_WRITE_LAYOUTS=1` writes the fixture of the present version.

#![allow(clippy::unwrap_used)] // Only tests use it, and fail by a panic.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// The fixtures of one layout.
#[derive(Debug)]
pub struct Layouts {
    directory: PathBuf,
}

impl Layouts {
    /// The fixtures in `layouts/NAME` of the crate with this directory (`CARGO_MANIFEST_DIR`).
    pub fn of(crate_directory: &str, name: &str) -> Self {
        Layouts { directory: Path::new(crate_directory).join("layouts").join(name) }
    }

    /// The fixtures by version.
    ///
    /// # Panics
    /// If there is none, a name is not a number, or one cannot be read.
    fn by_version(&self) -> BTreeMap<u64, Vec<u8>> {
        let shown = self.directory.display();
        let entries = fs::read_dir(&self.directory).unwrap_or_else(|error| panic!("{shown}: {error}"));
        let fixtures: BTreeMap<u64, Vec<u8>> = entries
            .map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
                let version = name.parse().unwrap_or_else(|_| panic!("{}: not a version", path.display()));
                (version, fs::read(&path).unwrap())
            })
            .collect();
        assert!(!fixtures.is_empty(), "{shown}: no fixture");
        fixtures
    }

    /// Checks that the newest fixture is of this version and has these bytes. Returns the older fixtures, which the present
    /// program must read down to `oldest`.
    ///
    /// # Panics
    /// If the layout has changed without a new version, or a fixture is missing.
    pub fn check(&self, oldest: u64, version: u64, present: &[u8]) -> BTreeMap<u64, Vec<u8>> {
        if std::env::var_os("VIRTIOFS_WRITE_LAYOUTS").is_some() {
            fs::create_dir_all(&self.directory).unwrap();
            fs::write(self.directory.join(version.to_string()), present).unwrap();
        }
        let shown = self.directory.display();
        let mut fixtures = self.by_version();
        let newest = fixtures.last_key_value().map(|(version, _)| *version);
        assert_eq!(
            newest,
            Some(version),
            "{shown}: the newest fixture is not of version {version}; VIRTIOFS_WRITE_LAYOUTS=1 writes it"
        );
        let fixture = fixtures.remove(&version).unwrap_or_default();
        let (fixture, present) = (String::from_utf8_lossy(&fixture), String::from_utf8_lossy(present));
        assert!(
            fixture == present,
            "{shown}: version {version} has changed. If it is in a release, raise the version and add a fixture with \
             VIRTIOFS_WRITE_LAYOUTS=1; see CONTRIBUTING.md.\nfirst difference: {}",
            first_difference(&fixture, &present)
        );
        let missing = (oldest..version).find(|older| !fixtures.contains_key(older));
        assert!(
            missing.is_none(),
            "{shown}: no fixture of version {}, which is still read",
            missing.unwrap_or_default()
        );
        fixtures.split_off(&oldest)
    }
}

fn first_difference(fixture: &str, present: &str) -> String {
    let mut lines = fixture.lines().zip(present.lines()).enumerate();
    match lines.find(|(_, (fixture, present))| fixture != present) {
        Some((number, (fixture, present))) => format!("line {}\nfixture: {fixture}\npresent: {present}", number + 1),
        None => "one has more lines".into(),
    }
}

/// The words of shared memory that are not zero, one a line: offset in bytes and value.
pub fn words(memory: &[u8]) -> String {
    let mut text = String::new();
    for (number, word) in memory.chunks(8).enumerate() {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        let value = u64::from_le_bytes(bytes);
        if value != 0 {
            writeln!(text, "{:06x} {value:016x}", number * 8).unwrap();
        }
    }
    text
}

/// The words of [`words`]: offsets in bytes and values.
///
/// # Panics
/// If a line is not one of them.
pub fn parse_words(text: &[u8]) -> Vec<(u64, u64)> {
    let hexadecimal = |digits| u64::from_str_radix(digits, 16).unwrap();
    let text = std::str::from_utf8(text).unwrap();
    let parsed = text.lines().map(|line| line.split_once(' ').unwrap());
    parsed.map(|(offset, value)| (hexadecimal(offset), hexadecimal(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layouts(fixtures: &[(&str, &str)]) -> (tempfile::TempDir, Layouts) {
        let scratch = tempfile::tempdir().unwrap();
        let layouts = Layouts::of(scratch.path().to_str().unwrap(), "example");
        fs::create_dir_all(&layouts.directory).unwrap();
        for (version, text) in fixtures {
            fs::write(layouts.directory.join(version), text).unwrap();
        }
        (scratch, layouts)
    }

    #[test]
    fn older_fixtures_are_returned() {
        let (_scratch, layouts) = layouts(&[("2", "a"), ("3", "b"), ("4", "c")]);
        assert_eq!(layouts.check(3, 4, b"c"), BTreeMap::from([(3, b"b".to_vec())]));
    }

    #[test]
    #[should_panic(expected = "version 4 has changed")]
    fn changed_layout_is_detected() {
        layouts(&[("4", "a\nb")]).1.check(4, 4, b"a\nc");
    }

    #[test]
    #[should_panic(expected = "not of version 5")]
    fn missing_fixture_of_a_new_version_is_detected() {
        layouts(&[("4", "a")]).1.check(4, 5, b"a");
    }

    #[test]
    #[should_panic(expected = "no fixture of version 3")]
    fn missing_fixture_of_an_old_version_is_detected() {
        layouts(&[("4", "a")]).1.check(3, 4, b"a");
    }

    #[test]
    fn words_are_parsed_back() {
        let memory = [[0; 8], 7u64.to_le_bytes(), [0; 8], u64::MAX.to_le_bytes()].concat();
        assert_eq!(parse_words(words(&memory).as_bytes()), [(8, 7), (24, u64::MAX)]);
    }
}
