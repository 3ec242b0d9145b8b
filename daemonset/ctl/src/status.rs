//! `virtiofsctl status`: the broker's status and the agent's report, as a table or as JSON.

mod document;
mod frontends;
mod gather;
mod table;

use std::path::Path;

use anyhow::Context;
use serde_json::Value;
use virtiofs_client::broker::{Client, ClientError};
use virtiofs_client::published::Published;
use virtiofs_client::runtime_dir::RuntimeDir;
use virtiofs_client::text::print;
use virtiofs_contract::control::Status;

use crate::args::{OutputFormat, StatusArgs};
use document::Document;

/// Prints the status. No agent needs to run. True if the broker answers.
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<bool> {
    if args.schema {
        print(&schema())?;
        return Ok(true);
    }
    let runtime_dir = RuntimeDir::at(&absolute(&args.location.runtime_dir)?);
    let broker = Client::connect(&runtime_dir.broker_socket()).and_then(|mut client| client.status());
    let mut report = gather(&runtime_dir, Published::read(&runtime_dir.published()), broker);
    report.0.select(&args.shares)?;
    let text = match args.output {
        OutputFormat::Json => format!("{:#}\n", report.to_json()?),
        OutputFormat::Table => report.to_table(),
    };
    print(&text)?;
    Ok(report.0.broker.running)
}

/// The status of one host.
pub(crate) struct HostStatus(Document);

/// Combines the broker's status and the agent's published report.
pub(crate) fn gather(
    runtime_dir: &RuntimeDir,
    published: Option<Published>,
    broker: Result<Status, ClientError>,
) -> HostStatus {
    HostStatus(gather::gather(runtime_dir, runtime_dir.is_locked(), published, broker))
}

impl HostStatus {
    /// The JSON document.
    pub(crate) fn to_json(&self) -> anyhow::Result<Value> {
        serde_json::to_value(&self.0).context("writing JSON")
    }

    /// The table.
    pub(crate) fn to_table(&self) -> String {
        table::render(&self.0)
    }
}

/// The JSON schema of the document.
fn schema() -> String {
    format!("{:#}\n", schemars::schema_for!(Document).to_value())
}

/// The directory as an absolute path: the lines for VMMs name it.
fn absolute(path: &Path) -> anyhow::Result<std::path::PathBuf> {
    std::path::absolute(path).with_context(|| format!("--runtime-dir {}", path.display()))
}

#[cfg(test)]
mod tests {
    /// `make generate` writes the file.
    #[test]
    fn the_documented_schema_is_current() {
        let written = include_str!("../../../docs/status.schema.json");
        assert!(written == super::schema(), "docs/status.schema.json is stale: run make generate");
    }
}
