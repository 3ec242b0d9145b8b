//! Log lines on standard error; standard output belongs to the person who runs the command.

use std::io::{self, IsTerminal};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::args::{Arguments, Command, LogFormat};

/// Starts logging.
///
/// `up` tells a person on standard output what changes; unless a log is asked for, it writes only warnings
/// beside that, so that nothing is said twice.
pub(crate) fn start(arguments: &Arguments) -> anyhow::Result<()> {
    let told_anyway = matches!(arguments.command, Command::Up(_)) && arguments.log_format.is_none();
    let default = if told_anyway { "warn" } else { "info" };
    let filter = arguments.log.as_deref().unwrap_or(default);
    let filter = EnvFilter::builder().parse(filter).with_context(|| format!("--log {filter}"))?;
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    match arguments.log_format {
        Some(LogFormat::Json) => subscriber.json().flatten_event(true).init(),
        _ => subscriber.init(),
    }
    Ok(())
}
