//! The agent's HTTP server under clients that hold connections.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use testkit::host::{manifest, prepare};
use testkit::skip::require_that;

/// More than the agent's usual limit of open files.
const HALF_REQUESTS: usize = 1100;
/// Of the agent: sockets of its server, and of what else it does.
const SOCKETS_MAX: usize = 64 + 32;

/// Number of sockets that a process has open.
fn sockets(pid: i32) -> usize {
    let links =
        fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
}

#[test]
fn half_requests_block_neither_metrics_nor_probes() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let enough = hard > HALF_REQUESTS as u64 + 100 && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    if !require_that("a hard limit of 1200 open files", enough) {
        return;
    }
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let host = host.up();
    host.until_ready("a");

    let half = || {
        let mut stream = TcpStream::connect(host.metrics_address()).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Half: ").unwrap();
        stream
    };
    let mut halves: Vec<TcpStream> = (0..HALF_REQUESTS).map(|_| half()).collect();
    let began = Instant::now();
    for _ in 0..5 {
        let (code, page) = host.get("/metrics");
        assert!(code == 200 && page.contains("virtiofs_broker_up 1"), "{code}");
        assert_eq!((host.get("/healthz").0, host.get("/readyz").0), (200, 200));
    }
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(sockets(host.agent().as_raw()) <= SOCKETS_MAX, "{}", sockets(host.agent().as_raw()));

    // One byte at a time delays nothing either: the request must be whole in time.
    let last = halves.last_mut().unwrap();
    let ended = (0..40).any(|_| {
        std::thread::sleep(Duration::from_millis(250));
        last.write_all(b"x").is_err() || last.set_nonblocking(true).is_ok() && last.read(&mut [0; 64]).is_ok()
    });
    assert!(ended, "a request that is never complete holds its connection");
}
