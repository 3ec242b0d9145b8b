//! Control groups of engines, as the record of a session has them. Plain data.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A controller of control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Controller {
    Cpu,
    Io,
    Memory,
}

/// A group of one engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Group {
    pub(crate) path: PathBuf,
    /// What was set in it.
    pub(crate) written: Vec<Written>,
}

/// A value that was written to a file of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Written {
    pub(crate) controller: Controller,
    pub(crate) file: PathBuf,
    pub(crate) value: String,
    /// Fields that a line of the file then has.
    pub(crate) shown: String,
}
