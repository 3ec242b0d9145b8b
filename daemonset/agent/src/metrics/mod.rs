//! Metrics and health over HTTP.

mod families;
mod sample;
mod server;
mod staleness;
mod volumes;

pub(crate) use families::page;
pub(crate) use server::{Serving, Standby, bind, serve};
