//! `virtiofsctl check`: validates manifests and shows the configuration that follows from them.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use virtiofs_client::report::Problem;
use virtiofs_client::text::{name, print};
use virtiofs_config::{EngineConfig, LONG_TIMEOUT_MS};
use virtiofs_crds::v1alpha1::Content;
use virtiofs_crds::{Document, Manifests, Share, read_directory, read_files};

use crate::args::CheckArgs;

/// Prints what was found. True if there is a document and all are valid.
pub(crate) fn check(args: &CheckArgs) -> anyhow::Result<bool> {
    let manifests = read(&args.files)?;
    print(&render(&manifests))?;
    Ok(manifests.refusals.is_empty() && !manifests.documents.is_empty())
}

/// The documents of all files, or of all files of one directory; duplicate names are found across files.
fn read(paths: &[PathBuf]) -> anyhow::Result<Manifests> {
    if let [directory] = paths
        && directory.is_dir()
    {
        return read_directory(directory).with_context(|| directory.display().to_string());
    }
    let directory = paths.iter().find(|path| path.is_dir());
    ensure!(directory.is_none(), "give either files or one directory");
    Ok(read_files(paths))
}

fn render(manifests: &Manifests) -> String {
    let mut text = String::new();
    for document in &manifests.documents {
        text.push_str(&accepted(document));
    }
    for ignored in &manifests.ignored {
        _ = writeln!(text, "{}: not a share ({}), ignored", ignored.origin, ignored.what);
    }
    for refusal in &manifests.refusals {
        _ = writeln!(text, "{}", with_share(&Problem::from(refusal)));
    }
    if manifests.documents.is_empty() && manifests.refusals.is_empty() {
        text.push_str("no VirtiofsShare documents found\n");
    }
    text
}

fn with_share(problem: &Problem) -> String {
    match &problem.share {
        Some(share) => format!("share {share:?}: {problem}"),
        None => problem.to_string(),
    }
}

fn accepted(document: &Document) -> String {
    let share = &document.share;
    format!(
        "{}: share {:?} is valid\n    source  {}\n    content {}{}\n    socket  mode {:04o}{}{}\n    engine  {}\n",
        document.origin,
        share.name.as_str(),
        share.source,
        share.content.as_str(),
        several_writers(share),
        share.socket.mode,
        share.socket.owner.map_or_else(String::new, |owner| format!(", owner {owner}")),
        share.socket.group.map_or_else(String::new, |group| format!(", group {group}")),
        summary(&share.engine),
    )
}

/// What the share means for several VMs that write.
fn several_writers(share: &Share) -> &'static str {
    match share.content {
        _ if share.exclusive => ", one VM at a time",
        Content::Shared if share.engine.writable() => ", file locks of one VM are unknown to other VMs and to the host",
        _ => "",
    }
}

/// The configuration in one line: first what follows from `content`, then what is switched on.
fn summary(engine: &EngineConfig) -> String {
    let mut parts = vec![
        name(&engine.access),
        format!("cache {}", name(&engine.cache)),
        format!("names cached {}", span(engine.entry_timeout_ms)),
        format!("attributes cached {}", span(engine.attr_timeout_ms)),
        format!("missing names cached {}", span(engine.negative_timeout_ms)),
        format!("file handles {}", name(&engine.inode_file_handles)),
        format!("sandbox {}", name(&engine.sandbox)),
    ];
    let switches = [
        (engine.writeback, "writeback"),
        (engine.xattr, "xattr"),
        (engine.posix_acl, "posixACL"),
        (engine.security_label, "securityLabel"),
        (engine.killpriv, "killpriv"),
        (engine.allow_mmap, "allowMmap"),
        (engine.direct_io, "directIO"),
        (engine.device_nodes, "deviceNodes"),
        (engine.file_capabilities, "fileCapabilities"),
    ];
    parts.extend(switches.into_iter().filter(|(on, _)| *on).map(|(_, name)| name.to_owned()));
    parts.extend(engine.open_files.map(|limit| format!("at most {limit} open files")));
    parts.extend(translation("uids", engine.uid_translation.len()));
    parts.extend(translation("gids", engine.gid_translation.len()));
    parts.join(", ")
}

fn translation(ids: &str, rules: usize) -> Option<String> {
    (rules > 0).then(|| format!("{ids} translated by {rules} rules"))
}

fn span(milliseconds: u64) -> String {
    match milliseconds {
        0 => "not at all".to_owned(),
        LONG_TIMEOUT_MS => "a day".to_owned(),
        whole if whole % 1000 == 0 => format!("{} s", whole / 1000),
        other => format!("{other} ms"),
    }
}
