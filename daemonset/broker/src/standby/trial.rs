//! Trial engines of a broker that stands by: one for each distinct configuration of a source that the other broker serves.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::preflight::{Finding, Reason};

use crate::endpoint::state::StoredEndpoint;
use crate::engine::source::SourceLocation;
use crate::engine::start::{Starter, not_started};
use crate::holder::endpoint_states;
use crate::readiness::{Readiness, Role};

/// Interval at which engines are tried that were configured since.
const TRY_MORE: Duration = Duration::from_secs(10);

/// Interval at which a trial that failed is repeated.
const TRY_AGAIN: Duration = Duration::from_secs(3);

/// Most trials at the same time.
const MAX_TRIALS: usize = 16;

/// What is served, and how.
type Served = (SourceLocation, EngineConfig);

/// Tries the engines of this broker.
pub(crate) struct Trial {
    pub(crate) starter: Arc<Starter>,
    /// The keeper's directory.
    pub(crate) keeper: PathBuf,
    /// A directory that exists, for a trial while nothing is served.
    pub(crate) runtime_dir: PathBuf,
}

impl Trial {
    /// Tries engines in a thread, until this broker serves and they have passed.
    pub(super) fn run_in_background(self, readiness: Arc<Readiness>) -> io::Result<()> {
        readiness.begin_trials();
        let run = move || {
            let mut passed = HashSet::new();
            loop {
                let result = self.run(&mut passed);
                let pause = if result.is_ok() { TRY_MORE } else { TRY_AGAIN };
                readiness.set_tried(result);
                thread::sleep(pause);
                if readiness.role() == Role::Serving && readiness.has_passed() {
                    return;
                }
            }
        };
        thread::Builder::new().name("trial".into()).spawn(run).map(drop)
    }

    /// Tries what has not passed yet.
    fn run(&self, passed: &mut HashSet<Served>) -> Result<(), String> {
        let at_keeper = |error: io::Error| format!("keeper in {}: {error}", self.keeper.display());
        let states = endpoint_states(&self.keeper).map_err(at_keeper)?;
        let mut served = HashSet::new();
        for state in states {
            served.extend(StoredEndpoint::read_served(state)?);
        }
        if served.is_empty() {
            return self.try_binary().map_err(|finding| finding.to_string());
        }
        let untried: Vec<Served> = served.into_iter().filter(|it| !passed.contains(it)).collect();
        for some in untried.chunks(MAX_TRIALS) {
            for (it, outcome) in some.iter().zip(self.try_all(some)) {
                match outcome {
                    Ok(()) => drop(passed.insert(it.clone())),
                    Err(finding) if is_about_the_source(finding.reason) => {
                        tracing::warn!(source = %it.0.path().display(), %finding, "no engine tried");
                    }
                    Err(finding) => return Err(format!("trial engine for {}: {finding}", it.0.path().display())),
                }
            }
        }
        Ok(())
    }

    /// Runs trials at the same time: each one whose source hangs takes until its deadline.
    fn try_all(&self, served: &[Served]) -> Vec<Result<(), Finding>> {
        let try_one = |(location, config): &Served| self.starter.preflight(location, config).map(drop);
        thread::scope(|scope| {
            let trials: Vec<_> = served.iter().map(|it| scope.spawn(move || try_one(it))).collect();
            trials.into_iter().map(|trial| trial.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        })
    }

    fn try_binary(&self) -> Result<(), Finding> {
        let directory = File::open(&self.runtime_dir).map_err(|error| not_started(&error))?;
        self.starter.try_on(&directory, &self.runtime_dir, EngineConfig::stock(Access::ReadOnly)).map(drop)
    }
}

/// True if the broker that serves could not start an engine either.
fn is_about_the_source(reason: Reason) -> bool {
    use Reason::{SourceMissing, SourceNotDirectory, SourceReadOnly, SourceReleased, SourceUnreadable};
    matches!(reason, SourceMissing | SourceNotDirectory | SourceUnreadable | SourceReadOnly | SourceReleased)
}
