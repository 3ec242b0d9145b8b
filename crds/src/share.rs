//! The parsed share that the rest of the system uses: types that are always valid.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use kube::ResourceExt;
use serde::Serialize;
use serde_json::Value;
use virtiofs_config::{Access, EngineConfig};

use crate::refusal::Refusal;
use crate::share_name::ShareName;
use crate::v1alpha1::{Content, Remedy, Socket, Source, Staleness, VirtiofsExport, VirtiofsShare};
use crate::{resolve, validate};

/// A validated share, with everything that follows from it.
///
/// # Guarantees
/// Created only from an object that the schema and its rules accept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct Share {
    /// Its name.
    pub name: ShareName,
    /// The directory to serve.
    pub source: SourcePath,
    /// Whether guests may change the data.
    pub access: Access,
    /// What is true of the data while guests use it.
    pub content: Content,
    /// True if a second session on the node is refused.
    pub exclusive: bool,
    /// The socket that VMs connect to.
    pub socket: SocketSpec,
    /// The configuration of its engines.
    pub engine: EngineConfig,
    /// Policy about staleness.
    pub staleness: StalenessPolicy,
}

impl Share {
    /// The share that an object describes, or every reason why it is rejected.
    ///
    /// The API server has validated the object, but maybe with an older schema, so it is validated again.
    pub fn from_object(object: &VirtiofsShare) -> Result<Share, Vec<Refusal>> {
        let value = serde_json::to_value(object).map_err(|e| vec![Refusal::new("", e.to_string())])?;
        Share::from_value(&value).map(|(_, share)| share)
    }

    /// The share that an export describes, or every reason why its spec is rejected. The consumers are not part of a share.
    pub fn from_export(export: &VirtiofsExport) -> Result<Share, Vec<Refusal>> {
        validate::validate_export(export)?;
        let spec = &export.spec;
        let name = ShareName::parse(&spec.share_name).map_err(|it| vec![Refusal::new("spec.shareName", it.message)])?;
        let engine = spec.engine.config(spec.access);
        let parts = Parts { source: &spec.source, socket: &spec.socket, staleness: &spec.staleness };
        parts.share(name, spec.access, spec.content, engine).map_err(|refusal| vec![refusal])
    }

    /// The object and the share that a JSON document describes, or every reason why it is rejected.
    pub fn from_value(document: &Value) -> Result<(VirtiofsShare, Share), Vec<Refusal>> {
        let sound = validate::validate(document, None)?;
        let object: VirtiofsShare = serde_json::from_value(sound).map_err(|e| vec![Refusal::new("", e.to_string())])?;
        let share = parse(&object).map_err(|refusal| vec![refusal])?;
        Ok((object, share))
    }
}

/// Parses an object that the schema has accepted.
fn parse(object: &VirtiofsShare) -> Result<Share, Refusal> {
    let spec = &object.spec;
    let name = ShareName::parse(&object.name_any())?;
    let parts = Parts { source: &spec.source, socket: &spec.socket, staleness: &spec.staleness };
    parts.share(name, spec.access, spec.content, resolve::resolve(spec))
}

/// What shares and exports declare in the same words.
struct Parts<'a> {
    source: &'a Source,
    socket: &'a Socket,
    staleness: &'a Staleness,
}

impl Parts<'_> {
    fn share(self, name: ShareName, access: Access, content: Content, engine: EngineConfig) -> Result<Share, Refusal> {
        Ok(Share {
            name,
            source: SourcePath::parse(self.source.path())?,
            access,
            content,
            exclusive: content == Content::Exclusive,
            socket: SocketSpec::parse(self.socket)?,
            engine,
            staleness: StalenessPolicy::from(self.staleness),
        })
    }
}

/// Path of a directory to share: absolute, normalized, and outside of the kernel's file systems. The node checks symbolic
/// links.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct SourcePath(String);

impl SourcePath {
    fn parse(path: &str) -> Result<Self, Refusal> {
        let normal = path.strip_prefix('/').is_some_and(|rest| {
            rest.split('/').all(|part| !matches!(part, "" | "." | "..")) && !path.contains(char::is_control)
        });
        if normal {
            return Ok(SourcePath(path.to_owned()));
        }
        Err(Refusal::new("spec.source.hostPath.path", format!("{path:?} is not an absolute, normalized path")))
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl fmt::Display for SourcePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Owner and permission bits of the socket that VMs connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct SocketSpec {
    /// Owner; none is the user of the broker.
    pub owner: Option<u32>,
    /// Group; none is the group of the broker.
    pub group: Option<u32>,
    /// Permission bits, at most `0o777`.
    pub mode: u32,
}

impl SocketSpec {
    fn parse(socket: &Socket) -> Result<Self, Refusal> {
        let mode = u32::from_str_radix(&socket.mode, 8).ok().filter(|mode| *mode <= 0o777);
        let mode = mode.ok_or_else(|| {
            Refusal::new("spec.socket.mode", format!("{:?} is not an octal mode such as \"0660\"", socket.mode))
        })?;
        Ok(SocketSpec { owner: socket.owner, group: socket.group, mode })
    }
}

/// Policy about staleness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct StalenessPolicy {
    /// Whether staleness is remedied or only reported.
    pub remedy: Remedy,
    /// Number of stale events within `window` that starts a remedy.
    pub threshold: u32,
    /// Time over which events are counted, and within which a remedy must show effect.
    pub window: Duration,
    /// Largest number of remedies within an hour.
    pub budget: u32,
}

impl From<&Staleness> for StalenessPolicy {
    fn from(staleness: &Staleness) -> Self {
        StalenessPolicy {
            remedy: staleness.policy,
            threshold: staleness.threshold,
            window: staleness.window.duration(),
            budget: staleness.max_remedies_per_hour,
        }
    }
}
