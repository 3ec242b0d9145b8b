//! Samples of the broker's messages, for tests.

use std::path::PathBuf;

use virtiofs_config::{Access, EngineConfig, InodeFileHandles, Limits, Sandbox};
use virtiofs_contract::control::{
    Endpoint, EndpointStatus, HolderState, SessionState, SessionStatus, SocketSpec, Status,
};
use virtiofs_contract::counters::{Held, Totals};
use virtiofs_contract::preflight::{Finding, Preflight, Reason};

use crate::endpoint::EndpointId;

/// A finding.
pub fn finding() -> Finding {
    Finding { reason: Reason::CapabilityMissing, message: "m".into(), remedy: "r".into() }
}

/// What a trial engine found where everything works, and these findings.
pub fn preflight(findings: Vec<Finding>) -> Preflight {
    Preflight {
        sandbox: Sandbox::Chroot,
        user_namespace: false,
        confinement: Default::default(),
        capabilities: Vec::new(),
        inode_file_handles: InodeFileHandles::Prefer,
        mounts: Vec::new(),
        open_files: 1024,
        limits: Limits::default(),
        guest_open_files: 1000,
        findings,
    }
}

/// An endpoint of this name.
pub fn endpoint(name: &str) -> Endpoint {
    Endpoint {
        name: name.to_owned(),
        kind: EndpointId::parse(name).kind,
        source: PathBuf::from("/srv/source"),
        sub_path: None,
        socket: SocketSpec {
            path: format!("/run/virtiofs/shares/{name}.sock").into(),
            owner: None,
            group: None,
            mode: 0o660,
        },
        engine: EngineConfig::stock(Access::ReadOnly),
        exclusive: false,
        consumer: None,
    }
}

/// The status of an endpoint that listens and has no session.
pub fn listening(endpoint: Endpoint) -> EndpointStatus {
    EndpointStatus {
        endpoint,
        serial: 1,
        listening: true,
        preflight: preflight(Vec::new()),
        sessions: Vec::new(),
        rejected_connections: 0,
        rejected_exclusive: 0,
        rejected_memory: 0,
        last_rejection: None,
        released: None,
        sessions_started: 0,
        sessions_lost: 0,
        lost: Vec::new(),
        engines_started: 0,
        totals: Totals::default(),
    }
}

/// The status of an endpoint with these counts.
pub fn counting(name: &str, totals: Totals) -> EndpointStatus {
    EndpointStatus { totals, ..listening(endpoint(name)) }
}

/// The status of a broker with this process id.
pub fn status(pid: u32, endpoints: Vec<EndpointStatus>) -> Status {
    Status { pid, instance: pid.into(), holder: HolderState::None, endpoints, next: None }
}

/// A session that serves, without findings.
pub fn session(id: &str) -> SessionStatus {
    SessionStatus {
        id: id.into(),
        state: SessionState::Serving,
        vmm_pid: 1,
        connected_at: 0,
        engine_pid: None,
        engines: 1,
        engine_binary: None,
        active_generation: 0,
        desired_generation: 0,
        last_replacement: None,
        oldest_request: None,
        trace: None,
        stashed_files: 0,
        engine: EngineConfig::stock(Access::ReadOnly),
        guest_memory: 0,
        charged_memory: None,
        preflight: None,
        finding: None,
        open_files: 0,
        held: Held::default(),
        inodes_limit: 1,
        totals: Totals::default(),
        stale_events: vec![],
        source_gone: None,
        unreachable_memory: None,
    }
}
