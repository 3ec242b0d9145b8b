//! Counts requests to the API server, and the memory of a process.

use std::fs;

use anyhow::{Context, Result};
use e2e::cluster::Cluster;

/// Number of writing requests, as counted by the API server.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Requests {
    /// To exports.
    pub(crate) exports: u64,
    /// To the status of exports.
    pub(crate) export_status: u64,
    /// To shares including their status, and to nodes without their status.
    pub(crate) others: u64,
}

impl Requests {
    pub(crate) fn of(cluster: &Cluster) -> Result<Self> {
        let page = cluster.admin.run(&["get", "--raw", "/metrics"])?;
        let mut requests = Requests::default();
        for line in page.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
            let label = |name: &str| {
                let rest = line.split_once(&format!("{name}=\"")).map(|(_, rest)| rest);
                rest.and_then(|rest| rest.split('"').next()).unwrap_or_default()
            };
            let count: f64 = line.rsplit(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0);
            let kind = match (label("resource"), label("subresource"), label("verb")) {
                (.., "GET" | "LIST" | "WATCH") => continue,
                ("virtiofsexports", "status", _) => &mut requests.export_status,
                ("virtiofsexports", ..) => &mut requests.exports,
                ("virtiofsshares", ..) | ("nodes", "", _) => &mut requests.others,
                _ => continue,
            };
            *kind += count as u64;
        }
        Ok(requests)
    }
}

/// Memory of a process, in megabytes.
pub(crate) struct Memory {
    pub(crate) now: u64,
    pub(crate) most: u64,
}

pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("reading the operator's memory")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1000
    };
    Ok(Memory { now: field("VmRSS:"), most: field("VmHWM:") })
}
