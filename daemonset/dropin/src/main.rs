//! `virtiofsd-live`: stock virtiofsd's command line, with this project's broker and engine behind it. For tools that start a
//! virtiofsd of their own.
//!
//! | module | |
//! |---|---|
//! | `args` | the command line of virtiofsd 1.14 |
//! | `plan` | what it means: the engine's configuration, or a refusal; pure |
//! | `name` | the name of the session; pure |
//! | `listen` | the pid file and the socket |
//! | `serve` | the session from start to end |
//! | `session` | the conversation with the broker |
//! | `remedies` | staleness |
//! | `source_root` | what is at the path of the directory |
//! | `metrics`, `syslog` | what others can read |
//! | `process`, `orphans`, `runtime_dir` | what is started and made, and removed again |

mod args;
mod listen;
mod metrics;
mod name;
mod orphans;
mod plan;
mod process;
mod remedies;
mod runtime_dir;
mod serve;
mod session;
mod source_root;
mod syslog;

use std::io::Write;
use std::process::ExitCode;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::unistd::{getegid, geteuid};
use virtiofs_logging::LogFormat;

use args::Options;
use plan::{DEFAULT_OPEN_FILES, Site, log_level, plan};
use serve::{End, Signals, serve};
use syslog::Syslog;

/// As stock virtiofsd, except for `migrate-precopy`.
const CAPABILITIES: &str = r#"{
  "type": "fs",
  "features": [
    "posix-acl-negotiation-mode",
    "security-label-negotiation-mode",
    "separate-options"
  ]
}
"#;

fn main() -> ExitCode {
    let options = Options::parse_from_line(std::env::args_os()).unwrap_or_else(|error| error.exit());
    if options.print_capabilities {
        return written(std::io::stdout().write_all(CAPABILITIES.as_bytes()).is_ok());
    }
    // Before any thread starts: one that does not block them would die of them.
    let signals = Signals::block().map_err(anyhow::Error::from);
    let syslog = options.syslog.then(Syslog::redirect);
    let no_syslog = syslog.as_ref().and_then(|result| result.as_ref().err());
    let outcome = signals.and_then(|signals| logged(&options, &signals, no_syslog));
    if let Some(Ok(syslog)) = syslog {
        syslog.finish();
    }
    match outcome {
        Ok(End::Left) => ExitCode::SUCCESS,
        Ok(End::Signalled(Signal::SIGINT)) => die_of(Signal::SIGINT),
        Ok(End::Signalled(_)) => ExitCode::FAILURE,
        Err(error) => {
            // `eprintln!` would panic if standard error is closed.
            let _ = writeln!(std::io::stderr(), "virtiofsd-live: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn written(done: bool) -> ExitCode {
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Serves, with a log.
fn logged(options: &Options, signals: &Signals, no_syslog: Option<&std::io::Error>) -> anyhow::Result<End> {
    let filter = filter(options);
    // A tool may not read standard error.
    let log = virtiofs_logging::init_queued(&filter, LogFormat::Text)?;
    if let Some(error) = no_syslog {
        tracing::warn!(%error, "can't enable syslog");
    }
    let outcome = planned(options, &filter, signals);
    log.finish();
    outcome
}

fn planned(options: &Options, filter: &str, signals: &Signals) -> anyhow::Result<End> {
    let plan = plan(options, &site(options.rlimit_nofile)?)?;
    plan.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    serve(options, plan, filter, signals)
}

/// What to log: `RUST_LOG` wins over `--log-level`, as for stock virtiofsd, where it is valid here.
fn filter(options: &Options) -> String {
    let given = std::env::var("RUST_LOG").ok().filter(|_| !options.syslog);
    let level = given.and_then(|text| text.parse().ok()).unwrap_or_else(|| log_level(options));
    level.to_string().to_lowercase()
}

/// What the plan depends on. `wanted`: open files of the engine, for which the hard limit is raised here if it may be.
fn site(wanted: Option<u64>) -> anyhow::Result<Site> {
    let map = std::fs::read_to_string("/proc/self/uid_map")?;
    let nr_open = std::fs::read_to_string("/proc/sys/fs/nr_open")?.trim().parse()?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let wanted = wanted.unwrap_or(DEFAULT_OPEN_FILES).min(nr_open);
    if wanted > hard && setrlimit(Resource::RLIMIT_NOFILE, soft, wanted).is_err() {
        tracing::debug!(hard, wanted, "the limit of open files cannot be raised");
    }
    Ok(Site {
        uid: geteuid().as_raw(),
        gid: getegid().as_raw(),
        initial_user_namespace: map.split_whitespace().eq(["0", "0", "4294967295"]),
        nr_open,
        open_files: getrlimit(Resource::RLIMIT_NOFILE)?,
    })
}

/// Ends as a program that does not handle the signal.
fn die_of(signal: Signal) -> ExitCode {
    let _ = raise(signal).and_then(|()| SigSet::from(signal).thread_unblock());
    ExitCode::FAILURE
}
