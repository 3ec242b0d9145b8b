//! `virtiofs-agent status`: what the broker does and what the agent knows, for a person or a program.

mod document;
mod frontends;
mod table;

use std::path::Path;

use anyhow::Context;

use crate::args::{OutputFormat, StatusArgs};
use crate::broker::client::Client;
use crate::published::Published;
use crate::runtime_dir::RuntimeDir;

/// Asks, and prints the answer on standard output. A running agent is not needed. Does the broker answer?
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<bool> {
    let runtime_dir = RuntimeDir::at(&absolute(&args.runtime_dir)?);
    let broker = Client::connect(&runtime_dir.broker_socket()).and_then(|mut client| client.status());
    let published = Published::read(&runtime_dir.published());
    let mut document = document::gather(&runtime_dir, runtime_dir.is_locked(), published, broker);
    document.select(&args.shares)?;
    let text = match args.output {
        OutputFormat::Json => serde_json::to_string_pretty(&document).context("writing JSON")? + "\n",
        OutputFormat::Table => table::render(&document),
    };
    crate::output::print(&text)?;
    Ok(document.broker.running)
}

/// The directory as it stands in the lines for VMMs: they run elsewhere.
fn absolute(path: &Path) -> anyhow::Result<std::path::PathBuf> {
    std::path::absolute(path).with_context(|| format!("--runtime-dir {}", path.display()))
}
