//! The control socket: endpoints are created, changed and removed.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use common::{Broker, boot, read_hello, runs, until};
use serde_json::json;
use testkit::guest::{Guest, GuestConfig};
use virtiofs_config::{Access, EngineConfig};
use virtiofs_contract::channel::FramedStream;
use virtiofs_contract::control::{Request, Response, SessionState};
use virtiofs_contract::preflight::Reason;
use virtiofs_contract::{OLDEST, VERSION};

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

#[test]
fn apply_is_idempotent() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let (socket, engine) = (inode(&endpoint.socket.path), broker.until_state("data", SessionState::Serving).engine_pid);
    for _ in 0..3 {
        broker.control().apply(&endpoint).unwrap();
    }
    assert_eq!(inode(&endpoint.socket.path), socket);
    assert_eq!(broker.session_of("data").engine_pid, engine);
    assert_eq!(read_hello(&guest), "from the host\n");
}

#[test]
fn mode_change_does_not_rebind() {
    let broker = Broker::start();
    let mut endpoint = broker.share("data");
    let socket = inode(&endpoint.socket.path);
    endpoint.socket.mode = 0o660;
    broker.control().apply(&endpoint).unwrap();
    let metadata = fs::metadata(&endpoint.socket.path).unwrap();
    assert_eq!((metadata.ino(), metadata.mode() & 0o777), (socket, 0o660));
}

#[test]
fn socket_moves_to_another_path() {
    let broker = Broker::start();
    let mut endpoint = broker.share("data");
    let before = endpoint.socket.path.clone();
    endpoint.socket.path = broker.runtime_dir().join("shares/elsewhere.sock");
    broker.control().apply(&endpoint).unwrap();
    assert!(!before.exists());
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn deleted_socket_is_created_again() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    fs::remove_file(&endpoint.socket.path).unwrap();
    broker.control().apply(&endpoint).unwrap();
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn sessions_survive_removal_of_their_endpoint() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    broker.control().remove("data", false);
    assert!(!endpoint.socket.path.exists());
    assert!(!broker.status_of("data").listening);
    assert_eq!(read_hello(&guest), "from the host\n");
    drop(guest);
    until("the endpoint is forgotten", || broker.control().status().endpoints.is_empty());
    broker.control().remove("data", false);
}

#[test]
fn force_ends_sessions() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guest = boot(&endpoint);
    let engine = broker.until_state("data", SessionState::Serving).engine_pid.unwrap();
    broker.control().remove("data", true);
    assert!(broker.control().status().endpoints.is_empty());
    until("the engine is gone", || !runs(engine));
    assert!(guest.pause().is_err());
}

