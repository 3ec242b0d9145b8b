//! Requirements of tests that a machine may lack: a tool, a right, a mount.
//!
//! Such a test fails: a test that passes without running proves nothing. `VIRTIOFS_ALLOW_SKIP=1` allows it to be
//! skipped. Each skip adds a line to the file that `VIRTIOFS_SKIPPED` names; `make test` prints their number at the
//! end.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;
use std::thread;

const ALLOW: &str = "VIRTIOFS_ALLOW_SKIP";
const LIST: &str = "VIRTIOFS_SKIPPED";

/// Returns what the test needs. None: it is missing, skips are allowed, and the test must return.
///
/// # Panics
/// If it is missing and skips are not allowed, or if the skip cannot be listed.
#[must_use]
pub fn require<T>(what: &str, needed: Option<T>) -> Option<T> {
    if needed.is_none() {
        let test = thread::current().name().unwrap_or("test").to_owned();
        if let Err(error) = skip(&test, what, env::var(ALLOW).ok().as_deref()) {
            panic!("{error}");
        }
        list(&format!("{test}: needs {what}"));
    }
    needed
}

/// Returns true if `met`. False: skips are allowed, and the test must return.
///
/// # Panics
/// As [`require`].
#[must_use]
pub fn require_that(what: &str, met: bool) -> bool {
    require(what, met.then_some(())).is_some()
}

fn skip(test: &str, what: &str, allowed: Option<&str>) -> Result<(), String> {
    if allowed == Some("1") { Ok(()) } else { Err(format!("{test} needs {what}; {ALLOW}=1 allows it to be skipped")) }
}

fn list(line: &str) {
    eprintln!("skipped {line}");
    if let Some(path) = env::var_os(LIST) {
        let file = OpenOptions::new().create(true).append(true).open(path);
        let written = file.and_then(|mut file| writeln!(file, "{line}"));
        assert!(written.is_ok(), "cannot list the skipped test: {written:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn met_requirements_are_returned() {
        assert_eq!(require("a number", Some(7)), Some(7));
        assert!(require_that("a fact", true));
    }

    #[test]
    fn missing_requirements_fail_unless_skips_are_allowed() {
        assert_eq!(skip("mounts", "the right to mount", Some("1")), Ok(()));
        for allowed in [None, Some(""), Some("0"), Some("yes")] {
            let error = skip("mounts", "the right to mount", allowed).unwrap_err();
            assert!(error.contains("mounts needs the right to mount"), "{error}");
        }
    }
}
