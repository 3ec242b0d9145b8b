//! Which file systems a virtual machine is to have: from annotations of its VirtualMachineInstance.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Deserialize;

/// The annotation that says which.
pub const FILESYSTEMS: &str = "virtiofs.dev/filesystems";
/// KubeVirt's annotation that puts hooks and their volumes into the machine's pod.
pub const HOOK_SIDECARS: &str = "hooks.kubevirt.io/hookSidecars";
/// An example of the first.
const EXAMPLE: &str = r#"[{"tag": "images", "pvc": "images"}]"#;

/// Name of the socket in a share's volume.
const SOCKET: &str = "virtiofs.sock";
/// Longest tag that virtio-fs knows, in bytes.
const TAG_MAX: usize = 36;
/// Longest path that a socket may be connected to at, in bytes.
const PATH_MAX: usize = 107;
/// Entries of a request queue: powers of two, of which QEMU takes no more than this.
const QUEUE_MAX: u16 = 1024;

/// A file system that a virtual machine is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filesystem {
    /// The name that the guest mounts it by.
    pub tag: Tag,
    /// Where its server listens, in the container that QEMU runs in.
    pub socket: SocketPath,
    /// Entries of its request queue.
    pub queue_size: u16,
}

/// A tag: 1 to 36 letters, digits, dots, underscores and hyphens, so it means itself in XML and in a shell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag(String);

/// An absolute path of a socket, of letters, digits and `/._-`, short enough to be connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPath(String);

/// Why annotations say nothing that could be done.
#[derive(Debug, thiserror::Error)]
pub enum AnnotationError {
    /// The machine cannot be read.
    #[error("the VirtualMachineInstance is not JSON: {0}")]
    NotJson(#[source] serde_json::Error),
    /// It does not say what it wants.
    #[error("annotation {FILESYSTEMS} is missing; write which volumes become which tags, such as {EXAMPLE}")]
    Missing,
    /// An annotation cannot be read.
    #[error("annotation {annotation} is not what it should be: {error}; write {right}")]
    Malformed {
        /// Which.
        annotation: &'static str,
        /// Why.
        error: serde_json::Error,
        /// What would be right.
        right: &'static str,
    },
    /// A tag is none.
    #[error(
        "annotation {FILESYSTEMS}: tag {0:?} is not of 1 to {TAG_MAX} letters, digits, dots, underscores and hyphens"
    )]
    Tag(String),
    /// A tag is there twice.
    #[error("annotation {FILESYSTEMS}: tag {0} is given twice; each file system needs one of its own")]
    TagTwice(Tag),
    /// A queue cannot be so long.
    #[error("annotation {FILESYSTEMS}: queueSize {0} of tag {1} is not a power of two from 2 to {QUEUE_MAX}")]
    Queue(u16, Tag),
    /// No such volume is in the pod.
    #[error(
        "annotation {FILESYSTEMS}: pvc {0} is not in the pod; give a hook in {HOOK_SIDECARS} \
         \"pvc\": {{\"name\": \"{0}\", \"volumePath\": \"/virtiofs/{0}\", \"sharedComputePath\": \"/var/run/virtiofs/{0}\"}}"
    )]
    NoVolume(String),
    /// The volume is not where QEMU runs.
    #[error(
        "annotation {HOOK_SIDECARS}: pvc {0} has no sharedComputePath, so QEMU cannot reach it; write one such as \
         /var/run/virtiofs/{0}"
    )]
    NotShared(String),
    /// The volume is somewhere odd.
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

/// An entry of our annotation.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wanted {
    tag: String,
    pvc: String,
    #[serde(default = "longest_queue")]
    queue_size: u16,
}

/// An entry of KubeVirt's, as far as it matters here.
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

fn longest_queue() -> u16 {
    QUEUE_MAX
}

/// The file systems that a VirtualMachineInstance, given as JSON, asks for.
///
/// # Errors
/// Each names the annotation, what is wrong with it, and what would be right.
pub fn filesystems(machine: &[u8]) -> Result<Vec<Filesystem>, AnnotationError> {
    let machine: Machine = serde_json::from_slice(machine).map_err(AnnotationError::NotJson)?;
    let annotations = &machine.metadata.annotations;
    let wanted = annotations.get(FILESYSTEMS).ok_or(AnnotationError::Missing)?;
    let wanted: Vec<Wanted> = read(FILESYSTEMS, wanted, EXAMPLE)?;
    let sidecars = annotations.get(HOOK_SIDECARS).map_or("[]", String::as_str);
    let sidecars: Vec<Sidecar> = read(HOOK_SIDECARS, sidecars, "what KubeVirt's user guide says")?;
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
    wanted: Wanted,
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
        let sound = !text.is_empty() && text.len() <= TAG_MAX && text.chars().all(allowed);
        if sound { Ok(Tag(text)) } else { Err(AnnotationError::Tag(text)) }
    }
}

impl SocketPath {
    /// The socket in a share's volume.
    fn within(volume: &str) -> Result<Self, AnnotationError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
        let path = format!("{}/{SOCKET}", volume.trim_end_matches('/'));
        let sound = volume.starts_with('/')
            && path.len() <= PATH_MAX
            && path.chars().all(allowed)
            && path.split('/').all(|part| !matches!(part, "." | ".."));
        if sound { Ok(SocketPath(path)) } else { Err(AnnotationError::Path(volume.to_owned())) }
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

    fn asked(wanted: &str) -> Result<Vec<Filesystem>, AnnotationError> {
        let annotations = json!({FILESYSTEMS: wanted, HOOK_SIDECARS: SIDECARS});
        filesystems(&serde_json::to_vec(&json!({"metadata": {"name": "vm", "annotations": annotations}})).unwrap())
    }

    #[test]
    fn a_volume_of_the_pod_becomes_a_file_system() {
        let found = asked(r#"[{"tag": "images", "pvc": "images"}, {"tag": "i2", "pvc": "images", "queueSize": 128}]"#);
        let parsed: Vec<_> =
            found.unwrap().iter().map(|it| format!("{} {} {}", it.tag, it.socket, it.queue_size)).collect();
        let socket = "/var/run/virtiofs/images/virtiofs.sock";
        assert_eq!(parsed, [format!("images {socket} 1024"), format!("i2 {socket} 128")]);
        assert_eq!(asked("[]").unwrap(), []);
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_what_would_be_right() {
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
            let refusal = asked(wanted).unwrap_err().to_string();
            assert!(refusal.contains(says), "{wanted}: {refusal}");
        }
    }

    #[test]
    fn a_vm_without_the_annotation_gets_an_example() {
        for machine in [r#"{"metadata": {}}"#, r#"{"metadata": {"annotations": {"a": "b"}}}"#] {
            let refusal = filesystems(machine.as_bytes()).unwrap_err().to_string();
            assert!(refusal.contains("virtiofs.dev/filesystems is missing"), "{refusal}");
        }
        assert!(filesystems(b"<domain/>").unwrap_err().to_string().contains("is not JSON"));
    }
}
