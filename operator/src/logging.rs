//! Log lines on standard error.

use std::io::{IsTerminal, stderr};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::args::{Arguments, LogFormat};

/// Writes log lines as asked from here on.
pub(crate) fn start(arguments: &Arguments) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&arguments.log).with_context(|| format!("--log {:?}", arguments.log))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    match arguments.log_format {
        LogFormat::Text => lines.with_ansi(stderr().is_terminal()).init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}
