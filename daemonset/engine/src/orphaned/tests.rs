//! Compares orphaned files with the library, operation by operation.
//!
//! There are two identical files: one that the library has looked up and opened, one that is served as orphaned. Every
//! operation on both must give the same reply and leave the same state.

mod filtered;
mod handles;
mod operation;
mod pair;
mod random;
mod refused;
mod reply;
mod settings;
mod tables;