#[test]
fn close_ends_sessions_and_keeps_listening() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let guests = [boot(&endpoint), boot(&endpoint), boot(&endpoint)];
    let ids: Vec<String> = broker.status_of("data").sessions.into_iter().map(|session| session.id).collect();
    let close = |session: Option<&String>| {
        let request = Request::Close { name: "data".into(), session: session.cloned() };
        match broker.control().request(&request) {
            Response::Closed { sessions } => sessions,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(close(Some(&ids[1])), [ids[1].clone()]);
    let left: Vec<String> = broker.status_of("data").sessions.into_iter().map(|session| session.id).collect();
    assert_eq!(left, [ids[0].clone(), ids[2].clone()]);
    assert_eq!(close(None).len(), 2);
    assert!(broker.status_of("data").sessions.is_empty());
    assert!(guests.iter().all(|guest| guest.pause().is_err()));
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn exclusive_endpoint_reports_rejections() {
    let broker = Broker::start();
    let mut endpoint = broker.endpoint("data");
    endpoint.exclusive = true;
    broker.control().apply(&endpoint).unwrap();
    let guest = boot(&endpoint);
    assert!(Guest::boot(GuestConfig::new(&endpoint.socket.path).small()).is_err());
    let status = broker.status_of("data");
    assert_eq!(status.rejected_exclusive, 1);
    assert!(status.last_rejection.unwrap().message.contains("exclusive"));
    assert_eq!(read_hello(&guest), "from the host\n");
}

#[test]
fn stored_values_are_kept() {
    let broker = Broker::start();
    let put = Request::Put { key: "shares/a".into(), value: Some("{}".into()) };
    assert_eq!(broker.control().request(&put), Response::Done);
    let got = broker.control().request(&Request::Get { key: "shares/a".into() });
    assert_eq!(got, Response::Value { value: Some("{}".into()) });
    let keys = broker.control().request(&Request::ListKeys { prefix: "shares/".into() });
    assert_eq!(keys, Response::Keys { keys: vec!["shares/a".into()] });
    assert_eq!(broker.control().request(&Request::Get { key: "b".into() }), Response::Value { value: None });
}

#[test]
fn invalid_sources_are_refused_by_reason() {
    let broker = Broker::start();
    let good = broker.share("data");
    let inside = good.source.parent().unwrap();
    symlink(&good.source, inside.join("link")).unwrap();
    fs::write(inside.join("file"), "").unwrap();
    let table = [
        (inside.join("missing"), Reason::SourceMissing),
        (inside.join("file"), Reason::SourceNotDirectory),
        (inside.join("link"), Reason::SourceForbidden),
        (broker.runtime_dir().canonicalize().unwrap(), Reason::SourceForbidden),
        ("/proc".into(), Reason::SourceForbidden),
    ];
    for (source, reason) in table {
        let mut bad = good.clone();
        bad.source = source;
        let finding = broker.control().apply(&bad).unwrap_err();
        assert_eq!(finding.reason, reason, "{finding}");
        assert!(!finding.remedy.is_empty());
        let request = Request::Preflight { source: bad.source, sub_path: None, engine: bad.engine };
        assert_eq!(broker.control().request(&request), Response::Refused { finding });
    }
    assert_eq!(broker.status_of("data").endpoint, good);
    assert_eq!(read_hello(&boot(&good)), "from the host\n");
}

#[test]
fn missing_source_recovers() {
    let broker = Broker::start();
    let endpoint = broker.endpoint("data");
    let away = endpoint.source.with_extension("away");
    fs::rename(&endpoint.source, &away).unwrap();
    assert_eq!(broker.control().apply(&endpoint).unwrap_err().reason, Reason::SourceMissing);
    fs::rename(&away, &endpoint.source).unwrap();
    broker.control().apply(&endpoint).unwrap();
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn foreign_files_and_sockets_are_left_alone() {
    let broker = Broker::start();
    let endpoint = broker.endpoint("data");
    fs::write(&endpoint.socket.path, "precious").unwrap();
    let finding = broker.control().apply(&endpoint).unwrap_err();
    assert_eq!(finding.reason, Reason::SocketUnavailable);
    assert_eq!(fs::read_to_string(&endpoint.socket.path).unwrap(), "precious");
    fs::remove_file(&endpoint.socket.path).unwrap();
    let stranger = UnixListener::bind(&endpoint.socket.path).unwrap();
    let finding = broker.control().apply(&endpoint).unwrap_err();
    assert_eq!(finding.reason, Reason::SocketUnavailable);
    drop(stranger);
    broker.control().apply(&endpoint).unwrap();
}

#[test]
fn invalid_requests_are_refused() {
    let broker = Broker::start();
    let good = broker.share("data");
    let mut other_name = good.clone();
    other_name.name = "other".into();
    let mut bad_name = good.clone();
    bad_name.name = "no/slash".into();
    let guest = boot(&good);
    let mut other_source = good.clone();
    other_source.source = broker.source("elsewhere");
    let requests = [
        Request::Apply { endpoint: other_name, reuse_preflight_of: None },
        Request::Apply { endpoint: bad_name, reuse_preflight_of: None },
        Request::Apply { endpoint: other_source, reuse_preflight_of: None },
        Request::Preflight { source: "relative".into(), sub_path: None, engine: EngineConfig::stock(Access::ReadOnly) },
    ];
    for request in requests {
        let response = broker.control().request(&request);
        assert!(matches!(response, Response::InvalidRequest { .. }), "{request:?}: {response:?}");
    }
    drop(guest);
}

/// Sends a request as another release may write it.
fn raw_request(control: &mut FramedStream, request: &serde_json::Value) -> Response {
    control.send(request).unwrap();
    control.receive().unwrap()
}

#[test]
fn highest_common_version_is_spoken() {
    let broker = Broker::start();
    let connect = || FramedStream::new(UnixStream::connect(broker.control_path()).unwrap());
    for (hello, spoken) in [
        (json!({"version": OLDEST}), OLDEST),
        (json!({"version": OLDEST, "newest": VERSION}), VERSION),
        (json!({"version": OLDEST - 1, "newest": OLDEST}), OLDEST),
        (json!({"version": VERSION, "newest": VERSION + 1, "unknown": {}}), VERSION),
    ] {
        let mut control = connect();
        match raw_request(&mut control, &json!({"Hello": hello})) {
            Response::Welcome { version, .. } => assert_eq!(version, spoken, "{hello}"),
            other => panic!("{hello}: {other:?}"),
        }
        // Unknown fields of an envelope are ignored.
        let status = raw_request(&mut control, &json!({"Status": {"after": null, "unknown": 1}}));
        assert!(matches!(status, Response::Status(_)), "{status:?}");
    }
    let response = raw_request(&mut connect(), &json!({"Hello": {"version": VERSION + 1, "newest": VERSION + 2}}));
    let Response::InvalidRequest { message } = response else { panic!("{response:?}") };
    assert!(
        [OLDEST, VERSION, VERSION + 1, VERSION + 2].iter().all(|it| message.contains(&it.to_string())),
        "{message}"
    );
}

#[test]
fn unknown_field_that_may_restrict_a_guest_is_refused_by_name() {
    let broker = Broker::start();
    let applied = |place: &str, field: &str| {
        let mut endpoint = serde_json::to_value(broker.endpoint("data")).unwrap();
        if !field.is_empty() {
            endpoint.pointer_mut(place).unwrap()[field] = 1.into();
        }
        let mut control = FramedStream::new(UnixStream::connect(broker.control_path()).unwrap());
        raw_request(&mut control, &serde_json::to_value(Request::hello()).unwrap());
        raw_request(&mut control, &json!({"Apply": {"endpoint": endpoint, "unknown": 1}}))
    };
    for (place, field) in [("", "oneGuest"), ("/socket", "label"), ("/engine", "noLinks"), ("/engine/limits", "files")]
    {
        match applied(place, field) {
            Response::InvalidRequest { message } => assert!(message.contains(field), "{message}"),
            other => panic!("{field}: {other:?}"),
        }
    }
    assert!(matches!(applied("", ""), Response::Applied { .. }), "the envelope may have unknown fields");
}

#[test]
fn other_version_is_rejected() {
    let broker = Broker::start();
    let connect = || FramedStream::new(UnixStream::connect(broker.control_path()).unwrap());
    for first in [Request::Hello { version: 999, newest: None }, Request::Status { after: None }] {
        let mut control = connect();
        control.send(&first).unwrap();
        assert!(matches!(control.receive::<Response>().unwrap(), Response::InvalidRequest { .. }));
        assert!(control.receive::<Response>().is_err());
    }
    let mut control = connect();
    control.send(&"not a request").unwrap();
    assert!(matches!(control.receive::<Response>().unwrap(), Response::InvalidRequest { .. }));
}

#[test]
fn second_broker_learns_who_holds_the_lock() {
    let broker = Broker::start();
    let endpoint = broker.share("data");
    let (status, words) = broker.rival();
    assert!(!status.success());
    assert!(words.contains(&broker.pid().to_string()), "{words}");
    assert_eq!(read_hello(&boot(&endpoint)), "from the host\n");
}

#[test]
fn only_the_brokers_user_reaches_the_control_socket() {
    let broker = Broker::start();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&broker.control_path()), 0o600);
    assert_eq!(mode(&broker.runtime_dir().join("engines")), 0o700);
    assert_eq!(fs::read_dir(broker.runtime_dir().join("engines")).unwrap().count(), 0);
}

/// Frames of valid requests with bytes changed, cut off or repeated.
fn mutated(random: &mut impl rand::Rng, requests: &[Request]) -> Vec<u8> {
    let body = serde_json::to_vec(&requests[random.random_range(0..requests.len())]).unwrap();
    let mut frame = [&(body.len() as u32).to_le_bytes()[..], &body].concat();
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..frame.len());
        match random.random_range(0..4) {
            0 => frame[at] = random.random(),
            1 => frame.truncate(at.max(1)),
            2 => frame.insert(at, random.random()),
            _ => frame.extend_from_within(at..),
        }
    }
    frame
}

#[test]
fn mutated_requests_leave_the_broker_responsive() {
    use std::io::{Read, Write};
    let broker = Broker::start();
    let guest = boot(&broker.share("data"));
    let (endpoint, session) = (broker.endpoint("other"), Some("data-1".to_owned()));
    let requests = [
        Request::hello(),
        Request::Apply { endpoint, reuse_preflight_of: Some("data".into()) },
        Request::HandOver { name: "none".into(), session },
        Request::Trace { session: "none".into(), duration_ms: 1, rate: 1 },
        Request::Put { key: "key".into(), value: Some("value".into()) },
        Request::Status { after: None },
    ];
    let hello = serde_json::to_vec(&requests[0]).unwrap();
    let hello = [&(hello.len() as u32).to_le_bytes()[..], &hello].concat();
    let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(7);
    for _ in 0..500 {
        let mut stream = UnixStream::connect(broker.control_path()).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        let _ = stream.write_all(&hello);
        let _ = stream.write_all(&mutated(&mut random, &requests));
        // Without this, the broker waits for the rest of a frame that was cut off.
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert_eq!(read_hello(&guest), "from the host\n");
    assert!(broker.control().status().endpoints.iter().any(|it| it.endpoint.name == "data"));
}
