//! `VirtiofsShare` documents from YAML files and directories of them.

mod file;
mod kind;
mod yaml;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use self::file::{is_manifest, read_bounded};
use self::kind::{Kind, classify};
use crate::refusal::{Origin, Refusal};
use crate::share::Share;
use crate::v1alpha1::VirtiofsShare;

/// Largest number of refusals of one document.
const REFUSALS_MAX: usize = 20;

/// The documents of a set of files.
#[derive(Clone, Debug, Default)]
pub struct Manifests {
    /// Accepted documents.
    pub documents: Vec<Document>,
    /// Why other documents were rejected. A share that is named here is not declared.
    pub refusals: Vec<Refusal>,
    /// Documents of other APIs.
    pub ignored: Vec<Ignored>,
}

/// One accepted document.
#[derive(Clone, Debug)]
pub struct Document {
    /// File and position.
    pub origin: Origin,
    /// The object as declared, with defaults.
    pub object: VirtiofsShare,
    /// The share that it describes.
    pub share: Share,
}

/// A document of another API group, which a file that is also applied to a cluster can contain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ignored {
    /// File and position.
    pub origin: Origin,
    /// Its `apiVersion` and `kind`.
    pub what: String,
}

/// Reads the documents of one text; messages name `file`.
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

/// Reads the documents of every file in a directory whose name ends in `.yaml`, `.yml` or `.json` and does not start with
/// a dot, ordered by name. Subdirectories are not read.
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

impl Manifests {
    fn add_file(&mut self, file: &Path) {
        match read_bounded(file) {
            Ok(text) => self.add_text(file, &text),
            Err(message) => self.refuse(&Origin::file(file), None, Refusal::new("", message)),
        }
    }

    fn add_text(&mut self, file: &Path, text: &str) {
        let mut origin = Origin::file(file);
        for document in yaml::documents(text) {
            origin = origin.next();
            match document {
                Ok(Value::Null) => {}
                Ok(value) => self.add_value(&origin, &value),
                Err(message) => self.refuse(&origin, None, Refusal::new("", message)),
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
        let more = refusals.len().saturating_sub(REFUSALS_MAX);
        refusals.into_iter().take(REFUSALS_MAX).for_each(|refusal| self.refuse(origin, share, refusal));
        if more > 0 {
            self.refuse(origin, share, Refusal::new("", format!("and {more} more; correct these first")));
        }
    }

    /// Rejects all documents that have the same name. If the first one were accepted, a new file whose name sorts before
    /// would change a running share.
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

impl Origin {
    /// A whole file.
    fn file(file: &Path) -> Self {
        Origin { file: PathBuf::from(file), document: 0 }
    }

    /// The document after this one.
    fn next(self) -> Self {
        Origin { document: self.document + 1, ..self }
    }
}
