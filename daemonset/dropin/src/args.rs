//! The command line: that of virtiofsd 1.14, parsed with the same parser and the same types, and a few options of our own.

mod compat;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{CommandFactory, Parser, ValueEnum};
use log::LevelFilter;
use virtiofsd::idmap::{GidMap, UidMap};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, MigrationMode, MigrationOnError, NegotiationMode};
use virtiofsd::sandbox::SandboxMode;
use virtiofsd::soft_idmap::cmdline::IdMap;
use virtiofsd::vhost_user::{Error, MAX_TAG_LEN};

/// As stock virtiofsd prints it, which some tools parse, and what this program is.
const VERSION: &str = concat!("1.14.0 (virtiofsd-live ", env!("CARGO_PKG_VERSION"), ")");

/// A value of `--inode-file-handles`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileHandles {
    /// An `O_PATH` descriptor for each inode.
    Never,
    /// Deprecated name of `Prefer`.
    Fallback,
    /// File handles where the file system has them.
    Prefer,
    /// File handles only.
    Mandatory,
}

impl FromStr for FileHandles {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "never" => Ok(FileHandles::Never),
            "fallback" => Ok(FileHandles::Fallback),
            "prefer" => Ok(FileHandles::Prefer),
            "mandatory" => Ok(FileHandles::Mandatory),
            _ => Err("invalid inode file handles mode"),
        }
    }
}

/// A value of `--seccomp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seccomp {
    /// No filter.
    None,
    /// A call that is not allowed ends the process.
    Kill,
    /// It is logged.
    Log,
    /// It raises SIGSYS.
    Trap,
}

impl FromStr for Seccomp {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Seccomp::None),
            "kill" => Ok(Seccomp::Kill),
            "log" => Ok(Seccomp::Log),
            "trap" => Ok(Seccomp::Trap),
            _ => Err("Matching variant not found"),
        }
    }
}

/// What to do about staleness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Staleness {
    /// Count it, and change the engine's configuration under the running VM.
    Heal,
    /// Count it.
    Report,
}

/// Names and defaults are those of virtiofsd 1.14, and so is which options need or exclude each other.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "virtiofsd",
    about = "A virtiofsd whose mounts survive the death and the replacement of the process that serves them.",
    version = VERSION,
    args_override_self = true,
    arg_required_else_help = true,
    override_usage = "virtiofsd-live --shared-dir <SHARED_DIR> --socket-path <SOCKET_PATH> [OPTIONS]"
)]
pub(crate) struct Options {
    /// Shared directory
    #[arg(long, required_unless_present_any = &["compat_options", "print_capabilities"])]
    pub(crate) shared_dir: Option<String>,

    /// Tag that the device advertises; refused: the VMM's own configuration has it
    #[arg(long, value_parser = parse_tag)]
    pub(crate) tag: Option<String>,

    /// vhost-user socket path [deprecated: --socket-path]
    #[arg(long, required_unless_present_any = &["fd", "socket_path", "print_capabilities"])]
    pub(crate) socket: Option<String>,

    /// vhost-user socket path
    #[arg(long = "socket-path", required_unless_present_any = &["fd", "socket", "print_capabilities"])]
    pub(crate) socket_path: Option<String>,

    /// Group of the vhost-user socket, which may then connect
    #[arg(long = "socket-group", conflicts_with_all = &["fd", "print_capabilities"])]
    pub(crate) socket_group: Option<String>,

    /// Descriptor of a socket that listens
    #[arg(long, required_unless_present_any = &["socket", "socket_path", "print_capabilities"], conflicts_with_all = &["socket_path", "socket"])]
    pub(crate) fd: Option<RawFd>,

    /// Threads of a pool; accepted and not used
    #[arg(long, default_value = "0")]
    pub(crate) thread_pool_size: usize,

    /// Pass extended attributes through
    #[arg(long)]
    pub(crate) xattr: bool,

