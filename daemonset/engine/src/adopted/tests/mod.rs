//! Adopted files held against the library, operation by operation.
//!
//! Two identical files: one that the library has looked up and opened, one whose descriptor was adopted. Whatever
//! is done to both must be answered alike and leave them alike.

mod filtered;
mod handles;
mod operation;
mod pair;
mod random;
mod refused;
mod settings;
mod tables;
mod told;
