//! Fields of a stored endpoint or configuration that this broker does not know, because a newer one has written them.
//!
//! Such a field may restrict what guests can do. An engine that runs keeps the restriction, so it continues. No engine is
//! started without it, until the agent applies a configuration that this broker knows in full. The names are stored again: a
//! broker that follows knows what was dropped.

use std::sync::{Mutex, MutexGuard, PoisonError};

use virtiofs_contract::preflight::{Finding, Reason};

use super::finding;

/// Names of unknown fields. Empty: everything is known.
#[derive(Debug, Default)]
pub(crate) struct UnknownFields(Mutex<Vec<String>>);

impl UnknownFields {
    fn names_mut(&self) -> MutexGuard<'_, Vec<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, names: Vec<String>) {
        let mut all = self.names_mut();
        all.extend(names);
        all.sort();
        all.dedup();
    }

    /// Everything is known again. Returns true if it was not.
    pub(crate) fn clear(&self) -> bool {
        !std::mem::take(&mut *self.names_mut()).is_empty()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.names_mut().clone()
    }

    /// Checks that an engine may be started.
    pub(crate) fn check(&self) -> Result<(), Finding> {
        check(&self.names())
    }
}

/// Checks that there are no unknown fields.
pub(crate) fn check(names: &[String]) -> Result<(), Finding> {
    if names.is_empty() {
        return Ok(());
    }
    Err(finding(
        Reason::EngineFailed,
        format!(
            "a newer release has configured {}, which this broker does not know and must not ignore",
            names.join(", ")
        ),
        "roll forward again, or remove that setting from the share; running engines continue",
    ))
}

/// The fields of a stored session that configure an engine.
pub(crate) fn of_session(unknown: Vec<String>) -> Vec<String> {
    unknown.into_iter().filter(|path| path.split('.').any(|part| part == "config")).collect()
}

/// The fields of a stored endpoint that say how it is served.
pub(crate) fn of_endpoint(unknown: Vec<String>) -> Vec<String> {
    unknown.into_iter().filter(|path| path.starts_with("spec.")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_that_restrict_nothing_are_ignored() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let session = names(&["new", "progress.new", "progress.desired.config.noLinks", "rings.Engine.preflight.x"]);
        assert_eq!(of_session(session), ["progress.desired.config.noLinks"]);
        let endpoint = names(&["counts.new", "spec.engine.limits.files", "spec.oneGuest", "preflight.x"]);
        assert_eq!(of_endpoint(endpoint), ["spec.engine.limits.files", "spec.oneGuest"]);
    }

    #[test]
    fn no_engine_starts_until_everything_is_known() {
        let unknown = UnknownFields::default();
        assert_eq!(unknown.check(), Ok(()));
        assert!(!unknown.clear());
        unknown.add(vec!["spec.b".into(), "spec.a".into()]);
        unknown.add(vec!["spec.a".into()]);
        let refused = unknown.check().unwrap_err();
        assert!(refused.message.contains("spec.a, spec.b,"), "{refused}");
        assert!(unknown.clear());
        assert_eq!(unknown.check(), Ok(()));
    }
}