    /// Pass POSIX ACLs through (implies --xattr)
    #[arg(long, require_equals = true, default_value = "never", default_missing_value = "always", num_args = 0..=1, value_name = "never|auto|always")]
    pub(crate) posix_acl: NegotiationMode,

    /// Rules that translate names of extended attributes, such as :map::user.virtiofs.:
    #[arg(long, value_parser = parse_xattrmap)]
    pub(crate) xattrmap: Option<String>,

    /// Sandbox of the process that serves the guest (namespace, chroot, none)
    #[arg(long, default_value = "namespace")]
    pub(crate) sandbox: SandboxMode,

    /// Refuse all changes by the guest
    #[arg(long)]
    pub(crate) readonly: bool,

    /// What a system call that is not allowed does (none, kill, log, trap); the filter is always on and kills
    #[arg(long, default_value = "kill")]
    pub(crate) seccomp: Seccomp,

    /// Announce mount points to the guest [default]
    #[arg(long)]
    pub(crate) announce_submounts: bool,

    /// Do not announce mount points to the guest
    #[arg(long, overrides_with("announce_submounts"))]
    pub(crate) no_announce_submounts: bool,

    /// Refer to inodes by file handle instead of an open descriptor (never, prefer, mandatory)
    #[arg(long, require_equals = true, default_value = "prefer")]
    pub(crate) inode_file_handles: FileHandles,

    /// What the guest may cache (auto, always, never, metadata)
    #[arg(long, default_value = "auto")]
    pub(crate) cache: CachePolicy,

    /// Allow shared mappings with --cache=metadata and --cache=never
    #[arg(long)]
    pub(crate) allow_mmap: bool,

    /// Disable READDIRPLUS
    #[arg(long)]
    pub(crate) no_readdirplus: bool,

    /// Let the guest cache writes
    #[arg(long)]
    pub(crate) writeback: bool,

    /// Pass O_DIRECT on to the host
    #[arg(long)]
    pub(crate) allow_direct_io: bool,

    /// Print the capabilities of this program as JSON (vhost-user.json) and exit
    #[arg(long = "print-capabilities")]
    pub(crate) print_capabilities: bool,

    /// Changes of the capability set, such as -mknod:-setfcap
    #[arg(long)]
    pub(crate) modcaps: Option<String>,

    /// Log level (error, warn, info, debug, trace, off)
    #[arg(long = "log-level", default_value = "info")]
    pub(crate) log_level: LevelFilter,

    /// Log to syslog [default: standard error]
    #[arg(long)]
    pub(crate) syslog: bool,

    /// Limit of open files of the engine; 0: the limit of this process [default: min(1000000, fs.nr_open)]
    #[arg(long = "rlimit-nofile")]
    pub(crate) rlimit_nofile: Option<u64>,

    /// Options of the C implementation [deprecated]
    #[arg(short = 'o')]
    pub(crate) compat_options: Option<Vec<String>>,

    /// Log level debug [deprecated]
    #[arg(short = 'd')]
    pub(crate) compat_debug: bool,

    /// Disable KILLPRIV V2 [default]
    #[arg(long)]
    pub(crate) _no_killpriv_v2: bool,

    /// Enable KILLPRIV V2
    #[arg(long, overrides_with("_no_killpriv_v2"))]
    pub(crate) killpriv_v2: bool,

    /// No effect [deprecated]
    #[arg(short = 'f')]
    pub(crate) compat_foreground: bool,

    /// Set the security label that the guest sends with a new file (implies --xattr)
    #[arg(long = "security-label", require_equals = true, default_value = "never", default_missing_value = "always", num_args = 0..=1, value_name = "never|auto|always")]
    pub(crate) security_label: NegotiationMode,

    /// Map of users of the sandbox's user namespace, :inside:outside:count:
    #[arg(long)]
    pub(crate) uid_map: Vec<UidMap>,

    /// Map of groups of the sandbox's user namespace, :inside:outside:count:
    #[arg(long)]
    pub(crate) gid_map: Vec<GidMap>,

