//! Repeated lookups of names that do not exist, as caused by search paths, union mounts and include paths.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::{AtFlags, CWD, statat};
use testkit::fuse::client::Fuse;
use testkit::fuse::wire::{EntryOut, ROOT};
use testkit::guest::{Guest, GuestConfig};
use testkit::server::Server;

use crate::figure::{Figure, Target};
use crate::material::Material;
use crate::options::{Options, Peer};
use crate::quantiles::{quantile, sorted};
use crate::report::print_section;
use crate::system::{Content, command};

/// Number of names.
const NAMES: usize = 1_000;
/// Target ratio to stock virtiofsd.
const TARGET: f64 = 10.0;

/// Missing names per second as seen by an application, on immutable content. Stock virtiofsd has its longest cache
/// timeout.
pub(crate) fn measure(options: &Options, material: &Material, work: &Path) -> anyhow::Result<Vec<Figure>> {
    let stock = Peer::Stock(options.stock.clone());
    let mut ours = Application::start(&options.ours, "ours-immutable", material, work, options)?;
    let mut stock = Application::start(&stock, "stock-immutable", material, work, options)?;
    // A warm-up: all later lookups are repeated.
    ours.slice(options.slice)?;
    stock.slice(options.slice)?;
    let rounds = (0..options.rounds).map(|_| Ok((ours.slice(options.slice)?, stock.slice(options.slice)?)));
    let rounds = rounds.collect::<anyhow::Result<Vec<_>>>()?;
    let median = |values: &mut dyn Iterator<Item = f64>| quantile(&sorted(values), 0.5);
    let value = median(&mut rounds.iter().map(|round| round.0));
    let peer = median(&mut rounds.iter().map(|round| round.1));
    let figure =
        Figure::alone("missing-again".into(), value, "names/s").beside(Some(peer)).with_target(Target::Ratio(TARGET));
    let title = format!("{NAMES} missing names of immutable content, looked up repeatedly, one at a time");
    print_section(&title, "stock 1.14", std::slice::from_ref(&figure));
    Ok(vec![figure])
}

/// An application in a guest.
struct Application {
    // Fields are dropped in this order: the guest before its server.
    guest: Guest,
    _server: Server,
    names: Vec<String>,
    dentries: Dentries,
}

impl Application {
    fn start(peer: &Peer, label: &str, material: &Material, work: &Path, options: &Options) -> anyhow::Result<Self> {
        let work = work.join(label);
        std::fs::create_dir_all(&work)?;
        let command = command(peer, &material.share, &work, Content::Immutable)?.log(options.log(label));
        let server = Server::start(&command).with_context(|| format!("starting {label}"))?;
        let guest = Guest::boot(GuestConfig::new(server.socket())).with_context(|| format!("mounting from {label}"))?;
        let names = (0..NAMES).map(|index| format!("missing-{index:05}")).collect();
        Ok(Self { guest, _server: server, names, dentries: Dentries::default() })
    }

    /// Names per second.
    fn slice(&mut self, slice: Duration) -> anyhow::Result<f64> {
        let (mut asked, begin) = (0.0, Instant::now());
        while begin.elapsed() < slice {
            for name in &self.names {
                system_call();
                let found = self.dentries.look_up(self.guest.fuse(), ROOT, name)?;
                anyhow::ensure!(!found, "{name} exists");
                asked += 1.0;
            }
        }
        Ok(asked / begin.elapsed().as_secs_f64())
    }
}

/// The cost of a lookup for an application that does not depend on the server: a system call, a walk, a miss in the
/// kernel's cache. Without it this would measure a hash map.
fn system_call() {
    let _ = statat(CWD, c"/there-is-no-such-name", AtFlags::SYMLINK_NOFOLLOW);
}

/// A guest's dentry cache, as in `fuse_dentry_revalidate` and `fuse_lookup_name`: a name is valid for the timeout of
/// its entry; an error is not cached.
#[derive(Default)]
struct Dentries(HashMap<(u64, String), (Instant, bool)>);

impl Dentries {
    /// True if the name exists.
    fn look_up(&mut self, fuse: &Fuse, parent: u64, name: &str) -> anyhow::Result<bool> {
        let key = (parent, name.to_owned());
        if let Some((until, exists)) = self.0.get(&key)
            && Instant::now() < *until
        {
            return Ok(*exists);
        }
        let entry = match fuse.lookup(parent, name) {
            Ok(entry) => entry,
            Err(error) if error.errno() == Some(nix::errno::Errno::ENOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        self.0.insert(key, (Instant::now() + lifetime(&entry), entry.nodeid != 0));
        Ok(entry.nodeid != 0)
    }
}

fn lifetime(entry: &EntryOut) -> Duration {
    Duration::new(entry.entry_valid, entry.entry_valid_nsec)
}
