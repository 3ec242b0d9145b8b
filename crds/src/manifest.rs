//! `VirtiofsShare` documents from YAML: several to a file, several files to a directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::refusal::{Origin, Refusal, nearest};
use crate::schema::{API_VERSION, GROUP, KIND};
use crate::share::Share;
use crate::v1alpha1::VirtiofsShare;

/// Largest file that is read. A share is a few hundred bytes; etcd takes no object above 1.5 MiB.
const FILE_MAX: u64 = 1 << 20;
/// How many refusals of one document are worth reading.
const REFUSALS_MAX: usize = 20;
/// How many YAML nodes a file may come to, aliases followed.
const NODES_MAX: usize = 50_000;
/// How often a file may use an alias.
const ALIASES_MAX: usize = 1000;
/// How deep a document may be nested.
const DEPTH_MAX: usize = 32;

/// What a set of files declares.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    /// The documents that were accepted.
    pub documents: Vec<Document>,
    /// Why others were not. A share that is named here was meant to be declared, but is not.
    pub refusals: Vec<Refusal>,
    /// Documents that are someone else's.
    pub ignored: Vec<Ignored>,
}

/// One accepted document.
#[derive(Clone, Debug)]
pub struct Document {
    /// Where it stands.
    pub origin: Origin,
    /// The object as declared, defaults filled in.
    pub object: VirtiofsShare,
    /// What it parses to.
    pub share: Share,
}

/// A document of another API group, as may stand beside a share in a file that is applied to a cluster too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ignored {
    /// Where it stands.
    pub origin: Origin,
    /// Its `apiVersion` and `kind`.
    pub what: String,
}

/// Reads the documents of one text; `file` is what messages call it.
pub fn read_text(file: &Path, text: &str) -> Manifests {
    let mut manifests = Manifests::default();
    manifests.add_text(file, text);
    manifests.refuse_duplicates();
    manifests
}

/// Reads the documents of these files.
pub fn read_files<P: AsRef<Path>>(files: impl IntoIterator<Item = P>) -> Manifests {
    let mut manifests = Manifests::default();
    for file in files {
        manifests.add_file(file.as_ref());
    }
    manifests.refuse_duplicates();
    manifests
}

/// Reads the documents of every file of a directory whose name ends in `.yaml`, `.yml` or `.json` and does
/// not begin with a dot, by name. Directories inside it are not entered.
///
/// # Errors
/// The directory itself cannot be read. A file that cannot be read is a refusal.
pub fn read_directory(directory: &Path) -> io::Result<Manifests> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if is_manifest(&path) {
            files.push(path);
        }
    }
    files.sort();
    Ok(read_files(files))
}

fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|extension| extension.to_str());
    !hidden && matches!(extension, Some("yaml" | "yml" | "json")) && !path.is_dir()
}

impl Manifests {
    fn add_file(&mut self, file: &Path) {
        match read_bounded(file) {
            Ok(text) => self.add_text(file, &text),
            Err(message) => self.refuse(&Origin::file(file), None, Refusal::new("", message)),
        }
    }

    fn add_text(&mut self, file: &Path, text: &str) {
        let mut bytes = text.as_bytes();
        let mut origin = Origin::file(file);
        for document in serde_saphyr::read_with_options::<_, Value>(&mut bytes, yaml_options()) {
            origin = origin.next();
            match document {
                Ok(Value::Null) => {}
                Ok(value) => self.add_value(&origin, &value),
                Err(error) => self.refuse(&origin, None, Refusal::new("", yaml_message(&error))),
            }
        }
    }

    fn add_value(&mut self, origin: &Origin, value: &Value) {
        let name = value["metadata"]["name"].as_str();
        match classify(value) {
            Kind::Share => match Share::from_value(value) {
                Ok((object, share)) => self.documents.push(Document { origin: origin.clone(), object, share }),
                Err(refusals) => self.refuse_all(origin, name, refusals),
            },
            Kind::Foreign(what) => self.ignored.push(Ignored { origin: origin.clone(), what }),
            Kind::Wrong(refusal) => self.refuse(origin, name, refusal),
        }
    }

    fn refuse(&mut self, origin: &Origin, share: Option<&str>, refusal: Refusal) {
        self.refusals.push(refusal.at(origin).of(share));
    }

