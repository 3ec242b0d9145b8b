//! Whether this broker serves, or could take over, in a file that a probe of its container reads.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// First word of the file while the broker is ready.
const READY: &str = "ready: ";

/// What this broker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It neither serves nor stands by yet.
    Starting,
    /// Another broker serves, and knows that this one is ready to take over.
    Standby,
    /// It has the runtime directory.
    Serving,
}

/// What is known of its engines.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Trials {
    /// They are not tried: it did not stand by.
    NotNeeded,
    Running,
    Passed,
    Failed(String),
}

/// The readiness of this broker.
#[derive(Debug)]
pub(crate) struct Readiness {
    file: Option<PathBuf>,
    state: Mutex<(Role, Trials)>,
}

impl Readiness {
    /// Replaces the file that an earlier process of this container left.
    pub(crate) fn start(file: Option<PathBuf>) -> Self {
        let readiness = Readiness { file, state: Mutex::new((Role::Starting, Trials::NotNeeded)) };
        readiness.write(&readiness.state());
        readiness
    }

    fn state(&self) -> MutexGuard<'_, (Role, Trials)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_role(&self, role: Role) {
        let mut state = self.state();
        if state.0 != role {
            state.0 = role;
            self.write(&state);
        }
    }

    pub(crate) fn role(&self) -> Role {
        self.state().0
    }

    /// Engines are being tried.
    pub(crate) fn begin_trials(&self) {
        self.set_trials(Trials::Running);
    }

    /// Sets the result of the trial engines: what went wrong.
    pub(crate) fn set_tried(&self, result: Result<(), String>) {
        self.set_trials(result.map_or_else(Trials::Failed, |()| Trials::Passed));
    }

    fn set_trials(&self, trials: Trials) {
        let mut state = self.state();
        if state.1 == trials {
            return;
        }
        match &trials {
            Trials::Failed(reason) => tracing::error!(reason, "not ready to take over"),
            Trials::Passed => tracing::info!("trial engines passed"),
            Trials::Running | Trials::NotNeeded => {}
        }
        state.1 = trials;
        self.write(&state);
    }

    /// True if its trial engines have passed.
    pub(crate) fn has_passed(&self) -> bool {
        self.state().1 == Trials::Passed
    }

    /// Written to another file first: a probe never reads half of it.
    fn write(&self, (role, trials): &(Role, Trials)) {
        let Some(file) = &self.file else { return };
        let next = file.with_extension("next");
        let written = std::fs::write(&next, text(*role, trials)).and_then(|()| std::fs::rename(&next, file));
        if let Err(error) = written {
            tracing::error!(file = %file.display(), %error, "readiness not written");
        }
    }
}

fn text(role: Role, trials: &Trials) -> String {
    match (role, trials) {
        (_, Trials::Failed(reason)) => format!("not ready: {reason}\n"),
        (Role::Serving, _) => format!("{READY}serving\n"),
        (Role::Standby, Trials::Passed) => format!("{READY}standing by\n"),
        (Role::Starting | Role::Standby, _) => "not ready: starting\n".into(),
    }
}

/// Reads the file of a broker. Returns what it says, and whether that broker is ready.
pub fn read_readiness(file: &Path) -> io::Result<(String, bool)> {
    let text = std::fs::read_to_string(file)?;
    let ready = text.starts_with(READY);
    Ok((text, ready))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broker_is_ready_while_it_serves_or_could_take_over() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("ready");
        std::fs::write(&file, "ready: of an earlier process\n").unwrap();
        let readiness = Readiness::start(Some(file.clone()));
        let read = || read_readiness(&file).unwrap();
        assert_eq!(read(), ("not ready: starting\n".into(), false));
        readiness.begin_trials();
        assert!(!read().1);
        readiness.set_tried(Err("engine: it exited".into()));
        assert_eq!(read(), ("not ready: engine: it exited\n".into(), false));
        readiness.set_role(Role::Serving);
        assert!(!read().1, "a broker that had to take over without working engines halts a roll-out");
        readiness.set_tried(Ok(()));
        assert_eq!(read(), ("ready: serving\n".into(), true));
        readiness.set_role(Role::Standby);
        assert_eq!(read(), ("ready: standing by\n".into(), true));
    }

    #[test]
    fn broker_that_finds_no_other_one_is_ready_once_it_serves() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("ready");
        let readiness = Readiness::start(Some(file.clone()));
        readiness.set_role(Role::Serving);
        assert!(read_readiness(&file).unwrap().1);
    }
}
