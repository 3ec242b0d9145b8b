//! Agent and broker, sources, and the broker's status of sessions.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use e2e::tree;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;
use virtiofs_contract::control::SessionStatus;
use virtiofs_contract::staleness::StaleEvent;

/// Time limit. The audit needs a little more than ten seconds for the names of a test, and longer on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(40);

/// The tests compare what is counted; no remedy may interfere.
const REPORT_ONLY: &str = "{policy: Report}";

pub(crate) struct Host {
    pub(crate) parts: Parts,
    pub(crate) node: Node,
    sources: TempDir,
}

impl Host {
    /// Runs `test`. A failure includes the daemons' log.
    pub(crate) fn run(test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let parts = Parts::locate()?;
        let host = Self { node: Node::start(&parts)?, sources: tempfile::tempdir()?, parts };
        test(&host).with_context(|| host.node.log_tail())?;
        host.node.stop()
    }

    pub(crate) fn source(&self, share: &str) -> PathBuf {
        self.sources.path().join(share)
    }

    pub(crate) fn declare(&self, share: &str, access: &str, content: &str, engine: &str) -> Result<()> {
        self.declare_at(share, &self.source(share), access, content, engine)
    }

    pub(crate) fn declare_at(
        &self,
        name: &str,
        source: &Path,
        access: &str,
        content: &str,
        engine: &str,
    ) -> Result<()> {
        self.node.declare(&Declaration { name, source, access, content, engine, staleness: REPORT_ONLY })
    }

    pub(crate) fn reconfigure(&self, name: &str, access: &str, content: &str, engine: &str) -> Result<()> {
        let source = self.source(name);
        self.node
            .reconfigure(&Declaration { name, source: &source, access, content, engine, staleness: REPORT_ONLY })
            .map(drop)
    }

    /// Writes small files, and a list of their paths on the guest's overlay.
    pub(crate) fn plant_list(&self, share: &str, files: u64) -> Result<()> {
        let paths = tree::plant_small(&self.source(share), 0..files)?;
        let list: String = paths.iter().map(|path| format!("/mnt/{share}-merged/{path}\n")).collect();
        Ok(fs::write(self.source(share).join("list"), list)?)
    }

    pub(crate) fn session(&self, share: &str) -> Result<SessionStatus> {
        self.node.session(share)
    }

    pub(crate) fn sessions(&self, share: &str) -> Result<Vec<SessionStatus>> {
        self.node.sessions(share)
    }

    /// The session's stale events, as soon as `wanted` is true for their paths or the time limit has passed.
    pub(crate) fn events_when(&self, share: &str, wanted: impl Fn(&[String]) -> bool) -> Result<Vec<StaleEvent>> {
        let until = Instant::now() + TIMEOUT;
        loop {
            let events = self.session(share)?.stale_events;
            let paths: Vec<_> = events.iter().map(|event| event.path.clone()).collect();
            if wanted(&paths) || Instant::now() >= until {
                return Ok(events);
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// Waits until `wanted` is true for the session.
    pub(crate) fn until(&self, share: &str, wanted: impl Fn(&SessionStatus) -> bool) -> Result<SessionStatus> {
        let until = Instant::now() + TIMEOUT;
        loop {
            let session = self.session(share)?;
            if wanted(&session) {
                return Ok(session);
            }
            ensure!(Instant::now() < until, "{share}: timed out; session: {session:?}");
            sleep(Duration::from_millis(50));
        }
    }
}

/// A mounted file system. Unmounted on drop.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn tmpfs(at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).context("mounting a tmpfs")?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
