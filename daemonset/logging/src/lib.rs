//! Logging of the agent, the broker and the operator: lines on standard error, as text or as JSON.

mod queued;

use std::io::{self, IsTerminal};

use clap::ValueEnum;
use thiserror::Error;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

pub use queued::QueuedWriter;

/// Format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One line of text each.
    #[default]
    Text,
    /// One JSON object each.
    Json,
}

impl LogFormat {
    /// The value of the command line option.
    pub fn as_str(self) -> &'static str {
        match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }
}

/// Why logging could not start. Displays its cause, so it has no `source`.
#[derive(Debug, Error)]
pub enum LogError {
    /// The filter is not a level or a list of `target=level` directives.
    #[error("--log {filter:?}: {error}")]
    Filter {
        /// The rejected filter.
        filter: String,
        /// The parser's error.
        error: String,
    },
    /// The thread that writes queued lines could not start.
    #[error("start of the log thread: {0}")]
    Thread(io::Error),
}

/// Starts logging to standard error. A call that logs returns after its line is written.
pub fn init(filter: &str, format: LogFormat) -> Result<(), LogError> {
    subscribe(parse(filter)?, format, io::stderr().is_terminal(), io::stderr);
    Ok(())
}

/// Starts logging to standard error through a bounded queue, so that logging never blocks. Call
/// [`QueuedWriter::finish`] before the process exits.
pub fn init_queued(filter: &str, format: LogFormat) -> Result<QueuedWriter, LogError> {
    let filter = parse(filter)?;
    let report = |lost| tracing::warn!(lost, "log lines were dropped because standard error was not read in time");
    let writer = QueuedWriter::new(io::stderr(), report).map_err(LogError::Thread)?;
    let lines = writer.clone();
    subscribe(filter, format, false, move || lines.clone());
    Ok(writer)
}

fn parse(filter: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(filter).map_err(|error| LogError::Filter { filter: filter.to_owned(), error: error.to_string() })
}

fn subscribe<W>(filter: EnvFilter, format: LogFormat, ansi: bool, writer: W)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // The library would print an internal error to standard error, and panic if that fails too.
    let lines = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false).with_writer(writer);
    match format {
        LogFormat::Text => lines.with_ansi(ansi).init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_error_names_the_option_and_the_value() {
        let error = parse("info,=x=y").unwrap_err().to_string();
        assert!(error.starts_with("--log \"info,=x=y\": "), "{error}");
        assert!(parse("info,virtiofs_broker=debug").is_ok());
    }

    #[test]
    fn format_names_match_the_command_line() {
        for format in [LogFormat::Text, LogFormat::Json] {
            assert_eq!(LogFormat::from_str(format.as_str(), false), Ok(format));
        }
    }
}
