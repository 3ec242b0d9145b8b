//! `virtiofs-agent run` next to a broker that is a service of its own: notifications of the service manager, and restarts of
//! the agent.

#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use testkit::host::{self, is_alive, manifest, prepare};

/// The service manager's end of sd_notify(3).
struct ServiceManager {
    socket: UnixDatagram,
    path: PathBuf,
    heard: Vec<String>,
}

impl ServiceManager {
    fn listen(folder: &Path) -> Self {
        let path = folder.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        ServiceManager { socket, path, heard: Vec::new() }
    }

    fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Waits for a message with a line that begins like this.
    fn until(&mut self, beginning: &str) -> String {
        let mut buffer = [0; 4096];
        loop {
            let length = self.socket.recv(&mut buffer).unwrap_or_else(|error| panic!("{beginning}: {error}"));
            let message = String::from_utf8(buffer[..length].to_vec()).unwrap();
            self.heard.push(message.clone());
            if let Some(line) = message.lines().find(|line| line.starts_with(beginning)) {
                return line.to_owned();
            }
        }
    }
}

#[test]
fn the_service_manager_is_notified() {
    let host = prepare();
    let mut manager = ServiceManager::listen(&host.path(""));
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let mut host = host.run(&[("NOTIFY_SOCKET", manager.path()), ("WATCHDOG_USEC", "200000")]);

    manager.until("READY=1");
    assert!(!manager.heard.iter().any(|message| message.contains("RELOADING")), "{:?}", manager.heard);
    manager.until("STATUS=1 share: 1 Ready");
    manager.until("WATCHDOG=1");
    manager.until("WATCHDOG=1");

    host.declare("b.yaml", &manifest("b", &source, ""));
    kill(host.agent(), Signal::SIGHUP).unwrap();
    manager.until("RELOADING=1");
    assert!(manager.heard.last().unwrap().contains("MONOTONIC_USEC="), "{:?}", manager.heard);
    manager.until("READY=1");
    manager.until("STATUS=2 shares: 2 Ready");

    kill(host.broker(), Signal::SIGSTOP).unwrap();
    manager.until("STATUS=waiting for the broker");
    manager.until("WATCHDOG=1");
    kill(host.broker(), Signal::SIGCONT).unwrap();
    manager.until("STATUS=2 shares: 2 Ready");

    assert!(host.end(Signal::SIGTERM).success(), "{}", host.log());
    manager.until("STOPPING=1");
    assert!(is_alive(host.broker().as_raw()));
    assert_eq!(host.sockets().len(), 3, "the broker's and two shares': {:?}", host.sockets());
}

#[test]
fn without_a_broker_the_agent_waits() {
    let host = prepare();
    let mut manager = ServiceManager::listen(&host.path(""));
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let mut host = host.run_alone(&[("NOTIFY_SOCKET", manager.path())]);
    manager.until("READY=1");
    manager.until("STATUS=waiting for the broker, which does not answer; 1 share declared");
    host.until_not_ready("a", "BrokerUnavailable");
    assert_eq!(host.get("/readyz").0, 503);
    assert_eq!(host.get("/healthz").0, 200);

    host.new_broker();
    host.until_ready("a");
    assert_eq!(host.get("/readyz").0, 200);
    for said in ["the broker does not answer; waiting for it", "the broker answers"] {
        assert_eq!(host.log().matches(said).count(), 1, "{said} in\n{}", host.log());
    }
}

#[test]
fn a_second_agent_is_rejected() {
    let host = prepare();
    let source = host.source("a");
    host.declare("a.yaml", &manifest("a", &source, ""));
    let host = host.run(&[]);
    host.until_ready("a");
    let mut second = Command::new(host::agent());
    second.arg("run").arg("--shares").arg(host.path("shares")).arg("--runtime-dir").arg(host.path("run"));
    let output = second.output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("another agent"), "{output:?}");
}
