//! `virtiofsctl support-bundle`: what explains the state of this host's shares, in one file to hand on.
//!
//! Standard output and the bundle's own `README.txt` list its content. It has no secrets: of manifests only the shares
//! themselves, of mounts only those at and below sources and without credentials, and file names of guests only with
//! `--guest-paths`.

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
use virtiofs_client::broker::Client;
use virtiofs_client::metrics;
use virtiofs_client::published::Published;
use virtiofs_client::runtime_dir::RuntimeDir;
use virtiofs_client::text::print;
use virtiofs_crds::read_directory;

use crate::args::SupportBundleArgs;
use crate::status;

/// One file of the bundle: its name, what it is, and what it holds.
struct Part {
    name: &'static str,
    about: &'static str,
    content: String,
}

/// Writes the bundle and lists its content.
pub(crate) fn support_bundle(args: &SupportBundleArgs) -> Result<bool> {
    let runtime_dir = RuntimeDir::at(&std::path::absolute(&args.location.runtime_dir).context("--runtime-dir")?);
    let answer = Client::connect(&runtime_dir.broker_socket()).and_then(|mut client| client.status());
    let published = Published::read(&runtime_dir.published());
    let status = answer.as_ref().ok().cloned();
    let document = status::gather(&runtime_dir, published.clone(), answer);
    let (document, table) = (document.to_json()?, document.to_table());
    let parts = vec![
        Part {
            name: "status.json",
            about: "shares, sessions, active configuration (virtiofsctl status -o json)",
            content: pretty(&mask::status(document, args.guest_paths)),
        },
        Part {
            name: "status.txt",
            about: "the same as a table",
            content: if args.guest_paths { table } else { mask::text(&table) },
        },
        Part {
            name: "metrics.txt",
            about: "counts since the broker started, as on /metrics",
            content: metrics::page(published.as_ref().map(|it| &it.report), status.as_ref()),
        },
        Part {
            name: "manifests.json",
            about: "the VirtiofsShare documents: name and spec, nothing else of their files; rejected documents and why",
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

/// Shares as declared. Other documents of the same files, and other metadata, are left out: they may hold secrets.
fn manifests(shares_dir: Option<PathBuf>) -> Value {
    let Some(directory) = shares_dir else {
        return json!({"error": "no agent has published the directory of manifests"});
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
    let context = || format!("--output {}", path.display());
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).with_context(context)?;
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    let list: String = parts.iter().map(|part| format!("{:15} {}\n", part.name, part.about)).collect();
    let paths = if guest_paths { "included" } else { "left out" };
    let readme = format!("virtiofs-operator support bundle\nfile names of guests: {paths}\n\n{list}");
    add(&mut archive, "README.txt", &readme).with_context(context)?;
    for part in parts {
        add(&mut archive, part.name, &part.content).with_context(context)?;
    }
    archive.into_inner().and_then(GzEncoder::finish).with_context(context)?;
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
