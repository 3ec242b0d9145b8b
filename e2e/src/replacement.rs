//! Replaces engines under a running guest, and reads the pauses that the broker measures.

use std::fmt;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtiofs_contract::control::SessionStatus;
use virtiofs_contract::counters::{Pauses, Replacements};

use crate::broker::Broker;
use crate::node::{Declaration, Node};

/// Time limit of a replacement. Engines start in milliseconds, or in seconds on a host whose kernel is busy with
/// namespaces.
const TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The engine process that serves a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Engine {
    /// Its process id.
    pub pid: u32,
    /// Device and inode number of its binary.
    pub binary: (u64, u64),
}

impl Node {
    /// The engine that serves the share's only guest.
    ///
    /// # Errors
    /// If the share does not have exactly one guest, or no engine serves it.
    pub fn engine(&self, share: &str) -> Result<Engine> {
        let pid = self.session(share)?.engine_pid.context("no engine serves the guest")?;
        let binary = fs::metadata(format!("/proc/{pid}/exe")).context("reading metadata of the engine's binary")?;
        Ok(Engine { pid, binary: (binary.dev(), binary.ino()) })
    }

    /// Kills the engine of the share's only guest. Returns the time from the broker's detection until another engine
    /// served.
    ///
    /// # Errors
    /// If no other engine replaces it.
    pub fn kill_engine(&self, share: &str) -> Result<Duration> {
        let pid = self.session(share)?.engine_pid.context("no engine serves the guest")?;
        self.next_pause(
            share,
            |replacements| &replacements.recoveries,
            || kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).context("killing the engine"),
        )
    }

    /// Waits until requests of the share's only guest are answered. Returns how many were answered during the last poll
    /// interval.
    ///
    /// # Errors
    /// If the guest sends nothing.
    pub fn until_busy(&self, share: &str) -> Result<u64> {
        let answered = || Ok::<_, anyhow::Error>(self.session(share)?.totals.requests());
        let until = Instant::now() + TIMEOUT;
        let mut before = answered()?;
        loop {
            thread::sleep(POLL_INTERVAL);
            let now = answered()?;
            if now > before {
                return Ok(now - before);
            }
            ensure!(Instant::now() < until, "the guest of {share} has sent nothing for {TIMEOUT:?}");
            before = now;
        }
    }

    /// Edits a share so that its only guest is handed over to another engine. Returns the guest's pause.
    ///
    /// # Errors
    /// If no hand-over happens, or the configuration stays the same.
    pub fn reconfigure(&self, share: &Declaration<'_>) -> Result<Duration> {
        let before = self.session(share.name)?.engine;
        let pause = self.next_pause(share.name, |replacements| &replacements.hand_overs, || self.declare(share))?;
        let session = self.session(share.name)?;
        ensure!(session.engine != before, "the new engine is like the old one: {before:?}");
        ensure!(session.finding.is_none(), "the session reports {:?}", session.finding);
        Ok(pause)
    }

    /// Installs another engine binary and hands the share's only guest over to it. Returns the guest's pause.
    ///
    /// # Errors
    /// If no hand-over happens, or the new engine runs another binary.
    pub fn replace_binary(&self, share: &str) -> Result<Duration> {
        let before = self.engine(share)?.binary;
        let installed = self.install_engine()?;
        let hand_over = || self.hand_over(share).map(drop);
        let pause = self.next_pause(share, |replacements| &replacements.hand_overs, hand_over)?;
        let now = self.engine(share)?.binary;
        ensure!(now != before && now == installed, "the new engine runs binary {now:?}, not {installed:?}");
        Ok(pause)
    }

    /// Hands the share's only guest over to an engine of the same configuration, which opens the source again. Returns
    /// the guest's pause.
    ///
    /// # Errors
    /// If no hand-over happens.
    pub fn reopen_source(&self, share: &str) -> Result<Duration> {
        let hand_over = || self.hand_over(share).map(drop);
        self.next_pause(share, |replacements| &replacements.hand_overs, hand_over)
    }

    /// Installs a binary that differs from the one before, atomically, like an upgrade.
    fn install_engine(&self) -> Result<(u64, u64)> {
        let (binary, new) = (self.engine_binary(), self.engine_binary().with_extension("new"));
        fs::copy(&binary, &new).context("copying the engine's binary")?;
        let append = fs::File::options().append(true).open(&new).and_then(|mut file| file.write_all(b"another\n"));
        append.and_then(|()| fs::rename(&new, &binary)).context("installing another engine")?;
        let found = fs::metadata(&binary).context("reading metadata of the new engine's binary")?;
        Ok((found.dev(), found.ino()))
    }

    /// The broker's status of the share's only session.
    ///
    /// # Errors
    /// If the share does not have exactly one guest.
    pub fn session(&self, share: &str) -> Result<SessionStatus> {
        let mut sessions = self.sessions(share)?;
        ensure!(sessions.len() == 1, "share {share} has {} guests: {sessions:?}", sessions.len());
        Ok(sessions.remove(0))
    }

    /// The broker's status of all sessions of a share.
    ///
    /// # Errors
    /// If the broker does not answer, or has no such share.
    pub fn sessions(&self, share: &str) -> Result<Vec<SessionStatus>> {
        Ok(Broker::connect(&self.runtime_dir())?.endpoint(share)?.sessions)
    }

    /// Runs `cause`, waits until the broker has measured another pause of this kind, and returns it.
    fn next_pause(
        &self,
        share: &str,
        kind: impl Fn(&Replacements) -> &Pauses,
        cause: impl FnOnce() -> Result<()>,
    ) -> Result<Duration> {
        let measured = || -> Result<(Pauses, SessionStatus)> {
            let session = self.session(share)?;
            Ok((kind(&session.totals.replacements).clone(), session))
        };
        let (before, _) = measured()?;
        cause()?;
        let until = Instant::now() + TIMEOUT;
        loop {
            let (now, session) = measured()?;
            if now.count > before.count {
                ensure!(now.count == before.count + 1, "{} replacements instead of one", now.count - before.count);
                return Ok(Duration::from_nanos(now.nanoseconds - before.nanoseconds));
            }
            ensure!(Instant::now() < until, "no other engine took over in {TIMEOUT:?}: {:?}", session.finding);
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Pauses of one kind.
#[derive(Debug, Default)]
pub struct Series {
    pauses: Vec<Duration>,
}

impl Series {
    /// Adds a pause.
    pub fn add(&mut self, pause: Duration) {
        self.pauses.push(pause);
        self.pauses.sort();
    }

    /// Number of pauses.
    pub fn count(&self) -> usize {
        self.pauses.len()
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |pause: Option<&Duration>| pause.map_or(0.0, |pause| pause.as_secs_f64() * 1000.0);
        let (median, worst) = (self.pauses.get(self.pauses.len() / 2), self.pauses.last());
        write!(f, "{} times, pause median {:.2} ms, worst {:.2} ms", self.count(), ms(median), ms(worst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_prints_its_median_and_its_worst() {
        let mut series = Series::default();
        for ms in [9, 1, 3] {
            series.add(Duration::from_millis(ms));
        }
        assert_eq!(series.to_string(), "3 times, pause median 3.00 ms, worst 9.00 ms");
    }
}
