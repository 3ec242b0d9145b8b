//! Endpoints whose socket the requester made.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use common::{Broker, boot, read_hello};
use virtiofs_contract::control::{Endpoint, EndpointKind, Request, Response, SessionState};
use virtiofs_contract::preflight::Reason;

fn endpoint_at(broker: &Broker, socket: &Path) -> Endpoint {
    let mut endpoint = Endpoint { kind: EndpointKind::Listener, ..broker.endpoint("data") };
    endpoint.socket.path = socket.to_path_buf();
    endpoint
}

fn apply(broker: &Broker, endpoint: &Endpoint, fd: impl Into<OwnedFd>) -> Response {
    let request = Request::Apply { endpoint: endpoint.clone(), reuse_preflight_of: None };
    broker.control().request_with(&request, &File::from(fd.into()))
}

#[test]
fn socket_of_the_requester_outlives_broker_and_endpoint() {
    let mut broker = Broker::start_with_keeper();
    let scratch = tempfile::tempdir().unwrap();
    let socket = scratch.path().join("own.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let endpoint = endpoint_at(&broker, &socket);
    let applied = || apply(&broker, &endpoint, listener.try_clone().unwrap());
    assert!(matches!(applied(), Response::Applied { .. }));
    let guest = boot(&endpoint);
    assert_eq!(read_hello(&guest), "from the host\n");
    assert!(matches!(applied(), Response::Applied { .. }), "again");
    let before = broker.until_state("data", SessionState::Serving);

    broker.crash();
    broker.restart();
    assert_eq!(read_hello(&guest), "from the host\n");
    assert_eq!(broker.until_state("data", SessionState::Serving).engine_pid, before.engine_pid);
    let second = boot(&endpoint);
    assert_eq!(read_hello(&second), "from the host\n");
    broker.control().remove("data", true);
    assert!(socket.exists(), "the file is the requester's");
}

#[test]
fn descriptor_that_does_not_listen_is_refused() {
    let broker = Broker::start();
    let endpoint = endpoint_at(&broker, Path::new("/some/where.sock"));
    let unconnected = || UnixStream::pair().unwrap().0;
    let others: [OwnedFd; 2] = [File::open("/dev/null").unwrap().into(), unconnected().into()];
    for fd in others {
        match apply(&broker, &endpoint, fd) {
            Response::Refused { finding } => assert_eq!(finding.reason, Reason::SocketUnavailable, "{finding}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn source_may_contain_the_runtime_directory_only_if_allowed() {
    let broker = Broker::start();
    let source = broker.runtime_dir().canonicalize().unwrap();
    let endpoint = Endpoint { source, ..broker.endpoint("data") };
    let refused = broker.control().apply(&endpoint).unwrap_err();
    assert_eq!(refused.reason, Reason::SourceForbidden);
}
