//! `virtiofsctl completions` and `man`: files made from the command line's own definition.

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::args::{Arguments, CompletionsArgs, ManArgs};

/// Prints a completion script.
pub(crate) fn completions(args: &CompletionsArgs) -> Result<bool> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Arguments::command(), "virtiofsctl", &mut script);
    virtiofs_client::text::print(&String::from_utf8_lossy(&script))?;
    Ok(true)
}

/// Writes a page for the program and one for each command.
pub(crate) fn man_pages(args: &ManArgs) -> Result<bool> {
    let written = clap_mangen::generate_to(Arguments::command(), &args.directory);
    written.with_context(|| format!("writing manual pages into {}", args.directory.display()))?;
    Ok(true)
}
