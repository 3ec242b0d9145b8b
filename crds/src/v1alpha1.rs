//! Version `v1alpha1` of the API: the types on the wire.
//!
//! Doc comments here are the descriptions in the CustomResourceDefinition and in the API reference; their reader writes a
//! manifest. serde rejects nothing that the schema accepts: an object of a newer version must stay readable.

// KubeSchema repeats each struct, including `pub`, inside a function.
#![allow(unreachable_pub)]

pub mod conditions;
mod consumers;
mod engine;
mod engine_status;
mod export;
mod export_status;
mod nodes;
mod resolved_engine;
mod rollout;
mod rule;
mod selector;
mod socket;
mod source;
mod spec;
mod staleness;
mod status;

pub use consumers::{Consumers, NamespaceConsumers};
pub use engine::{EngineLimits, EngineOptions, IdTranslation, Switch};
pub use engine_status::{EngineStatus, IdTranslationStatus, word};
pub use export::{Baseline, ExportMode, VirtiofsExport, VirtiofsExportSpec};
pub use export_status::{
    ExportFinding, ExportPreflight, FINDINGS_MAX, LastRemedy, MESSAGE_MAX, USERS_MAX, VirtiofsExportStatus,
};
pub use nodes::Nodes;
pub use resolved_engine::ResolvedEngine;
pub use rollout::Rollout;
pub use selector::{LabelSelector, Operator, Requirement};
pub use socket::Socket;
pub use source::{HostPath, HostPathType, Source, SourceType};
pub use spec::{Content, VirtiofsShare, VirtiofsShareSpec};
pub use staleness::{Remedy, Staleness};
pub use status::{NodeCounts, VirtiofsShareStatus};
