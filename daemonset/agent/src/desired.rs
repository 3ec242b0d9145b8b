//! What is to be served: the same type whatever source it comes from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtiofs_crds::{Refusal, Share};

/// The desired state of this host.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Desired {
    /// Shares by name.
    pub(crate) shares: BTreeMap<String, Share>,
    /// What was declared but not accepted.
    pub(crate) problems: Vec<Problem>,
    /// May there be declarations that are not known yet? Nothing is withdrawn then.
    pub(crate) partial: bool,
}

/// A declaration that was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Problem {
    /// The file it stands in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) file: Option<PathBuf>,
    /// Which document of that file, counted from 1; 0 for the file as a whole.
    #[serde(default)]
    pub(crate) document: usize,
    /// The share it was to declare, where that could be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) share: Option<String>,
    /// Path of the field; empty for the document as a whole.
    pub(crate) field: String,
    /// What is wrong, and what would be right.
    pub(crate) message: String,
}

impl From<&Refusal> for Problem {
    fn from(refusal: &Refusal) -> Self {
        Problem {
            file: refusal.origin.as_ref().map(|origin| origin.file.clone()),
            document: refusal.origin.as_ref().map_or(0, |origin| origin.document),
            share: refusal.share.clone(),
            field: refusal.field.clone(),
            message: refusal.message.clone(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}", file.display())?;
            if self.document > 0 {
                write!(f, ", document {}", self.document)?;
            }
            f.write_str(": ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;

    /// A share of this name and source; everything else as by default.
    pub(crate) fn declared(name: &str, source: &str) -> Share {
        let document = json!({
            "apiVersion": "virtiofs.dev/v1alpha1",
            "kind": "VirtiofsShare",
            "metadata": {"name": name},
            "spec": {"source": {"hostPath": {"path": source}}},
        });
        Share::from_value(&document).unwrap().1
    }

    /// The desired state that consists of these shares.
    pub(crate) fn desired<const N: usize>(shares: [Share; N]) -> Desired {
        let shares = shares.into_iter().map(|share| (share.name.to_string(), share)).collect();
        Desired { shares, ..Desired::default() }
    }
}
