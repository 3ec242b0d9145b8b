//! Replaces the daemons of a node with those of another release while a guest works.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use virtiofs_contract::control::SessionState;

use crate::broker::Broker;
use crate::node::Node;

/// Time limit of one replacement.
const TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A daemon that an upgrade replaces by itself. A keeper stays: it is replaced when an admin says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// `virtiofs-agent`.
    Agent,
    /// `virtiofs-broker`, while another one stands by.
    Broker,
    /// `virtiofs-broker`, by SIGKILL and a start.
    KilledBroker,
    /// `virtiofs-engine`, by a hand-over.
    Engine,
}

impl fmt::Display for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Daemon::Agent => "agent",
            Daemon::Broker => "broker",
            Daemon::KilledBroker => "broker (killed)",
            Daemon::Engine => "engine",
        })
    }
}

impl Node {
    /// Installs a daemon from the binaries of another release, replaces the running one with it, and waits until the share's
    /// only guest is served as before.
    ///
    /// # Errors
    /// If a daemon does not start or answer, or the session is not served, is another one, or has a finding.
    pub fn roll(&mut self, daemon: Daemon, release: &Path, share: &str) -> Result<()> {
        let before = self.session(share)?.id;
        match daemon {
            Daemon::Agent => self.replace_agent(release.join("virtiofs-agent"))?,
            Daemon::Broker | Daemon::KilledBroker => {
                install(release, &self.engine_binary().with_file_name("virtiofs-broker"))?;
                if daemon == Daemon::Broker { self.replace_broker()? } else { self.kill_broker()? }
            }
            Daemon::Engine => {
                let installed = install(release, &self.engine_binary())?;
                self.hand_over(share)?;
                self.until("the new engine serves", || Ok(self.engine(share)?.binary == installed))?;
            }
        }
        self.until("the agent reaches the broker", || Ok(self.metrics()?.contains("\nvirtiofs_broker_up 1\n")))?;
        // Another session is served sooner or later, too.
        self.until("the session is served", || {
            let session = self.session(share)?;
            Ok(session.id != before || session.state == SessionState::Serving && session.finding.is_none())
        })?;
        let now = self.session(share)?.id;
        ensure!(now == before, "session {before} was lost; there is {now}");
        let lost = Broker::connect(&self.runtime_dir())?.endpoint(share)?.sessions_lost;
        ensure!(lost == 0, "{lost} sessions were lost");
        self.until_busy(share).map(drop)
    }

    /// Waits until a condition holds. Errors count as a condition that does not hold yet.
    fn until(&self, what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
        let end = Instant::now() + TIMEOUT;
        loop {
            let held = holds();
            if matches!(held, Ok(true)) {
                return Ok(());
            }
            if Instant::now() >= end {
                held.with_context(|| format!("waiting until {what}"))?;
                bail!("timed out after {TIMEOUT:?} waiting until {what}");
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Puts the binary of that name from `release` in the place of `binary`, as a package does. Returns its device and inode
/// number.
fn install(release: &Path, binary: &PathBuf) -> Result<(u64, u64)> {
    let name = binary.file_name().context("a binary has a name")?;
    let (from, new) = (release.join(name), binary.with_extension("new"));
    fs::copy(&from, &new).with_context(|| format!("copying {}", from.display()))?;
    fs::rename(&new, binary).with_context(|| format!("installing {}", binary.display()))?;
    let found = fs::metadata(binary).with_context(|| format!("reading metadata of {}", binary.display()))?;
    Ok((found.dev(), found.ino()))
}