    fn refuse_all(&mut self, origin: &Origin, share: Option<&str>, refusals: Vec<Refusal>) {
        let unsaid = refusals.len().saturating_sub(REFUSALS_MAX);
        refusals.into_iter().take(REFUSALS_MAX).for_each(|refusal| self.refuse(origin, share, refusal));
        if unsaid > 0 {
            self.refuse(origin, share, Refusal::new("", format!("and {unsaid} more; mend these first")));
        }
    }

    /// Two documents of one name: neither is taken. Whichever came first by accident of file names would
    /// otherwise change under a running share when a file is added.
    fn refuse_duplicates(&mut self) {
        let mut places: BTreeMap<String, Vec<Origin>> = BTreeMap::new();
        for document in &self.documents {
            places.entry(document.share.name.to_string()).or_default().push(document.origin.clone());
        }
        places.retain(|_, origins| origins.len() > 1);
        self.documents.retain(|document| !places.contains_key(document.share.name.as_str()));
        for (name, origins) in places {
            let all = origins.iter().map(Origin::to_string).collect::<Vec<_>>().join(" and in ");
            for origin in &origins {
                let message = format!("{name:?} is declared in {all}; keep one of them");
                self.refuse(origin, Some(&name), Refusal::new("metadata.name", message));
            }
        }
    }
}

/// Whose document it is.
enum Kind {
    Share,
    Foreign(String),
    Wrong(Refusal),
}

fn classify(value: &Value) -> Kind {
    if !value.is_object() {
        return Kind::Wrong(Refusal::new("", format!("is no mapping; a share begins with apiVersion: {API_VERSION}")));
    }
    let text = |field: &str| value[field].as_str().unwrap_or_default();
    match (text("apiVersion"), text("kind")) {
        (API_VERSION, KIND) => Kind::Share,
        ("", _) => Kind::Wrong(Refusal::new("apiVersion", format!("is missing; write {API_VERSION}"))),
        (_, "") => Kind::Wrong(Refusal::new("kind", format!("is missing; write {KIND}"))),
        ("v1", "List") => Kind::Wrong(Refusal::new("kind", "a List is not read; separate its items by a line of ---")),
        (version, kind) => classify_other(version, kind),
    }
}

/// Ours but misspelt, or someone else's?
fn classify_other(version: &str, kind: &str) -> Kind {
    let group = version.split('/').next().unwrap_or_default();
    let ours = group == GROUP || nearest(group, [GROUP]).is_some();
    if kind != KIND && ours {
        let hint = nearest(kind, [KIND]).map_or("known is", |_| "did you mean");
        return Kind::Wrong(Refusal::new("kind", format!("{kind:?} is not a kind of {GROUP}; {hint} {KIND}")));
    }
    if kind == KIND || ours || nearest(kind, [KIND]).is_some() {
        return Kind::Wrong(Refusal::new("apiVersion", format!("{version:?} is not known; write {API_VERSION}")));
    }
    Kind::Foreign(format!("{version} {kind}"))
}

/// The text of a file, if it is one and not too large.
fn read_bounded(file: &Path) -> Result<String, String> {
    // A FIFO would block whoever opens it.
    let metadata = fs::metadata(file).map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let mut bytes = Vec::new();
    let opened = File::open(file).map_err(|e| e.to_string())?;
    opened.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(format!("is larger than {FILE_MAX} bytes; keep shares in smaller files"));
    }
    String::from_utf8(bytes).map_err(|e| format!("is not UTF-8 text at byte {}", e.utf8_error().valid_up_to()))
}

/// Limits that no honest manifest comes near and that keep a hostile one small.
fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: NODES_MAX,
            max_events: 4 * NODES_MAX,
            max_aliases: ALIASES_MAX,
            max_anchors: ALIASES_MAX,
            max_depth: DEPTH_MAX,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: NODES_MAX,
        },
        // Go's YAML, through which manifests reach an API server, reads 0660 as octal.
        legacy_octal_numbers: true,
        with_snippet: false,
    }
}

fn yaml_message(error: &serde_saphyr::Error) -> String {
    let formatter = serde_saphyr::UserMessageFormatter;
    format!("is not YAML that can be read: {}", error.render_with_formatter(&formatter))
}

impl Origin {
    /// A file as a whole.
    fn file(file: &Path) -> Self {
        Origin { file: PathBuf::from(file), document: 0 }
    }

    /// The document after this one.
    fn next(self) -> Self {
        Origin { document: self.document + 1, ..self }
    }
}
