//! Metrics and health over HTTP.

mod server;
mod volumes;

pub(crate) use server::{Serving, Standby, bind, serve};
