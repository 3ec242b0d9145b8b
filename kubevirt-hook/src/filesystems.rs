//! Parses the requested file systems from annotations of a VirtualMachineInstance.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;

/// The annotation with the file systems.
pub const FILESYSTEMS: &str = "virtiofs.dev/filesystems";
/// KubeVirt's annotation with hooks and their volumes.
pub const HOOK_SIDECARS: &str = "hooks.kubevirt.io/hookSidecars";
/// An example of [`FILESYSTEMS`].
const EXAMPLE: &str = r#"[{"tag": "images", "pvc": "images"}]"#;

/// Name of the socket in a share's volume.
const SOCKET: &str = "virtiofs.sock";
/// Longest tag of virtio-fs, in bytes.
const TAG_MAX: usize = 36;
/// Longest path of a socket, in bytes.
const PATH_MAX: usize = 107;
/// Largest number of entries of a request queue in QEMU; a power of two.
const QUEUE_MAX: u16 = 1024;

/// A requested file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// The tag that the guest mounts.
    pub tag: Tag,
    /// Socket of its server, in QEMU's container.
    pub socket: SocketPath,
    /// Entries of its request queue.
    pub queue_size: u16,
}

/// A tag: 1 to 36 letters, digits, dots, underscores and hyphens, so it needs no escaping in XML or a shell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag(String);

/// An absolute path of a socket, of letters, digits and `/._-`, short enough for a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPath(String);

/// Why annotations are invalid. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum AnnotationError {
    /// The machine is not JSON.
    #[error("the VirtualMachineInstance is not JSON: {0}")]
    NotJson(serde_json::Error),
    /// The annotation is missing.
    #[error("annotation {FILESYSTEMS} is missing; map volumes to tags, such as {EXAMPLE}")]
    Missing,
    /// An annotation is not valid JSON.
    #[error("annotation {annotation} is invalid: {error}; write {right}")]
    Malformed {
        /// Its name.
        annotation: &'static str,
        /// The parser's error.
        error: serde_json::Error,
        /// A valid value.
        right: &'static str,
    },
    /// A tag is invalid.
    #[error(
        "annotation {FILESYSTEMS}: tag {0:?} is not of 1 to {TAG_MAX} letters, digits, dots, underscores and hyphens"
    )]
    Tag(String),
    /// A tag is given twice.
    #[error("annotation {FILESYSTEMS}: tag {0} is given twice; each file system needs one of its own")]
    TagTwice(Tag),
    /// A queue size is invalid.
    #[error("annotation {FILESYSTEMS}: queueSize {0} of tag {1} is not a power of two from 2 to {QUEUE_MAX}")]
    Queue(u16, Tag),
    /// The pod does not have this volume.
    #[error(
        "annotation {FILESYSTEMS}: pvc {0} is not in the pod; give a hook in {HOOK_SIDECARS} \
         \"pvc\": {{\"name\": \"{0}\", \"volumePath\": \"/virtiofs/{0}\", \"sharedComputePath\": \"/var/run/virtiofs/{0}\"}}"
    )]
    NoVolume(String),
    /// The volume is not mounted in QEMU's container.
    #[error(
        "annotation {HOOK_SIDECARS}: pvc {0} has no sharedComputePath, so QEMU cannot reach it; write one such as \
         /var/run/virtiofs/{0}"
    )]
    NotShared(String),
    /// The volume's path is invalid.
    #[error(
        "annotation {HOOK_SIDECARS}: sharedComputePath {0:?} is not an absolute path of letters, digits and /._- that leaves \
         room for {SOCKET} within {PATH_MAX} bytes"
    )]
    Path(String),
}

