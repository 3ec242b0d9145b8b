//! Log lines on standard error; standard output belongs to the person who runs the command.

use std::io::{self, IsTerminal};

use anyhow::Context;
use tracing_subscriber::EnvFilter;

use crate::args::{Arguments, Command, LogFormat};

/// What is logged, and how it looks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogChoice {
    /// Levels, for each part of the program.
    pub(crate) filter: String,
    /// None: as is usual.
    pub(crate) format: Option<LogFormat>,
}

impl LogChoice {
    /// What was asked for.
    ///
    /// `up` tells a person on standard output what changes; unless a log is asked for, it writes only warnings
    /// beside that, so that nothing is said twice.
    pub(crate) fn of(arguments: &Arguments) -> Self {
        let told_anyway = matches!(arguments.command, Command::Up(_)) && arguments.log_format.is_none();
        let usual = if told_anyway { "warn,virtiofs_agent::announce=off" } else { "info" };
        let filter = arguments.log.clone().unwrap_or_else(|| usual.to_owned());
        LogChoice { filter, format: arguments.log_format }
    }

    /// The same choice as options for the broker.
    pub(crate) fn options(&self) -> [&str; 4] {
        let format = match self.format {
            Some(LogFormat::Json) => "json",
            Some(LogFormat::Text) | None => "text",
        };
        ["--log", &self.filter, "--log-format", format]
    }
}

/// Starts logging.
pub(crate) fn start(choice: &LogChoice) -> anyhow::Result<()> {
    let filter = EnvFilter::builder().parse(&choice.filter).with_context(|| format!("--log {}", choice.filter))?;
    // A line that cannot be written is lost; the library would print so, and panic where that fails too.
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .log_internal_errors(false);
    match choice.format {
        Some(LogFormat::Json) => subscriber.json().flatten_event(true).init(),
        Some(LogFormat::Text) | None => subscriber.init(),
    }
    Ok(())
}
