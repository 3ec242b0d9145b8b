//! `virtiofs-agent status`: what the broker does and what the agent knows, for a person or a program.

mod document;
mod frontends;
mod gather;
mod table;

use std::path::Path;

use anyhow::Context;
use serde_json::Value;
use virtiofs_contract::control::Status;

use crate::args::{OutputFormat, StatusArgs};
use crate::broker::client::{Client, ClientError};
use crate::published::Published;
use crate::runtime_dir::RuntimeDir;
use document::Document;

/// Asks, and prints the answer on standard output. A running agent is not needed. Does the broker answer?
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<bool> {
    if args.schema {
        crate::output::print(&schema())?;
        return Ok(true);
    }
    let runtime_dir = RuntimeDir::at(&absolute(&args.runtime_dir)?);
    let broker = Client::connect(&runtime_dir.broker_socket()).and_then(|mut client| client.status());
    let mut answer = gather(&runtime_dir, Published::read(&runtime_dir.published()), broker);
    answer.0.select(&args.shares)?;
    let text = match args.output {
        OutputFormat::Json => format!("{:#}\n", answer.to_json()?),
        OutputFormat::Table => answer.to_table(),
    };
    crate::output::print(&text)?;
    Ok(answer.0.broker.running)
}

/// What the broker does and the agent knows.
pub(crate) struct Answer(Document);

/// Puts together what the broker answered and the agent has published.
pub(crate) fn gather(
    runtime_dir: &RuntimeDir,
    published: Option<Published>,
    broker: Result<Status, ClientError>,
) -> Answer {
    Answer(gather::gather(runtime_dir, runtime_dir.is_locked(), published, broker))
}

impl Answer {
    /// The document for programs.
    pub(crate) fn to_json(&self) -> anyhow::Result<Value> {
        serde_json::to_value(&self.0).context("writing JSON")
    }

    /// The table for people.
    pub(crate) fn to_table(&self) -> String {
        table::render(&self.0)
    }
}

/// The JSON schema of the document for programs.
fn schema() -> String {
    format!("{:#}\n", schemars::schema_for!(Document).to_value())
}

/// The directory as it stands in the lines for VMMs: they run elsewhere.
fn absolute(path: &Path) -> anyhow::Result<std::path::PathBuf> {
    std::path::absolute(path).with_context(|| format!("--runtime-dir {}", path.display()))
}

#[cfg(test)]
mod tests {
    /// `make generate` writes it anew.
    #[test]
    fn the_schema_in_the_documentation_is_that_of_the_document() {
        let written = include_str!("../../../../docs/status.schema.json");
        assert!(written == super::schema(), "docs/status.schema.json is stale: run make generate");
    }
}
