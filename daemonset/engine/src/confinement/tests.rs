//! What code that a guest has taken over can do: system calls made inside an engine's real confinement.
//!
//! Each probe runs in a process of its own, confined by the code that confines engines, with the library started. The
//! table in docs/SECURITY.md refers to these tests.

mod capabilities;
mod files;
mod harness;
mod reach;
mod system_calls;
