//! An invalid document keeps what its last valid version declared.

use std::collections::{BTreeMap, BTreeSet};

use virtiofs_client::report::Problem;
use virtiofs_crds::validate::validate;
use virtiofs_crds::{Document, Manifests, Origin, Refusal};

use crate::model::desired::Desired;

/// The last valid version of each share, and its document.
#[derive(Clone, Debug, Default)]
pub(crate) struct LastGood {
    documents: BTreeMap<String, Document>,
}

impl LastGood {
    /// Takes in the documents that were read. Returns the desired state.
    ///
    /// - A valid share replaces its last version, unless the difference is not allowed.
    /// - A rejected share keeps its last version.
    /// - A document that names no share keeps every share that its file declared.
    /// - A share in no document is removed.
    pub(crate) fn take(&mut self, read: Manifests) -> Desired {
        let mut refusals = read.refusals;
        let mut next = BTreeMap::new();
        for document in read.documents {
            let name = document.share.name.to_string();
            let kept = match self.documents.get(&name).map(|old| (old, forbidden_change(old, &document))) {
                Some((old, found)) if !found.is_empty() => {
                    refusals.extend(found);
                    Document { origin: document.origin, ..old.clone() }
                }
                _ => document,
            };
            next.insert(name, kept);
        }
        for (name, document) in std::mem::take(&mut self.documents) {
            if !next.contains_key(&name)
                && let Some(origin) = rejected_origin(&name, &document.origin, &refusals)
            {
                next.insert(name, Document { origin: origin.clone(), ..document });
            }
        }
        self.documents = next;
        self.desired(&refusals)
    }

    /// Adds the documents of an earlier agent, unless a newer version is known.
    pub(crate) fn load(&mut self, documents: Vec<Document>) {
        for document in documents {
            self.documents.entry(document.share.name.to_string()).or_insert(document);
        }
    }

    /// The last valid version of each share.
    pub(crate) fn documents(&self) -> &BTreeMap<String, Document> {
        &self.documents
    }

    /// The desired state if nothing can be read: unchanged.
    pub(crate) fn unreadable(&self, problem: Problem) -> Desired {
        Desired { problems: vec![problem], ..self.desired(&[]) }
    }

    fn desired(&self, refusals: &[Refusal]) -> Desired {
        let problems: BTreeSet<Problem> = refusals.iter().map(Problem::from).collect();
        Desired {
            shares: self.documents.iter().map(|(name, document)| (name.clone(), document.share.clone())).collect(),
            problems: problems.into_iter().collect(),
            partial: false,
        }
    }
}

/// Origin of the rejected document that declares this share; it may have been moved there. `None`: no document does.
fn rejected_origin<'a>(name: &str, before: &'a Origin, refusals: &'a [Refusal]) -> Option<&'a Origin> {
    let mut own = refusals.iter().filter(|refusal| refusal.share.as_deref() == Some(name));
    if let Some(refusal) = own.next() {
        return Some(refusal.origin.as_ref().unwrap_or(before));
    }
    let in_its_file = |origin: &Origin| origin.file == before.file;
    let nameless = refusals.iter().filter(|refusal| refusal.share.is_none());
    nameless.filter_map(|refusal| refusal.origin.as_ref()).any(in_its_file).then_some(before)
}