#[derive(Deserialize)]
struct Machine {
    metadata: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// An entry of [`FILESYSTEMS`].
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Request {
    tag: String,
    pvc: String,
    #[serde(default = "default_queue")]
    queue_size: u16,
}

/// An entry of [`HOOK_SIDECARS`], as far as it matters here.
#[derive(Deserialize)]
struct Sidecar {
    pvc: Option<Volume>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Volume {
    name: String,
    #[serde(default)]
    shared_compute_path: String,
}

fn default_queue() -> u16 {
    QUEUE_MAX
}

/// The file systems that a VirtualMachineInstance, given as JSON, requests.
///
/// # Errors
/// Each names the annotation, what is wrong, and what would be right.
pub fn filesystems(machine: &[u8]) -> Result<Vec<Filesystem>, AnnotationError> {
    let machine: Machine = serde_json::from_slice(machine).map_err(AnnotationError::NotJson)?;
    let annotations = &machine.metadata.annotations;
    let wanted = annotations.get(FILESYSTEMS).ok_or(AnnotationError::Missing)?;
    let wanted: Vec<Request> = read(FILESYSTEMS, wanted, EXAMPLE)?;
    let sidecars = annotations.get(HOOK_SIDECARS).map_or("[]", String::as_str);
    let sidecars: Vec<Sidecar> = read(HOOK_SIDECARS, sidecars, "a value as in KubeVirt's user guide")?;
    let volumes: BTreeMap<String, String> =
        sidecars.into_iter().filter_map(|it| it.pvc).map(|it| (it.name, it.shared_compute_path)).collect();
    let mut tags = BTreeSet::new();
    wanted.into_iter().map(|it| filesystem(it, &volumes, &mut tags)).collect()
}

fn read<T: serde::de::DeserializeOwned>(
    annotation: &'static str,
    text: &str,
    right: &'static str,
) -> Result<T, AnnotationError> {
    serde_json::from_str(text).map_err(|error| AnnotationError::Malformed { annotation, error, right })
}

fn filesystem(
    wanted: Request,
    volumes: &BTreeMap<String, String>,
    tags: &mut BTreeSet<Tag>,
) -> Result<Filesystem, AnnotationError> {
    let tag = Tag::parse(wanted.tag)?;
    if !tags.insert(tag.clone()) {
        return Err(AnnotationError::TagTwice(tag));
    }
    if !wanted.queue_size.is_power_of_two() || !(2..=QUEUE_MAX).contains(&wanted.queue_size) {
        return Err(AnnotationError::Queue(wanted.queue_size, tag));
    }
    let Some(volume) = volumes.get(&wanted.pvc) else { return Err(AnnotationError::NoVolume(wanted.pvc)) };
    if volume.is_empty() {
        return Err(AnnotationError::NotShared(wanted.pvc));
    }
    Ok(Filesystem { tag, socket: SocketPath::within(volume)?, queue_size: wanted.queue_size })
}

impl Tag {
    fn parse(text: String) -> Result<Self, AnnotationError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let valid = !text.is_empty() && text.len() <= TAG_MAX && text.chars().all(allowed);
        if valid { Ok(Tag(text)) } else { Err(AnnotationError::Tag(text)) }
    }
}

impl SocketPath {
    /// The socket in a share's volume.
    fn within(volume: &str) -> Result<Self, AnnotationError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
        let path = format!("{}/{SOCKET}", volume.trim_end_matches('/'));
        let valid = volume.starts_with('/')
            && path.len() <= PATH_MAX
            && path.chars().all(allowed)
            && path.split('/').all(|part| !matches!(part, "." | ".."));
        if valid { Ok(SocketPath(path)) } else { Err(AnnotationError::Path(volume.to_owned())) }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    const SIDECARS: &str = r#"[
        {"image": "hook", "pvc": {"name": "images", "volumePath": "/v", "sharedComputePath": "/var/run/virtiofs/images/"}},
        {"image": "other", "configMap": {"name": "c", "key": "k", "hookPath": "/usr/bin/onDefineDomain"}},
        {"image": "hook", "pvc": {"name": "unshared", "volumePath": "/v"}},
        {"image": "hook", "pvc": {"name": "odd", "volumePath": "/v", "sharedComputePath": "/var/run/<odd>"}},
        {"image": "hook", "pvc": {"name": "up", "volumePath": "/v", "sharedComputePath": "/var/run/../../up"}}
    ]"#;

    fn parse(wanted: &str) -> Result<Vec<Filesystem>, AnnotationError> {
        let annotations = json!({FILESYSTEMS: wanted, HOOK_SIDECARS: SIDECARS});
        filesystems(&serde_json::to_vec(&json!({"metadata": {"name": "vm", "annotations": annotations}})).unwrap())
    }

    #[test]
    fn a_volume_of_the_pod_becomes_a_file_system() {
        let found = parse(r#"[{"tag": "images", "pvc": "images"}, {"tag": "i2", "pvc": "images", "queueSize": 128}]"#);
        let found: Vec<_> =
            found.unwrap().iter().map(|it| format!("{} {} {}", it.tag, it.socket, it.queue_size)).collect();
        let socket = "/var/run/virtiofs/images/virtiofs.sock";
        assert_eq!(found, [format!("images {socket} 1024"), format!("i2 {socket} 128")]);
        assert_eq!(parse("[]").unwrap(), []);
    }

    #[test]
    fn invalid_annotations_are_rejected_with_the_remedy() {
        for (wanted, says) in [
            ("images", "write [{\"tag\""),
            (r#"[{"tag": "a"}]"#, "missing field `pvc`"),
            (r#"[{"tag": "a", "pvc": "images", "path": "/"}]"#, "unknown field `path`"),
            (r#"[{"tag": "", "pvc": "images"}]"#, "tag \"\" is not of 1 to 36"),
            (r#"[{"tag": "a'/><x y='", "pvc": "images"}]"#, "is not of 1 to 36"),
            (r#"[{"tag": "a", "pvc": "images"}, {"tag": "a", "pvc": "images"}]"#, "tag a is given twice"),
            (r#"[{"tag": "a", "pvc": "images", "queueSize": 100}]"#, "queueSize 100 of tag a is not a power of two"),
            (r#"[{"tag": "a", "pvc": "images", "queueSize": 2048}]"#, "from 2 to 1024"),
            (
                r#"[{"tag": "a", "pvc": "none"}]"#,
                r#"pvc none is not in the pod; give a hook in hooks.kubevirt.io/hookSidecars "pvc": {"name": "none""#,
            ),
            (r#"[{"tag": "a", "pvc": "unshared"}]"#, "pvc unshared has no sharedComputePath"),
            (r#"[{"tag": "a", "pvc": "odd"}]"#, "sharedComputePath \"/var/run/<odd>\" is not an absolute path"),
            (r#"[{"tag": "a", "pvc": "up"}]"#, "is not an absolute path"),
        ] {
            let refusal = parse(wanted).unwrap_err().to_string();
            assert!(refusal.contains(says), "{wanted}: {refusal}");
        }
    }

    #[test]
    fn a_missing_annotation_is_reported() {
        for machine in [r#"{"metadata": {}}"#, r#"{"metadata": {"annotations": {"a": "b"}}}"#] {
            let refusal = filesystems(machine.as_bytes()).unwrap_err().to_string();
            assert!(refusal.contains("virtiofs.dev/filesystems is missing"), "{refusal}");
        }
        assert!(filesystems(b"<domain/>").unwrap_err().to_string().contains("is not JSON"));
    }
}
