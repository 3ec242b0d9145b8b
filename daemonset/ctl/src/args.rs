//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use virtiofs_client::runtime_dir::default_root;

/// Part of the long help.
const EXIT_STATUS: &str = "\
Exit status:
  0  done, or the answer is yes
  1  the answer is no: a document is invalid, the broker does not answer, a hand-over is not complete,
     sessions would end
  2  wrong usage
  3  the command failed; the message on standard error says why

Run a command as the user that the broker runs as. `virtiofsctl COMMAND --help` shows examples.";

/// Looks after the virtiofs shares of this host.
///
/// Checks manifests, shows shares and VMs, replaces engines under running VMs, releases a source so that it can be
/// unmounted, traces requests, and packs what explains a problem.
#[derive(Debug, Parser)]
#[command(name = "virtiofsctl", version, after_long_help = EXIT_STATUS)]
pub(crate) struct Arguments {
    /// The command.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Validate manifests and show the resulting configuration.
    Check(CheckArgs),
    /// Show shares, VMs, and the lines that give each share to a VM.
    Status(StatusArgs),
    /// Replace the engines of a share with new ones under the running VMs.
    Handover(HandoverArgs),
    /// Release a share's source so that the host can unmount it; guests wait.
    Release(ReleaseArgs),
    /// End a release: guests continue.
    Resume(ResumeArgs),
    /// End sessions of a share.
    Close(CloseArgs),
    /// End all sessions before the broker is stopped for good.
    Drain(DrainArgs),
    /// Show the requests of one session as they are answered.
    Trace(TraceArgs),
    /// Serve a share, or a directory of it, at an additional socket.
    Socket(SocketArgs),
    /// Pack what explains the state of this host's shares into one file.
    SupportBundle(SupportBundleArgs),
    /// Show how a tool that starts its own virtiofsd starts virtiofsd-live instead.
    Dropin(DropinArgs),
    /// Print a completion script for a shell.
    Completions(CompletionsArgs),
    /// Write manual pages into a directory.
    Man(ManArgs),
}

/// Where agent and broker run.
#[derive(Debug, Args)]
pub(crate) struct Location {
    /// Directory that agent and broker run in.
    #[arg(long, value_name = "DIR", default_value_os_t = default_root())]
    pub(crate) runtime_dir: PathBuf,
}

/// Options of `check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl check /etc/virtiofs/shares           every document of a directory
  virtiofsctl check images.yaml projects.yaml      some files

Reads only text: whether a source exists is checked when the share is served.")]
pub(crate) struct CheckArgs {
    /// Manifests, or one directory of them.
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// Options of `status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl status                               all shares
  virtiofsctl status images                        one share
  virtiofsctl status -o json | jq '.shares[] | {name, state}'")]
pub(crate) struct StatusArgs {
    /// Shares to show; all if none is given.
    #[arg(value_name = "SHARE")]
    pub(crate) shares: Vec<String>,
    #[command(flatten)]
    pub(crate) location: Location,
    /// Format of the output.
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub(crate) output: OutputFormat,
    /// Print the JSON schema of `-o json` instead.
    #[arg(long)]
    pub(crate) schema: bool,
}

/// Options of `handover`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl handover images                      after an upgrade of virtiofs-engine
  virtiofsctl handover images --session images-3   one VM only

Each engine is replaced between two requests of its guest, with the engine binary that is installed now. An engine that
cannot be stopped within 2 s keeps serving, and the command says why.")]
pub(crate) struct HandoverArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// Only this session of it.
    #[arg(long, value_name = "ID")]
    pub(crate) session: Option<String>,
    /// How long to wait for the hand-over to complete.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) location: Location,
}

/// Options of `release`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl release images && umount /srv/images && mount /srv/images && virtiofsctl resume images
  virtiofsctl release images --for 30m             a longer maintenance

All sessions of the share release the source, or none. The command is rejected (OrphanedFilesOpen) while guests have
files open that no name leads to; with --force they lose these files.")]
pub(crate) struct ReleaseArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// Time after which guests continue by themselves.
    #[arg(long = "for", value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    pub(crate) during: Duration,
    /// Release even if guests have files open that no name leads to; they lose these files.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) location: Location,
}

/// Options of `resume`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl resume images

Rejected while the source is missing; the share then stays released.")]
pub(crate) struct ResumeArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    #[command(flatten)]
    pub(crate) location: Location,
}

/// Options of `close`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl close images                         list the sessions that would end
  virtiofsctl close images --force                 end them
  virtiofsctl close images --session images-3 --force

A VM whose session ended has no access to the share until it is restarted.")]
pub(crate) struct CloseArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// Only this session of it.
    #[arg(long, value_name = "ID")]
    pub(crate) session: Option<String>,
    /// End the sessions: their VMs lose the share until they are restarted.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) location: Location,
}

/// Options of `drain`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl drain                                lists the VMs that would lose their shares
  virtiofsctl drain --force                        before an uninstallation

Sessions outlive a broker that has a keeper, and so does this: a broker that is started again serves again.")]
pub(crate) struct DrainArgs {
    /// End the sessions; without it, they are only listed.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) location: Location,
}

