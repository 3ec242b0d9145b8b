//! Sockets in directories that are passed as descriptors, and several endpoints of one source.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::{Broker, boot, read_hello, until};
use testkit::guest::{Guest, GuestConfig};
use virtiofs_contract::control::{Endpoint, EndpointKind, Request, Response, SessionState};
use virtiofs_contract::preflight::Reason;

/// An endpoint whose socket path does not exist for the broker.
fn given(broker: &Broker, name: &str, source: &Path) -> Endpoint {
    let mut endpoint = Endpoint { source: source.into(), ..broker.endpoint(name) };
    endpoint.socket.path = "/where/only/the/agent/is/volume.sock".into();
    endpoint.kind = EndpointKind::Volume;
    endpoint
}

fn hello(socket: &Path) -> String {
    read_hello(&Guest::boot(GuestConfig::new(socket).small()).unwrap())
}

#[test]
fn a_persons_socket_named_like_a_volume_is_no_volume() {
    let broker = Broker::start();
    let source = broker.source("data");
    let scratch = tempfile::tempdir().unwrap();
    for name in ["data.v-x", "data.v-0123456789abcdef", "data.volume"] {
        let endpoint = Endpoint { kind: EndpointKind::Socket, source: source.clone(), ..broker.endpoint(name) };
        let mut control = broker.control();
        // A volume needs the directory of its pod, a socket must not have one.
        let request = Request::Apply { endpoint: endpoint.clone(), reuse_preflight_of: None };
        let response = control.request_with(&request, &fs::File::open(scratch.path()).unwrap());
        assert!(matches!(response, Response::InvalidRequest { .. }), "{name}: {response:?}");
        control.apply(&endpoint).unwrap();
        assert_eq!(hello(&endpoint.socket.path), "from the host\n");
        assert_eq!(broker.status_of(name).endpoint.kind, EndpointKind::Socket);
    }
}

#[test]
fn socket_is_bound_in_the_passed_directory() {
    let broker = Broker::start();
    let scratch = tempfile::tempdir().unwrap();
    let (one, two) = (scratch.path().join("one"), scratch.path().join("two"));
    for directory in [&one, &two] {
        fs::create_dir(directory).unwrap();
    }
    let mut endpoint = given(&broker, "data.volume", &broker.source("data"));
    broker.control().apply_in(&endpoint, &one).unwrap();
    let inode = |directory: &Path| fs::symlink_metadata(directory.join("volume.sock")).unwrap().ino();
    let bound = inode(&one);
    let guest = Guest::boot(GuestConfig::new(one.join("volume.sock")).small()).unwrap();

    // Applied again, and with another configuration: socket and session stay.
    broker.control().apply_in(&endpoint, &one).unwrap();
    endpoint.engine.max_inodes += 1;
    endpoint.socket.mode = 0o666;
    broker.control().apply_in(&endpoint, &one).unwrap();
    assert_eq!(inode(&one), bound);
    assert_eq!(fs::metadata(one.join("volume.sock")).unwrap().mode() & 0o777, 0o666);
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(broker.status_of("data.volume").sessions_started, 1);

    // A removed socket is detected and created again by the next apply.
    fs::remove_file(one.join("volume.sock")).unwrap();
    assert!(!broker.status_of("data.volume").listening);
    broker.control().apply_in(&endpoint, &one).unwrap();
    assert!(broker.status_of("data.volume").listening);
    assert_eq!(hello(&one.join("volume.sock")), "from the host\n");

    // Applied in another directory, it is removed from this one.
    broker.control().apply_in(&endpoint, &two).unwrap();
    assert!(!one.join("volume.sock").exists());
    assert_eq!(hello(&two.join("volume.sock")), "from the host\n");
    assert_eq!((read_hello(&guest).as_str(), guest.violations()), ("from the host\n", vec![]));

    broker.control().request(&Request::Remove { name: "data.volume".into(), force: true });
    assert_eq!(fs::read_dir(&two).unwrap().count(), 0);
    until("the endpoint is gone", || broker.control().status().endpoints.is_empty());
}

