//! A system under test: a server with a mounted guest.

use std::any::Any;
use std::path::Path;

use anyhow::{Context, bail};
use serde_json::json;
use testkit::fuse::client::Fuse;
use testkit::fuse::wire::{ForgetOne, ROOT};
use testkit::guest::{Guest, GuestConfig};
use testkit::processes::descendants;
use testkit::server::{Server, ServerCommand};

use crate::material::{FEW, MANY, Material, name};
use crate::options::{Options, Peer};

/// The name of engine processes.
const ENGINE: &str = "virtiofs-engine";
/// Name of the agent's share.
const SHARE: &str = "bench";
/// Number of nodes in one BATCH_FORGET.
const BATCH: usize = 1_000;

/// A system under test, and the nodes that all cases use.
pub(crate) struct System {
    // Fields are dropped in this order: the guest before its server.
    pub(crate) guest: Guest,
    _server: Box<dyn Any>,
    /// The processes that serve it.
    pub(crate) serving: Vec<i32>,
    pub(crate) few: u64,
    pub(crate) many: u64,
    pub(crate) read: u64,
    pub(crate) made: u64,
    pub(crate) written: u64,
    /// Held nodes of the files in `few`.
    pub(crate) nodes: Vec<u64>,
    /// Names in `few` and `many`.
    pub(crate) names: Vec<String>,
    /// Nodes to forget after the measurement.
    pub(crate) to_forget: Vec<ForgetOne>,
    /// Position at which the next step continues, so that rounds do not repeat each other.
    pub(crate) cursor: usize,
}

impl System {
    pub(crate) fn start(
        peer: &Peer,
        label: &str,
        material: &Material,
        work: &Path,
        options: &Options,
    ) -> anyhow::Result<Self> {
        let work = work.join(label);
        std::fs::create_dir_all(&work)?;
        let log = options.log(label);
        let command = command(peer, &material.share, &work, Content::Shared)?.log(&log);
        let server =
            Server::start(&command).with_context(|| format!("starting {label}; its log is {}", log.display()))?;
        let mut config = GuestConfig::new(server.socket()).memory(options.memory);
        config.in_flight = config.in_flight.max(options.depth as u16 + 1);
        let guest = Guest::boot(config).with_context(|| format!("mounting from {label}"))?;
        let serving = serving(peer, server.pid())?;
        let prepared = Self::prepare(guest, server).with_context(|| format!("preparing {label}"))?;
        Ok(Self { serving, ..prepared })
    }

    pub(crate) fn fuse(&self) -> &Fuse {
        self.guest.fuse()
    }

    /// Forgets the nodes that the last slice looked up.
    pub(crate) fn forget_all(&mut self) -> anyhow::Result<()> {
        let to_forget = std::mem::take(&mut self.to_forget);
        for batch in to_forget.chunks(BATCH) {
            self.fuse().batch_forget(batch)?;
        }
        if let Some(violation) = self.guest.violations().first() {
            bail!("the server violates the rules of the ring: {}", violation.0);
        }
        Ok(())
    }

    /// Looks up the nodes of a mounted guest. `server` is dropped after the guest.
    pub(crate) fn prepare(guest: Guest, server: impl Any) -> anyhow::Result<Self> {
        let fuse = guest.fuse();
        let find = |parent, name: &str| fuse.lookup(parent, name).map(|entry| entry.nodeid);
        let few = find(ROOT, "few")?;
        let names: Vec<String> = (0..MANY.max(FEW)).map(name).collect();
        let nodes = names[..FEW].iter().map(|name| find(few, name)).collect::<Result<_, _>>()?;
        Ok(Self {
            many: find(ROOT, "many")?,
            read: find(ROOT, "read")?,
            made: find(ROOT, "made")?,
            written: find(ROOT, "written")?,
            few,
            nodes,
            names,
            to_forget: Vec::new(),
            cursor: 0,
            _server: Box::new(server),
            serving: Vec::new(),
            guest,
        })
    }
}

/// The processes below `server` that serve guests: only the engines of an agent.
fn serving(peer: &Peer, server: i32) -> anyhow::Result<Vec<i32>> {
    let mut processes = descendants(server)?;
    processes.push(server);
    if let Peer::Agent(_) = peer {
        processes.retain(|process| {
            std::fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|name| name.trim() == ENGINE)
        });
    }
    if processes.is_empty() {
        bail!("no process named {ENGINE} below {server}");
    }
    Ok(processes)
}

/// Guarantee about the share's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Other processes may change it.
    Shared,
    /// It does not change.
    Immutable,
}

/// The command of a server for `share`, with the working directory `work`.
pub(crate) fn command(peer: &Peer, share: &Path, work: &Path, content: Content) -> anyhow::Result<ServerCommand> {
    let socket = work.join("fs.sock");
    Ok(match peer {
        Peer::Stock(binary) => {
            let stock = ServerCommand::stock(binary, share, socket);
            // The longest timeout of stock virtiofsd.
            if content == Content::Immutable { stock.arg("--cache=always").arg("--readonly") } else { stock }
        }
        Peer::Agent(binary) => {
            let shares = work.join("shares");
            std::fs::create_dir_all(&shares)?;
            let manifest = serde_json::to_vec_pretty(&manifest(share, content))?;
            std::fs::write(shares.join("bench.json"), manifest)?;
            ServerCommand::agent(binary, &shares, &work.join("run"), SHARE)
        }
        Peer::Command(line) => {
            let mut words = line.split_whitespace().map(|word| {
                let word = word.replace("{share}", &share.to_string_lossy());
                word.replace("{socket}", &socket.to_string_lossy())
            });
            let program = words.next().context("--command is empty")?;
            words.fold(ServerCommand::new(program, &socket), ServerCommand::arg)
        }
    })
}

/// A share with the behaviour of stock virtiofsd's defaults and extended attributes, or one with immutable content.
fn manifest(share: &Path, content: Content) -> serde_json::Value {
    let (access, content) = match content {
        Content::Shared => ("ReadWrite", "Shared"),
        Content::Immutable => ("ReadOnly", "Immutable"),
    };
    json!({
        "apiVersion": "virtiofs.dev/v1alpha1",
        "kind": "VirtiofsShare",
        "metadata": {"name": SHARE},
        "spec": {
            "source": {"hostPath": {"path": share, "type": "Directory"}},
            "access": access,
            "content": content,
            "engine": {"xattr": "Enabled"},
        },
    })
}
