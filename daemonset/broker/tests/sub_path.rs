//! A directory below a source that is served instead of it.

#![allow(clippy::unwrap_used)] // Only `#[test]` functions are exempt by themselves.

mod common;

use std::fs;

use common::{Broker, boot, read_hello, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use virtiofs_contract::control::{Endpoint, SessionState};
use virtiofs_contract::preflight::Reason;

fn below(broker: &Broker, whole: &Endpoint, sub_path: &str) -> Endpoint {
    let mut endpoint = Endpoint { source: whole.source.clone(), ..broker.endpoint("part") };
    endpoint.sub_path = Some(sub_path.into());
    endpoint
}

#[test]
fn guest_sees_only_the_sub_path() {
    let broker = Broker::start();
    let whole = broker.share("whole");
    fs::create_dir_all(whole.source.join("a/b")).unwrap();
    fs::write(whole.source.join("a/b/hello"), "from below\n").unwrap();
    let part = below(&broker, &whole, "a/b");
    broker.control().apply(&part).unwrap();
    let guest = boot(&part);
    assert_eq!(read_hello(&guest), "from below\n");
    assert!(guest.fuse().lookup(1, "a").is_err());
    assert_eq!(read_hello(&boot(&whole)), "from the host\n");
    let mut elsewhere = part.clone();
    elsewhere.sub_path = Some("a".into());
    let answer = broker
        .control()
        .request(&virtiofs_contract::control::Request::Apply { endpoint: elsewhere, reuse_preflight_of: None });
    assert!(format!("{answer:?}").contains("cannot change"), "{answer:?}");
}

#[test]
fn guest_cannot_redirect_a_sub_path() {
    let broker = Broker::start();
    let whole = broker.share("whole");
    fs::create_dir_all(whole.source.join("a/b")).unwrap();
    fs::write(whole.source.join("a/b/hello"), "from below\n").unwrap();
    let secret = broker.source("secret");
    fs::create_dir(secret.join("b")).unwrap();
    fs::write(secret.join("b/hello"), "not for guests\n").unwrap();
    let part = below(&broker, &whole, "a/b");
    broker.control().apply(&part).unwrap();
    let (above, guest) = (boot(&whole), boot(&part));
    assert_eq!(read_hello(&guest), "from below\n");
    let target = secret.to_str().unwrap();
    for link in [target, "../secret"] {
        let fuse = above.fuse();
        fuse.rename(1, "a", 1, "moved", 0).unwrap();
        fuse.symlink(1, "a", link).unwrap();
        // Kill until no engine or standby from before is left, because those have the directory open.
        until("the next engine is refused its way", || {
            let session = broker.session_of("part");
            if let Some(engine) = session.engine_pid {
                let _ = kill(Pid::from_raw(engine as i32), Signal::SIGKILL);
            }
            session.state == SessionState::Failed
        });
        assert_eq!(broker.session_of("part").finding.unwrap().reason, Reason::SourceForbidden);
        fuse.unlink(1, "a").unwrap();
        fuse.rename(1, "moved", 1, "a", 0).unwrap();
        // The next attempt is immediate.
        broker.control().hand_over("part");
        assert_eq!(read_hello(&guest), "from below\n");
    }
    assert_eq!((guest.violations(), above.violations()), (vec![], vec![]));
}