    /// Translation of users between guest and host, TYPE:SOURCE:TARGET:COUNT, repeatable
    #[arg(long)]
    pub(crate) translate_uid: Vec<IdMap>,

    /// The same for groups
    #[arg(long)]
    pub(crate) translate_gid: Vec<IdMap>,

    /// Pass O_NOATIME on to the host
    #[arg(long = "preserve-noatime")]
    pub(crate) preserve_noatime: bool,

    /// Refused: this device does not migrate
    #[arg(long = "migration-mode")]
    pub(crate) migration_mode: Option<MigrationMode>,

    /// Refused: this device does not migrate
    #[arg(long = "migration-on-error")]
    pub(crate) migration_on_error: Option<MigrationOnError>,

    /// Refused: this device does not migrate
    #[arg(long = "migration-verify-handles")]
    pub(crate) migration_verify_handles: bool,

    /// Refused: this device does not migrate
    #[arg(long = "migration-confirm-paths")]
    pub(crate) migration_confirm_paths: bool,

    /// What to do about stale files: heal or report [default: heal, unless --inode-file-handles=never or --rlimit-nofile is
    /// given]
    #[arg(long, value_enum, help_heading = "Options of virtiofsd-live")]
    pub(crate) staleness: Option<Staleness>,

    /// Serve metrics over HTTP at this address, at /metrics
    #[arg(long, value_name = "ADDR", help_heading = "Options of virtiofsd-live")]
    pub(crate) metrics: Option<SocketAddr>,

    /// Write metrics into a file of this directory, for the text file collector of node_exporter
    #[arg(long, value_name = "DIR", help_heading = "Options of virtiofsd-live")]
    pub(crate) metrics_dir: Option<PathBuf>,

    /// Label `share` of the metrics [default: derived from the directory and the socket]
    #[arg(long, value_parser = parse_name, help_heading = "Options of virtiofsd-live")]
    pub(crate) name: Option<String>,
}

impl Options {
    /// Parses a command line, `-o` included.
    ///
    /// # Errors
    /// Wrong usage, `--help` and `--version`.
    pub(crate) fn parse_from_line(line: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let options = Options::try_parse_from(line)?;
        compat::apply(options).map_err(|(kind, message)| Options::command().error(kind, message))
    }
}

fn parse_tag(tag: &str) -> Result<String, Error> {
    if !tag.is_empty() && tag.len() <= MAX_TAG_LEN { Ok(tag.into()) } else { Err(Error::InvalidTag) }
}

fn parse_xattrmap(rules: &str) -> Result<String, String> {
    XattrMap::try_from(rules).map(|_| rules.to_owned()).map_err(|error| error.to_string())
}

fn parse_name(name: &str) -> Result<String, &'static str> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !name.is_empty() && name.len() <= 63 && name.chars().all(allowed) {
        Ok(name.into())
    } else {
        Err("1 to 63 of a-z, 0-9 and '-' are expected")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        let line = ["virtiofsd", "--shared-dir", "/s", "--socket-path", "/k"].iter().chain(arguments);
        Options::parse_from_line(line.map(OsString::from))
    }

    #[test]
    fn command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn version_begins_as_stock_does() {
        let error = parse(&["--version"]).unwrap_err();
        assert!(error.to_string().starts_with("virtiofsd 1.14.0 "), "{error}");
    }

    #[test]
    fn later_options_override_earlier_ones() {
        let options = parse(&["--cache=never", "--cache", "always", "-o", "cache=none,no_xattr"]).unwrap();
        assert!(matches!(options.cache, CachePolicy::Never));
        assert_eq!(parse(&["--posix-acl"]).unwrap().posix_acl, NegotiationMode::Always);
    }

    #[test]
    fn invalid_values_are_wrong_usage() {
        for wrong in [
            &["--cache=sometimes"][..],
            &["-o", "cache=never"],
            &["-o", "nonsense"],
            &["--fd=3"],
            &["--posix-acl", "always"],
            &["--xattrmap", ":nonsense"],
            &["--inode-file-handles", "never"],
            &["--name", "A B"],
        ] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
