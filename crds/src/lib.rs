//! The API of virtiofs-operator: its types, their validation, and the configuration that follows from them.
//!
//! ```text
//! YAML file ──manifest──┐
//!                       ├─> JSON ──validate──> VirtiofsShare ──share──> Share (always valid)
//! API server ───────────┘     structure + CEL rules                     name, source, socket, EngineConfig ...
//! ```
//!
//! | module | concern |
//! |---|---|
//! | [`v1alpha1`] | the types on the wire, their schema and its CEL rules |
//! | [`schema`] | the CustomResourceDefinition that is generated from them |
//! | [`validate`] | that schema and those rules, evaluated in this process |
//! | [`manifest`] | documents from files and directories |
//! | [`share`] | the parsed share that the rest of the system uses |
//! | [`resolve`] | from the content and the overrides to one engine configuration |
//! | [`export`] | from a share to the spec of an export, and back |
//! | [`volume`] | attributes of CSI volumes |
//! | [`changes`] | which fields differ, and when the difference takes effect |
//! | [`refusal`] | errors that name the field, the value and the remedy |
//!
//! There is one validation: a manifest from a directory is checked against the schema that the API server enforces,
//! including its rules.

pub mod changes;
mod durations;
pub mod export;
pub mod manifest;
mod quantity;
pub mod refusal;
pub mod resolve;
pub mod schema;
pub mod share;
mod share_name;
mod structural;
pub mod v1alpha1;
pub mod validate;
pub mod volume;

pub use changes::{FieldChange, changes};
pub use durations::Interval;
pub use manifest::{Document, Manifests, read_directory, read_files, read_text};
pub use quantity::{InvalidQuantity, Quantity};
pub use refusal::{Origin, Refusal, nearest};
pub use resolve::resolve;
pub use share::{Share, SocketSpec, SourcePath, StalenessPolicy};
pub use share_name::ShareName;
pub use v1alpha1::{
    Content, ExportMode, Remedy, VirtiofsExport, VirtiofsExportSpec, VirtiofsExportStatus, VirtiofsShare,
    VirtiofsShareSpec, VirtiofsShareStatus,
};
