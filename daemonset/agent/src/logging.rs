//! The log options of the agent, and the options it passes on to its broker.

use virtiofs_logging::LogFormat;

use crate::args::{Arguments, Command};

/// Log options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogChoice {
    /// A level, or `target=level` directives.
    pub(crate) filter: String,
    /// Format of log lines.
    pub(crate) format: LogFormat,
}

impl LogChoice {
    /// The options that the arguments choose. `up` reports changes on standard output; without log options it logs only
    /// warnings besides, so that nothing is reported twice.
    pub(crate) fn of(arguments: &Arguments) -> Self {
        let reported = matches!(arguments.command, Command::Up(_)) && arguments.log_format.is_none();
        let default = if reported { "warn,virtiofs_agent::announce=off" } else { "info" };
        let filter = arguments.log.clone().unwrap_or_else(|| default.to_owned());
        LogChoice { filter, format: arguments.log_format.unwrap_or_default() }
    }

    /// The same options for the broker's command line.
    pub(crate) fn options(&self) -> [&str; 4] {
        ["--log", &self.filter, "--log-format", self.format.as_str()]
    }
}
