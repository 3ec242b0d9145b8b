//! `virtiofs-keeper`: holds file descriptors for the broker, so that the sessions of VMs survive it.
//!
//! It speaks systemd's protocol for stored descriptors (sd_notify(3)) on the datagram socket `store` and sends all
//! of them to a client of the socket `fetch`. It does not interpret what it holds.
//!
//! | module | |
//! |---|---|
//! | `message` | one datagram -> what to do; pure |
//! | `store` | descriptors by name and group, with limits; pure |
//! | `serve` | the loop |
//! | `closing` | closing files that may block |
//! | `socket` | sockets, and messages with descriptors |

mod closing;
#[cfg(test)]
mod fuzz;
mod message;
mod serve;
mod socket;
mod store;

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use caps::CapSet;
use clap::Parser;
use rustix::fs::{FlockOperation, flock};
use rustix::net::SocketType;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtiofs_logging::LogFormat;

use serve::Keeper;
use store::{Bounds, Store};

/// Descriptors that the keeper needs for itself.
const OWN_DESCRIPTORS: u64 = 64;

/// Holds file descriptors for virtiofs-broker, so that VMs do not notice when the broker is restarted.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Directory for its sockets and its lock; created if it is missing. Only its owner can enter it.
    #[arg(long, value_name = "DIR")]
    directory: PathBuf,
    /// Maximum number of descriptors [default: the limit of open files].
    #[arg(long, value_name = "N")]
    max_descriptors: Option<usize>,
    /// Maximum number of groups of descriptors: two for each session and one for each endpoint.
    #[arg(long, value_name = "N", default_value_t = 16384)]
    max_groups: usize,
    /// What to log: a level, or `target=level` directives.
    #[arg(long, default_value = "info")]
    log: String,
    /// Format of log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // `eprintln!` would panic if standard error is closed.
            let _ = writeln!(io::stderr(), "virtiofs-keeper: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    // Lines are queued: a log that is not read must not block the keeper.
    let log = virtiofs_logging::init_queued(&args.log, args.log_format)?;
    let outcome = serve(args);
    log.finish();
    outcome
}

fn serve(args: &Args) -> anyhow::Result<()> {
    let limit = raise_open_files().context("limit of open files")?;
    drop_capabilities().context("capabilities")?;
    make_directory(&args.directory).with_context(|| format!("directory {}", args.directory.display()))?;
    let _lock = lock(&args.directory)?;
    let most = usize::try_from(limit.saturating_sub(OWN_DESCRIPTORS)).unwrap_or(usize::MAX);
    let descriptors = args.max_descriptors.unwrap_or(most).min(most);
    let bind = |name: &str, kind| {
        let path = args.directory.join(name);
        socket::bind_at(&path, kind).with_context(|| format!("socket {}", path.display()))
    };
    let (store_socket, fetch_socket) = (bind("store", SocketType::DGRAM)?, bind("fetch", SocketType::SEQPACKET)?);
    let store = Store::new(Bounds { descriptors, groups: args.max_groups });
    let mut keeper = Keeper::new(store, store_socket, fetch_socket).context("set-up")?;
    tracing::info!(directory = %args.directory.display(), descriptors, groups = args.max_groups, "keeper ready");
    keeper.run().context("keeper")
}

/// Raises the soft limit to the hard one and returns it.
fn raise_open_files() -> io::Result<u64> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(maximum.unwrap_or(u64::MAX))
}

/// Drops all capabilities. Without CAP_SETPCAP the bounding set stays, which no_new_privs makes irrelevant.
fn drop_capabilities() -> anyhow::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set)?;
    }
    Ok(())
}

fn make_directory(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().recursive(true).mode(0o700).create(directory) {
        Ok(()) => std::fs::set_permissions(directory, Permissions::from_mode(0o700)),
        Err(error) => Err(error),
    }
}

/// Locks the directory, so that only one keeper uses it.
fn lock(directory: &Path) -> anyhow::Result<File> {
    let path = directory.join("lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("lock {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("directory {} belongs to another keeper that is running", directory.display());
    }
    Ok(file)
}
