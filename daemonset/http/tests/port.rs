//! A port under clients that hold connections, and over TLS.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use virtiofs_http::serve::HEADERS_WITHIN;
use virtiofs_http::{Certificate, serve};

/// More than a port holds, and few enough for any limit of open files.
const HALF_REQUESTS: usize = 400;

/// A port that serves `/page` on a thread of its own.
fn port(certificate: Option<Certificate>) -> (SocketAddr, Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/page", get(|| async { "the page" }));
    runtime.spawn(serve(listener, router, certificate));
    (address, runtime)
}

fn connect(address: SocketAddr, text: &str) -> std::net::TcpStream {
    let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream.write_all(text.as_bytes()).unwrap();
    stream
}

fn fetch(address: SocketAddr) -> String {
    let mut text = String::new();
    connect(address, "GET /page HTTP/1.1\r\nHost: x\r\n\r\n").read_to_string(&mut text).unwrap();
    text
}

#[test]
fn half_requests_do_not_block_others() {
    let (address, _runtime) = port(None);
    let mut half: Vec<_> =
        (0..HALF_REQUESTS).map(|_| connect(address, "GET /page HTTP/1.1\r\nHost: x\r\nX-Half: ")).collect();
    let began = Instant::now();
    for _ in 0..20 {
        let text = fetch(address);
        assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("the page"), "{text}");
    }
    assert!(began.elapsed() < HEADERS_WITHIN, "a request waited for the half requests: {:?}", began.elapsed());
    // All of them are ended: all but the last few at once, those when they took too long.
    for stream in &mut half {
        let mut rest = Vec::new();
        // A reset ends it, too.
        let _ = stream.read_to_end(&mut rest);
        assert!(!String::from_utf8_lossy(&rest).contains("200 OK"));
    }
    assert!(began.elapsed() < 2 * HEADERS_WITHIN, "half requests were held: {:?}", began.elapsed());
}

#[test]
fn large_requests_are_rejected() {
    let (address, _runtime) = port(None);
    for (request, answer) in [
        (format!("GET /page HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n", "x".repeat(64 << 10)), "HTTP/1.1 431"),
        (format!("GET /page HTTP/1.1\r\nHost: x\r\n{}\r\n", "X: y\r\n".repeat(100)), "HTTP/1.1 431"),
        ("GET /page HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n".to_owned(), "HTTP/1.1 200"),
    ] {
        let mut stream = connect(address, "");
        // The port may close before it has read all of it.
        let _ = stream.write_all(request.as_bytes());
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text);
        assert!(text.starts_with(answer) || text.is_empty(), "{text}");
        assert!(fetch(address).ends_with("the page"));
    }
}

#[test]
fn a_connection_carries_one_request() {
    let (address, _runtime) = port(None);
    let two = "GET /page HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2);
    let mut text = String::new();
    let _ = connect(address, &two).read_to_string(&mut text);
    assert_eq!(text.matches("the page").count(), 1, "{text}");
    assert!(text.contains("connection: close"), "{text}");
}

/// Makes a certificate for this name.
fn make_certificate(dir: &Path, name: &str) {
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]);
    openssl.args(["-subj", &format!("/CN={name}"), "-keyout"]).arg(dir.join("new.key"));
    let output = openssl.arg("-out").arg(dir.join("new.crt")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for file in ["key", "crt"] {
        std::fs::rename(dir.join(format!("new.{file}")), dir.join(format!("tls.{file}"))).unwrap();
    }
}

/// The page over TLS, and the name in the certificate, as openssl prints them.
fn fetch_over_tls(address: SocketAddr) -> String {
    let mut openssl = Command::new("openssl");
    openssl.args(["s_client", "-ign_eof", "-connect", &address.to_string()]);
    openssl.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = openssl.stderr(std::process::Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    String::from_utf8_lossy(&child.wait_with_output().unwrap().stdout).into_owned()
}

#[test]
fn a_new_certificate_is_used_without_a_restart() {
    let openssl = Command::new("openssl").arg("version").output().ok();
    let Some(_) = testkit::skip::require("openssl", openssl) else { return };
    let dir = tempfile::tempdir().unwrap();
    make_certificate(dir.path(), "first");
    let files = ["tls.crt", "tls.key"].map(|name| dir.path().join(name));
    let [chain, key] = files;
    let (address, _runtime) = port(Some(Certificate::open(chain.clone(), key).unwrap()));
    let text = fetch_over_tls(address);
    assert!(text.contains("CN = first") && text.contains("the page"), "{text}");
    assert!(!fetch(address).contains("the page"), "served without TLS");
    make_certificate(dir.path(), "second");
    assert!(fetch_over_tls(address).contains("CN = second"));
    std::fs::write(chain, "no certificate").unwrap();
    assert!(fetch_over_tls(address).contains("CN = second"), "the last usable one stays");
}

#[test]
fn addresses_do_not_shut_each_other_out() {
    let (address, _runtime) = port(None);
    let from = |last: u8| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(IpAddr::from([127, 0, 1, last]), 0)).unwrap();
        socket
    };
    let clients = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _held: Vec<_> = (1..=200).map(|last| clients.block_on(from(last).connect(address)).unwrap()).collect();
    assert!(fetch(address).ends_with("the page"));
}
