//! A share, its engine and its guest.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use testkit::fuse::call::CallError;
use testkit::guest::{Guest, GuestConfig};
use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::staleness::{Cause, StaleEvent};

use crate::engine::Engine;

pub(crate) const ROOT: u64 = 1;

/// The default configuration of the tests.
pub(crate) fn config() -> EngineConfig {
    EngineConfig { xattr: true, ..EngineConfig::stock(Access::ReadWrite) }
}

pub(crate) struct Fixture {
    /// Removed with the fixture.
    _directory: TempDir,
    source: PathBuf,
    engine: Option<Engine>,
    pub(crate) guest: Guest,
}

impl Fixture {
    pub(crate) fn new(config: EngineConfig) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().to_owned();
        Self::on(directory, source, config)
    }

    /// Boots a guest whose configuration `change` makes from the default one.
    pub(crate) fn with_guest(config: EngineConfig, change: impl FnOnce(GuestConfig) -> GuestConfig) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().to_owned();
        let fixture = Self::powered_on(directory, source, config, change);
        fixture.guest.mount().unwrap();
        fixture
    }

    /// Serves `source` and keeps `directory`.
    pub(crate) fn on(directory: TempDir, source: PathBuf, config: EngineConfig) -> Self {
        let fixture = Self::unmounted_on(directory, source, config);
        fixture.guest.mount().unwrap();
        fixture
    }

    /// The guest has not mounted yet.
    pub(crate) fn unmounted(config: EngineConfig) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().to_owned();
        Self::unmounted_on(directory, source, config)
    }

    fn unmounted_on(directory: TempDir, source: PathBuf, config: EngineConfig) -> Self {
        Self::powered_on(directory, source, config, |guest| guest)
    }

    fn powered_on(
        directory: TempDir,
        source: PathBuf,
        config: EngineConfig,
        change: impl FnOnce(GuestConfig) -> GuestConfig,
    ) -> Self {
        let engine = Engine::start(&source, config).unwrap();
        // The guest polls: after a kill, the broker notifies it, and there is no broker here.
        let guest = Guest::power_on(change(GuestConfig { busy_poll: true, ..engine.guest_config() })).unwrap();
        Fixture { _directory: directory, source, engine: Some(engine), guest }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.source
    }

    pub(crate) fn write(&self, name: &str, contents: &str) {
        fs::write(self.path().join(name), contents).unwrap();
    }

    pub(crate) fn engine(&mut self) -> &mut Engine {
        self.engine.as_mut().unwrap()
    }

    pub(crate) fn take_engine(&mut self) -> Engine {
        self.engine.take().unwrap()
    }

    /// Kills the engine; another one serves the guest.
    pub(crate) fn kill(&mut self) {
        self.kill_and_use(config());
    }

    pub(crate) fn kill_and_use(&mut self, config: EngineConfig) {
        self.replace_engine(config, None);
    }

    /// The same; the next engine serves another directory.
    pub(crate) fn kill_and_serve(&mut self, source: &Path, config: EngineConfig) {
        source.clone_into(&mut self.source);
        self.replace_engine(config, None);
    }

    /// Quiesces the engine; another one serves the guest.
    pub(crate) fn hand_over(&mut self) {
        self.hand_over_to(config());
    }

    pub(crate) fn hand_over_to(&mut self, config: EngineConfig) {
        let engine = self.take_engine().handed_over(&self.source, config).unwrap();
        self.guest.reconnect_to(&engine.socket()).unwrap();
        self.engine = Some(engine);
    }

    /// Kills the engine; the next one kills itself before its store number `die_at` to the ledger.
    pub(crate) fn replace_engine(&mut self, config: EngineConfig, die_at: Option<u64>) {
        let engine = self.take_engine().killed_with_death_at(&self.source, config, die_at).unwrap();
        self.guest.reconnect_to(&engine.socket()).unwrap();
        self.engine = Some(engine);
    }

    /// Counted stale events by cause.
    pub(crate) fn stale(&self) -> Vec<(Cause, u64)> {
        let totals = self.engine.as_ref().unwrap().counters.totals();
        totals.stale.iter().map(|total| (total.cause, total.events)).collect()
    }

    pub(crate) fn stale_events(&self) -> Vec<StaleEvent> {
        self.engine.as_ref().unwrap().counters.stale_events()
    }
}

pub(crate) fn walk(guest: &Guest, path: &str) -> u64 {
    path.split('/').fold(ROOT, |above, name| guest.fuse().lookup(above, name).unwrap().nodeid)
}

pub(crate) fn errno<T>(result: Result<T, CallError>) -> Option<i32> {
    result.err().map(|error| error.errno().unwrap() as i32)
}
