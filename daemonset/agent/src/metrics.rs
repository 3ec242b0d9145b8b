//! Metrics and health over HTTP.

mod server;
mod volumes;

pub(crate) use server::{Access, Addresses, Listeners, Serving, Standby, start};
