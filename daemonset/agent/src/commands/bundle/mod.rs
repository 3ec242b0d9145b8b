//! `virtiofs-agent support-bundle`: what explains how this host's shares are doing, in one file to hand on.
//!
//! What is in it is told on standard output and in its own `README.txt`. Nothing secret is: of manifests only the
//! shares themselves are taken, of mounts only those that matter and without credentials, and names of guests' files
//! only where that was asked for.

mod host;
mod mask;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use virtiofs_crds::read_directory;

use crate::args::SupportBundleArgs;
use crate::broker::client::Client;
use crate::metrics;
use crate::output::print;
use crate::published::Published;
use crate::runtime_dir::RuntimeDir;
use crate::status;

/// One file of the bundle: its name, what it is, and what it holds.
struct Part {
    name: &'static str,
    about: &'static str,
    content: String,
}

/// Writes the bundle and says what is in it.
pub(crate) fn support_bundle(args: &SupportBundleArgs) -> Result<bool> {
    let runtime_dir = RuntimeDir::at(&std::path::absolute(&args.runtime_dir).context("--runtime-dir")?);
    let answer = Client::connect(&runtime_dir.broker_socket()).and_then(|mut client| client.status());
    let published = Published::read(&runtime_dir.published());
    let status = answer.as_ref().ok().cloned();
    let document = status::gather(&runtime_dir, published.clone(), answer);
    let (document, table) = (document.to_json()?, document.to_table());
    let parts = vec![
        Part {
            name: "status.json",
            about: "shares, sessions, what is in force (virtiofs-agent status -o json)",
            content: pretty(&mask::status(document, args.guest_paths)),
        },
        Part {
            name: "status.txt",
            about: "the same for people",
            content: if args.guest_paths { table } else { mask::text(&table) },
        },
        Part {
            name: "metrics.txt",
            about: "counts since the broker started (/metrics, made anew)",
            content: metrics::page(published.as_ref().map(|it| &it.report), status.as_ref()),
        },
        Part {
            name: "manifests.json",
            about: "the VirtiofsShare documents: name and spec, nothing else of their files; what was refused and why",
            content: pretty(&manifests(published.as_ref().and_then(|it| it.shares_dir.clone()))),
        },
        Part {
            name: "host.txt",
            about: "versions, kernel, limits, cgroups of broker and engines, mounts at and below sources",
            content: host::describe(status.as_ref()),
        },
        Part {
            name: "log.txt",
            about: "the last lines of agent, broker and engines, where journalctl has them",
            content: if args.guest_paths { host::log() } else { mask::text(&host::log()) },
        },
    ];
    write(&args.output, &parts, args.guest_paths)?;
    let list: String = parts.iter().map(|part| format!("    {:15} {}\n", part.name, part.about)).collect();
    print(&format!("{}:\n{list}", args.output.display()))?;
    Ok(true)
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Shares as they are declared. Other documents of the same files, and whatever else stands in the metadata, are
/// nobody's business.
fn manifests(shares_dir: Option<PathBuf>) -> Value {
    let Some(directory) = shares_dir else {
        return json!({"error": "no agent has published where shares are declared"});
    };
    match read_directory(&directory) {
        Err(error) => json!({"directory": directory, "error": error.to_string()}),
        Ok(read) => {
            let share = |it: &virtiofs_crds::Document| json!({"at": it.origin.to_string(), "name": it.share.name, "spec": it.object.spec});
            let shares: Vec<_> = read.documents.iter().map(share).collect();
            let refused: Vec<_> = read.refusals.iter().map(ToString::to_string).collect();
            json!({"directory": directory, "shares": shares, "refused": refused})
        }
    }
}

fn write(path: &std::path::Path, parts: &[Part], guest_paths: bool) -> Result<()> {
    let said = || format!("--output {}", path.display());
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).with_context(said)?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    let list: String = parts.iter().map(|part| format!("{:15} {}\n", part.name, part.about)).collect();
    let paths = if guest_paths { "in it" } else { "left out" };
    let readme = format!("virtiofs-operator support bundle\nnames of guests' files: {paths}\n\n{list}");
    add(&mut archive, "README.txt", &readme).with_context(said)?;
    for part in parts {
        add(&mut archive, part.name, &part.content).with_context(said)?;
    }
    archive.into_inner().and_then(GzEncoder::finish).with_context(said)?;
    Ok(())
}

fn add<W: std::io::Write>(archive: &mut tar::Builder<W>, name: &str, content: &str) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o600);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |it| it.as_secs());
    header.set_mtime(now);
    archive.append_data(&mut header, format!("virtiofs-support/{name}"), content.as_bytes())
}
