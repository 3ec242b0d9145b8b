//! Agent and broker, sources, and what the broker says of sessions.

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

/// The audit needs ten seconds and some for what a test holds; on a machine that is busy, more.
const PATIENCE: Duration = Duration::from_secs(40);

/// What is counted is compared here, not cured.
const REPORT: &str = "{policy: Report}";

pub(crate) struct Host {
    pub(crate) parts: Parts,
    pub(crate) node: Node,
    sources: TempDir,
}

impl Host {
    /// Whatever fails is explained by the daemons' log.
    pub(crate) fn visit(test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
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
        self.node.declare(&Declaration { name, source, access, content, engine, staleness: REPORT })
    }

    pub(crate) fn reconfigure(&self, name: &str, access: &str, content: &str, engine: &str) -> Result<()> {
        let source = self.source(name);
        self.node
            .reconfigure(&Declaration { name, source: &source, access, content, engine, staleness: REPORT })
            .map(drop)
    }

    /// Small files, and a list of where the guest has them on its overlay.
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

    /// The session's stale events, once their paths are as wished, or when they have not become so.
    pub(crate) fn events_when(&self, share: &str, wish: impl Fn(&[String]) -> bool) -> Result<Vec<StaleEvent>> {
        let until = Instant::now() + PATIENCE;
        loop {
            let events = self.session(share)?.stale_events;
            let paths: Vec<_> = events.iter().map(|event| event.path.clone()).collect();
            if wish(&paths) || Instant::now() >= until {
                return Ok(events);
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the session is as wished.
    pub(crate) fn until(&self, share: &str, wish: impl Fn(&SessionStatus) -> bool) -> Result<SessionStatus> {
        let until = Instant::now() + PATIENCE;
        loop {
            let session = self.session(share)?;
            if wish(&session) {
                return Ok(session);
            }
            ensure!(Instant::now() < until, "{share} is still {session:?}");
            sleep(Duration::from_millis(50));
        }
    }
}

/// A file system that goes away with this.
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
