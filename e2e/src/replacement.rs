//! Replaces engines under a running guest, and reads the pauses that the broker measured.

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

/// Engines start in milliseconds, or in seconds on a host whose kernel is busy with namespaces; what takes this long
/// does not happen at all.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);

/// The engine that serves a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Engine {
    /// Its process id.
    pub pid: u32,
    /// Device and inode number of the binary it runs.
    pub binary: (u64, u64),
}

impl Node {
    /// The engine that serves the one guest of a share.
    ///
    /// # Errors
    /// When the share has not exactly one guest, or nobody serves it.
    pub fn engine(&self, share: &str) -> Result<Engine> {
        let pid = self.session(share)?.engine_pid.context("no engine serves the guest")?;
        let binary = fs::metadata(format!("/proc/{pid}/exe")).context("looking at the engine's binary")?;
        Ok(Engine { pid, binary: (binary.dev(), binary.ino()) })
    }

    /// Kills the engine under the one guest of a share, and returns how long the broker took from learning of it
    /// until another one served.
    ///
    /// # Errors
    /// When no other engine takes its place.
    pub fn kill_engine(&self, share: &str) -> Result<Duration> {
        let pid = self.session(share)?.engine_pid.context("no engine serves the guest")?;
        self.one_more(
            share,
            |exchanges| &exchanges.recoveries,
            || kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).context("killing the engine"),
        )
    }

    /// Waits until the one guest of a share is at work: its requests are answered now. Returns how many were while this
    /// looked.
    ///
    /// # Errors
    /// When the guest sends nothing.
    pub fn until_busy(&self, share: &str) -> Result<u64> {
        let answered = || Ok::<_, anyhow::Error>(self.session(share)?.totals.requests());
        let until = Instant::now() + PATIENCE;
        let mut before = answered()?;
        loop {
            thread::sleep(LOOK);
            let now = answered()?;
            if now > before {
                return Ok(now - before);
            }
            ensure!(Instant::now() < until, "the guest of {share} has sent nothing for {PATIENCE:?}");
            before = now;
        }
    }

    /// Changes a share so that its one guest is handed over to another engine, and returns how long the guest was
    /// not served.
    ///
    /// # Errors
    /// When it is not handed over, or to an engine of another configuration.
    pub fn reconfigure(&self, share: &Declaration<'_>) -> Result<Duration> {
        let before = self.session(share.name)?.engine;
        let pause = self.one_more(share.name, |exchanges| &exchanges.hand_overs, || self.declare(share))?;
        let session = self.session(share.name)?;
        ensure!(session.engine != before, "the new engine is like the old one: {before:?}");
        ensure!(session.finding.is_none(), "the session is in trouble: {:?}", session.finding);
        Ok(pause)
    }

    /// Puts another engine's binary in place, has the one guest of a share handed over to it, and returns how long
    /// the guest was not served.
    ///
    /// # Errors
    /// When it is not handed over, or not to that binary.
    pub fn replace_binary(&self, share: &str) -> Result<Duration> {
        let before = self.engine(share)?.binary;
        let installed = self.install_engine()?;
        let order = || self.hand_over(share).map(drop);
        let pause = self.one_more(share, |exchanges| &exchanges.hand_overs, order)?;
        let now = self.engine(share)?.binary;
        ensure!(now != before && now == installed, "the new engine runs binary {now:?}, not {installed:?}");
        Ok(pause)
    }

    /// Has the one guest of a share handed over to another engine like the one that serves it, which opens the
    /// source again, and returns how long the guest was not served.
    ///
    /// # Errors
    /// When it is not handed over.
    pub fn reopen_source(&self, share: &str) -> Result<Duration> {
        let order = || self.hand_over(share).map(drop);
        self.one_more(share, |exchanges| &exchanges.hand_overs, order)
    }

    /// A binary that differs from the one before, as an upgrade brings it: in place at once or not at all.
    fn install_engine(&self) -> Result<(u64, u64)> {
        let (binary, new) = (self.engine_binary(), self.engine_binary().with_extension("new"));
        fs::copy(&binary, &new).context("copying the engine's binary")?;
        let append = fs::File::options().append(true).open(&new).and_then(|mut file| file.write_all(b"another\n"));
        append.and_then(|()| fs::rename(&new, &binary)).context("installing another engine")?;
        let found = fs::metadata(&binary).context("looking at the new engine's binary")?;
        Ok((found.dev(), found.ino()))
    }

    /// What the broker says of the one guest of a share.
    ///
    /// # Errors
    /// When the share has not exactly one guest.
    pub fn session(&self, share: &str) -> Result<SessionStatus> {
        let mut sessions = self.sessions(share)?;
        ensure!(sessions.len() == 1, "share {share} has {} guests: {sessions:?}", sessions.len());
        Ok(sessions.remove(0))
    }

    /// What the broker says of all guests of a share.
    ///
    /// # Errors
    /// When it does not answer, or knows no such share.
    pub fn sessions(&self, share: &str) -> Result<Vec<SessionStatus>> {
        Ok(Broker::connect(&self.runtime_dir())?.endpoint(share)?.sessions)
    }

    /// Runs `cause`, waits until the broker has measured one more pause of this kind, and returns the pause.
    fn one_more(
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
        let until = Instant::now() + PATIENCE;
        loop {
            let (now, session) = measured()?;
            if now.count > before.count {
                ensure!(now.count == before.count + 1, "{} changes where one was asked for", now.count - before.count);
                return Ok(Duration::from_nanos(now.nanoseconds - before.nanoseconds));
            }
            ensure!(Instant::now() < until, "no other engine took over in {PATIENCE:?}: {:?}", session.finding);
            thread::sleep(LOOK);
        }
    }
}

/// Pauses of one kind, to be printed.
#[derive(Debug, Default)]
pub struct Series {
    pauses: Vec<Duration>,
}

impl Series {
    /// One more.
    pub fn add(&mut self, pause: Duration) {
        self.pauses.push(pause);
        self.pauses.sort();
    }

    /// How many.
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