/// Options of `trace`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl trace images-3                       10 seconds of one VM's requests
  virtiofsctl trace images-3 --for 1m -o json >trace.json

Tracing does not slow the guest down: requests beyond --rate, and those not read in time, are counted on standard error.")]
pub(crate) struct TraceArgs {
    /// The session, as `status` shows it.
    #[arg(value_name = "SESSION")]
    pub(crate) session: String,
    /// How long to trace; Ctrl-C ends the trace earlier.
    #[arg(long = "for", value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) during: Duration,
    /// Maximum of requests to show in one second; more are counted and left out.
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    pub(crate) rate: u32,
    /// A line, or a JSON object, for each request.
    #[arg(short, long, value_enum, default_value_t = OutputFormat::Table)]
    pub(crate) output: OutputFormat,
    #[command(flatten)]
    pub(crate) location: Location,
}

/// Options of `socket`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl socket images vm-7                   a socket for one VM; prints its path
  virtiofsctl socket images vm-7 --sub-path base   a directory of the share
  virtiofsctl socket images vm-7 --remove

The socket follows every change of its share and is removed with it.")]
pub(crate) struct SocketArgs {
    /// The share.
    #[arg(value_name = "SHARE")]
    pub(crate) share: String,
    /// Name of the socket: a-z, 0-9 and -. Its file is SHARE.NAME.sock, next to the share's own socket.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// Serve this directory of the share instead of all of it; a path relative to the source.
    #[arg(long, value_name = "PATH")]
    pub(crate) sub_path: Option<PathBuf>,
    /// Owner of the socket [default: that of the share's own].
    #[arg(long, value_name = "UID")]
    pub(crate) owner: Option<u32>,
    /// Group of the socket [default: that of the share's own].
    #[arg(long, value_name = "GID")]
    pub(crate) group: Option<u32>,
    /// Permission bits of the socket, octal [default: those of the share's own].
    #[arg(long, value_name = "MODE", value_parser = octal)]
    pub(crate) mode: Option<u32>,
    /// Remove the socket; VMs that use it continue.
    #[arg(long, conflicts_with_all = ["sub_path", "owner", "group", "mode"])]
    pub(crate) remove: bool,
    #[command(flatten)]
    pub(crate) location: Location,
}

/// Options of `support-bundle`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl support-bundle
  virtiofsctl support-bundle --output /tmp/virtiofs.tar.gz --guest-paths

The file holds status, metrics, shares as declared, limits and mounts of this host and the last log lines; no
credentials, and no file names of guests unless --guest-paths is given.")]
pub(crate) struct SupportBundleArgs {
    /// The file to write; it must not exist.
    #[arg(long, value_name = "FILE", default_value = "virtiofs-support.tar.gz")]
    pub(crate) output: PathBuf,
    /// Include file names of guests.
    #[arg(long)]
    pub(crate) guest_paths: bool,
    #[command(flatten)]
    pub(crate) location: Location,
}

/// Options of `dropin`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl dropin print libvirt                 for <filesystem> of a domain
  virtiofsctl dropin print kata                    for configuration.toml
  virtiofsctl dropin print vhost-user >/etc/qemu/vhost-user/40-virtiofsd-live.json

Nothing is changed on this host.")]
pub(crate) struct DropinArgs {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: DropinCommand,
}

/// The commands of `dropin`.
#[derive(Debug, Subcommand)]
pub(crate) enum DropinCommand {
    /// Print the lines that a tool needs.
    Print {
        /// The tool; vhost-user: the discovery file, for all programs that read /usr/share/qemu/vhost-user.
        #[arg(value_name = "TOOL", value_enum)]
        tool: Tool,
        /// Absolute path of virtiofsd-live [default: next to virtiofsctl, else /usr/bin/virtiofsd-live].
        #[arg(long, value_name = "PATH")]
        binary: Option<PathBuf>,
    },
}

/// Programs that start a virtiofsd of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tool {
    /// libvirt.
    Libvirt,
    /// virtme-ng.
    VirtmeNg,
    /// bcvk.
    Bcvk,
    /// Incus.
    Incus,
    /// Kata Containers.
    Kata,
    /// microvm.nix.
    #[value(name = "microvm.nix")]
    MicrovmNix,
    /// The discovery file of vhost-user back-ends.
    VhostUser,
}

/// Options of `completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl completions bash >/etc/bash_completion.d/virtiofsctl
  virtiofsctl completions zsh >/usr/share/zsh/site-functions/_virtiofsctl")]
pub(crate) struct CompletionsArgs {
    /// The shell.
    #[arg(value_name = "SHELL")]
    pub(crate) shell: Shell,
}

/// Options of `man`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtiofsctl man /usr/local/share/man/man1        then: man virtiofsctl, man virtiofsctl-status")]
pub(crate) struct ManArgs {
    /// An existing directory.
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
}

fn octal(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "not an octal mode such as 0660".to_owned())
}

/// Format of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people.
    Table,
    /// For programs; the schema is versioned.
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples() {
        for command in Arguments::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Examples:\n  virtiofsctl "), "{}: {help:?}", command.get_name());
        }
    }
}