#[test]
fn passed_descriptor_must_be_a_directory() {
    let broker = Broker::start();
    let endpoint = given(&broker, "data.volume", &broker.source("data"));
    let answer = broker.control().request(&Request::Apply { endpoint: endpoint.clone(), reuse_preflight_of: None });
    assert!(
        matches!(&answer, Response::InvalidRequest { message } if message.contains("descriptors: 0")),
        "{answer:?}"
    );
    let file = endpoint.source.join("hello");
    let finding = broker.control().apply_in(&endpoint, &file).unwrap_err();
    assert!(finding.message.contains("volume.sock is not a directory"), "{finding}");
    assert!(broker.control().status().endpoints.is_empty());
}

#[test]
fn preflight_is_reused_for_the_same_directory() {
    let broker = Broker::start();
    let scratch = tempfile::tempdir().unwrap();
    let own = broker.share("data");
    let beside = given(&broker, "data.volume", &own.source);
    let found = broker.status_of("data").preflight;
    // A preflight would fail now.
    fs::rename(&own.source, own.source.with_extension("away")).unwrap();
    assert!(broker.control().apply_in(&beside, scratch.path()).is_err());
    let directory = fs::File::open(scratch.path()).unwrap();
    let mut control = broker.control();
    let request = Request::Apply { endpoint: beside, reuse_preflight_of: Some("data".into()) };
    let answer = control.request_with(&request, &directory);
    assert!(matches!(&answer, Response::Applied { preflight } if *preflight == found), "{answer:?}");
}

#[test]
fn exclusive_source_has_one_session_at_all_endpoints() {
    let broker = Broker::start();
    let scratch = tempfile::tempdir().unwrap();
    let mut own = broker.endpoint("data");
    own.exclusive = true;
    broker.control().apply(&own).unwrap();
    let mut beside = given(&broker, "data.volume", &own.source);
    beside.exclusive = true;
    broker.control().apply_in(&beside, scratch.path()).unwrap();
    let volume = scratch.path().join("volume.sock");
    let other = broker.share("other");

    let guest = boot(&own);
    assert!(Guest::boot(GuestConfig::new(&volume).small()).is_err());
    let refused = broker.status_of("data.volume");
    assert_eq!((refused.rejected_exclusive, refused.sessions.len()), (1, 0));
    assert!(refused.last_rejection.unwrap().message.contains("another endpoint"));
    assert_eq!(read_hello(&boot(&other)), "from the host\n", "what is not exclusive has nothing to do with it");
    drop(guest);
    until("the session is over", || broker.status_of("data").sessions.is_empty());
    let guest = Guest::boot(GuestConfig::new(&volume).small()).unwrap();
    assert!(Guest::boot(GuestConfig::new(&own.socket.path).small()).is_err());
    assert_eq!(read_hello(&guest), "from the host\n");
}

#[test]
fn released_source_stays_released_at_a_new_socket() {
    let broker = Broker::start();
    let own = broker.share("data");
    fs::create_dir(own.source.join("part")).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let released =
        broker.control().request(&Request::Release { name: "data".into(), deadline_ms: 600_000, force: false });
    assert!(matches!(released, Response::Released { .. }), "{released:?}");

    let volume = given(&broker, "data.volume", &own.source);
    let part = Endpoint { sub_path: Some("part".into()), ..volume.clone() };
    let finding = broker.control().apply_in(&part, scratch.path()).unwrap_err();
    assert_eq!(finding.reason, Reason::SourceReleased);
    let apply = Request::Apply { endpoint: volume, reuse_preflight_of: Some("data".into()) };
    let applied = broker.control().request_with(&apply, &fs::File::open(scratch.path()).unwrap());
    assert!(matches!(applied, Response::Applied { .. }), "{applied:?}");
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| hello(&scratch.path().join("volume.sock")));
        assert_eq!(broker.until_state("data.volume", SessionState::Released).engine_pid, None);
        for name in ["data", "data.volume"] {
            broker.control().request(&Request::Resume { name: name.into() });
        }
        assert_eq!(guest.join().unwrap(), "from the host\n");
    });
}