/// Changes that are not allowed while a share exists.
fn forbidden_change(old: &Document, new: &Document) -> Vec<Refusal> {
    let (Ok(before), Ok(after)) = (serde_json::to_value(&old.object), serde_json::to_value(&new.object)) else {
        return Vec::new();
    };
    let found = validate(&after, Some(&before)).err().unwrap_or_default();
    found.into_iter().map(|refusal| refusal.at(&new.origin).of(Some(new.share.name.as_str()))).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use virtiofs_crds::read_text;

    use super::*;

    fn document(name: &str, spec: &str) -> String {
        format!(
            "---\napiVersion: virtiofs.dev/v1alpha1\nkind: VirtiofsShare\nmetadata: {{name: {name}}}\nspec: {spec}\n"
        )
    }

    const GOOD: &str = "{source: {hostPath: {path: /srv/a}}}";

    fn names(desired: &Desired) -> Vec<&str> {
        desired.shares.keys().map(String::as_str).collect()
    }

    #[test]
    fn an_invalid_document_keeps_its_last_version() {
        let mut good = LastGood::default();
        good.take(read_text(Path::new("a.yaml"), &document("a", GOOD)));
        let bad = document("a", "{source: {hostPath: {path: /srv/a}}, access: Sometimes}");
        let desired = good.take(read_text(Path::new("a.yaml"), &bad));
        assert_eq!(names(&desired), ["a"]);
        assert_eq!(desired.problems.len(), 1);
        assert_eq!(desired.problems[0].field, "spec.access");

        let corrected = good.take(read_text(Path::new("a.yaml"), &document("a", GOOD)));
        assert_eq!(corrected.problems, []);
    }

    #[test]
    fn an_invalid_file_keeps_all_its_shares() {
        let mut good = LastGood::default();
        let both = document("a", GOOD) + &document("b", "{source: {hostPath: {path: /srv/b}}}");
        good.take(read_text(Path::new("both.yaml"), &both));
        let desired = good.take(read_text(Path::new("both.yaml"), "{{{"));
        assert_eq!(names(&desired), ["a", "b"]);
        assert!(!desired.problems.is_empty());
    }

    #[test]
    fn a_moved_invalid_document_keeps_its_share() {
        let elsewhere = "{source: {hostPath: {path: /srv/elsewhere}}}";
        for bad in ["{source: {hostPath: {path: /srv/a}}, access: Sometimes}", elsewhere] {
            let mut good = LastGood::default();
            good.take(read_text(Path::new("a.yaml"), &document("a", GOOD)));
            for text in [document("a", bad), "{{{".to_owned()] {
                let desired = good.take(read_text(Path::new("b.yaml"), &text));
                assert_eq!(desired.shares["a"].source.as_path(), Path::new("/srv/a"), "{text}");
            }
        }
    }

    #[test]
    fn an_undeclared_share_is_removed() {
        let mut good = LastGood::default();
        good.take(read_text(Path::new("a.yaml"), &document("a", GOOD)));
        let desired = good.take(read_text(Path::new("b.yaml"), "{{{"));
        assert_eq!(names(&desired), [] as [&str; 0]);
    }

    #[test]
    fn a_share_that_was_never_valid_is_not_served() {
        let desired = LastGood::default().take(read_text(Path::new("a.yaml"), &document("a", "{}")));
        assert_eq!(names(&desired), [] as [&str; 0]);
        assert_eq!(desired.problems[0].share.as_deref(), Some("a"));
    }

    #[test]
    fn an_earlier_agents_documents_replace_only_invalid_ones() {
        let accepted =
            |file: &str, name: &str, spec: &str| read_text(Path::new(file), &document(name, spec)).documents.remove(0);
        let mut good = LastGood::default();
        good.load(vec![accepted("a.yaml", "a", GOOD), accepted("b.yaml", "b", GOOD), accepted("c.yaml", "c", GOOD)]);
        let mut now = read_text(Path::new("a.yaml"), &document("a", "{access: Sometimes}"));
        let newer = "{source: {hostPath: {path: /srv/a}}, content: Immutable}";
        now.documents.push(accepted("b.yaml", "b", newer));
        let desired = good.take(now);
        assert_eq!(names(&desired), ["a", "b"]);
        assert!(desired.shares["b"].engine.negative_timeout_ms > 0);
    }

    #[test]
    fn the_source_of_a_share_cannot_be_changed() {
        let mut good = LastGood::default();
        good.take(read_text(Path::new("a.yaml"), &document("a", GOOD)));
        let moved = document("a", "{source: {hostPath: {path: /srv/elsewhere}}}");
        let desired = good.take(read_text(Path::new("a.yaml"), &moved));
        assert_eq!(desired.shares["a"].source.as_path(), Path::new("/srv/a"));
        assert!(desired.problems[0].field.starts_with("spec.source"), "{:?}", desired.problems);
    }
}
