//! The API of virtiofs-operator: what a `VirtiofsShare` says, whether it makes sense, and what follows from it.
//!
//! ```text
//! YAML file ──manifest──┐
//!                       ├─> JSON ──validate──> VirtiofsShare ──share──> Share (cannot be wrong)
//! API server ───────────┘     structure + CEL rules                     name, source, socket, EngineConfig ...
//! ```
//!
//! | module | concern |
//! |---|---|
//! | [`v1alpha1`] | the types on the wire, their schema and its CEL rules |
//! | [`schema`] | the CustomResourceDefinition made from them |
//! | [`validate`] | that schema and those rules, evaluated in this process |
//! | [`manifest`] | documents from files and directories |
//! | [`share`] | the parsed share that the rest of the system works with |
//! | [`resolve`] | from what is true of the content to one concrete engine configuration |
//! | [`export`] | from a share to what is asked of a node, and back |
//! | [`volume`] | how a pod's volume names a share |
//! | [`changes`] | which fields differ, and when a difference takes effect |
//! | [`refusal`] | how a refusal names the field, the value and the remedy |
//!
//! There is one validation: the schema that the API server enforces is the schema that a manifest read
//! from a directory is held against, rules included.

pub mod changes;
mod durations;
pub mod export;
pub mod manifest;
pub mod refusal;
pub mod resolve;
pub mod schema;
pub mod share;
mod structural;
pub mod v1alpha1;
pub mod validate;
pub mod volume;

pub use changes::{FieldChange, changes};
pub use durations::Interval;
pub use manifest::{Document, Manifests, read_directory, read_files, read_text};
pub use refusal::{Origin, Refusal, nearest};
pub use resolve::resolve;
pub use share::{Share, ShareName, SocketSpec, SourcePath, StalenessPolicy};
pub use v1alpha1::{
    Content, ExportMode, Remedy, VirtiofsExport, VirtiofsExportSpec, VirtiofsExportStatus, VirtiofsShare,
    VirtiofsShareSpec, VirtiofsShareStatus,
};
