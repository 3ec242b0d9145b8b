//! One message of each kind, with all fields set.

use virtiofs_config::{
    Access, CachePolicy, EngineConfig, IdTranslation, IdTranslationKind, InodeFileHandles, Limits, Sandbox,
};
use virtiofs_contract::control::{
    Endpoint, EndpointKind, EndpointStatus, EngineBinary, HolderState, LastReplacement, LostSession, OldestRequest,
    PendingHandOver, Rejection, Released, ReplacementOutcome, Request, Response, SessionState, SessionStatus,
    SocketSpec, Status, StatusPosition, Trace, TraceReply,
};
use virtiofs_contract::counters::{ErrnoTotal, Held, OperationTotals, Pauses, Replacements, Totals, UnreachableMemory};
use virtiofs_contract::engine::{FromEngine, Predecessor, StashReply, StashRequest, ToEngine};
use virtiofs_contract::preflight::{Confinement, Finding, HandleOutcome, MountPreflight, Preflight, Reason};
use virtiofs_contract::staleness::{Cause, StaleEvent, StaleTotal};
use virtiofs_contract::trace::TraceEntry;
use virtiofs_contract::{OLDEST, VERSION};

fn config() -> EngineConfig {
    let rule = |kind, to| IdTranslation { kind, from: 0, to, count: 65536 };
    EngineConfig {
        access: Access::ReadWrite,
        cache: CachePolicy::Metadata,
        entry_timeout_ms: 1,
        attr_timeout_ms: 2,
        negative_timeout_ms: 3,
        inode_file_handles: InodeFileHandles::Mandatory,
        writeback: true,
        xattr: true,
        xattr_map: Some(":map::user.virtiofs.:".into()),
        posix_acl: true,
        security_label: true,
        killpriv: true,
        announce_submounts: true,
        readdirplus: true,
        allow_mmap: true,
        direct_io: true,
        preserve_noatime: true,
        device_nodes: true,
        file_capabilities: true,
        open_files: Some(4),
        max_inodes: 5,
        queues: 1,
        sandbox: Sandbox::Chroot,
        detect_staleness: false,
        uid_translation: vec![rule(IdTranslationKind::SquashGuest, 107)],
        gid_translation: vec![rule(IdTranslationKind::Map, 108)],
        limits: Limits {
            memory_bytes: Some(6),
            cpu_millis: Some(7),
            cpu_weight: Some(8),
            io_weight: Some(9),
            read_bytes_per_second: Some(10),
            write_bytes_per_second: Some(11),
            reads_per_second: Some(12),
            writes_per_second: Some(13),
        },
    }
}

fn endpoint() -> Endpoint {
    Endpoint {
        name: "data.vm-7".into(),
        kind: EndpointKind::Volume,
        source: "/srv/data".into(),
        sub_path: Some("a/b".into()),
        socket: SocketSpec { path: "/run/s.sock".into(), owner: Some(1), group: Some(2), mode: 0o660 },
        engine: config(),
        exclusive: true,
        consumer: Some("pod ns/vm".into()),
    }
}

fn finding() -> Finding {
    Finding { reason: Reason::EngineStuck, message: "message".into(), remedy: "remedy".into() }
}

fn preflight() -> Preflight {
    Preflight {
        sandbox: Sandbox::Namespace,
        user_namespace: true,
        confinement: Confinement { pid_namespace: true, source_only: true, landlock_abi: 4 },
        capabilities: vec!["FOWNER".into()],
        inode_file_handles: InodeFileHandles::Prefer,
        mounts: vec![MountPreflight { path: ".".into(), fs_type: "ext4".into(), file_handles: HandleOutcome::Works }],
        open_files: 1024,
        guest_open_files: 1000,
        limits: Limits { memory_bytes: Some(1), ..Limits::default() },
        findings: vec![finding()],
    }
}

fn totals() -> Totals {
    let pauses = |nanoseconds| {
        let mut pauses = Pauses::default();
        pauses.record(nanoseconds);
        pauses
    };
    Totals {
        operations: vec![OperationTotals { opcode: 1, requests: 2, errors: 3, nanoseconds: 4, latency: vec![5; 16] }],
        errnos: vec![ErrnoTotal { errno: 2, replies: 6 }],
        bytes_read: 7,
        bytes_written: 8,
        malformed: 9,
        unreachable: 10,
        stale: vec![StaleTotal { cause: Cause::SourceReplaced, events: 11 }],
        replacements: Replacements {
            hand_overs: pauses(1_000_000),
            recoveries: pauses(5_000_000),
            aborted: 12,
            abandoned: 13,
        },
    }
}

fn session() -> SessionStatus {
    SessionStatus {
        id: "data.vm-7-1".into(),
        state: SessionState::Serving,
        vmm_pid: 14,
        connected_at: 15,
        engine_pid: Some(16),
        engines: 17,
        engine_binary: Some(EngineBinary { inode: 18, size: 19, modified: 20 }),
        active_generation: 21,
        desired_generation: 22,
        last_replacement: Some(LastReplacement {
            at: 23,
            outcome: ReplacementOutcome::Aborted,
            pause_ns: 24,
            finding: Some(finding()),
        }),
        oldest_request: Some(OldestRequest { age_ms: 25, opcode: 26, node: 27, path: Some("/a".into()) }),
        trace: Some(Trace { until: 28 }),
        stashed_files: 29,
        engine: config(),
        guest_memory: 30,
        charged_memory: Some(39),
        preflight: Some(preflight()),
        finding: Some(finding()),
        open_files: 31,
        held: Held { inodes: 32, handles: 33 },
        inodes_limit: 34,
        totals: totals(),
        stale_events: vec![StaleEvent { sequence: 1, at_ms: 35, cause: Cause::SourceGone, path: ".".into() }],
        source_gone: Some("it leads elsewhere".into()),
        unreachable_memory: Some(UnreachableMemory { start: 36, end: 37, requests: 38, waiting: true }),
    }
}

fn status() -> Status {
    let endpoint = EndpointStatus {
        endpoint: endpoint(),
        serial: 9,
        listening: true,
        preflight: preflight(),
        sessions: vec![session()],
        rejected_connections: 1,
        rejected_exclusive: 2,
        rejected_memory: 3,
        last_rejection: Some(Rejection { at: 4, message: "reason".into() }),
        released: Some(Released { until: 5 }),
        sessions_started: 6,
        sessions_lost: 7,
        lost: vec![LostSession { at: 10, session: "data-0".into() }],
        engines_started: 8,
        totals: totals(),
    };
    Status {
        pid: 1,
        instance: 2,
        holder: HolderState::Connected,
        endpoints: vec![endpoint],
        next: Some(StatusPosition { endpoint: "data".into(), session: Some("data-1".into()) }),
    }
}

pub(crate) fn requests() -> Vec<Request> {
    let (name, session, source) = (|| "data".to_owned(), || Some("data-1".to_owned()), || "/srv/data".into());
    // A new kind fails to compile here. Add a sample of it below.
    let _complete = |request: &Request| match request {
        Request::Hello { .. }
        | Request::Apply { .. }
        | Request::Remove { .. }
        | Request::HandOver { .. }
        | Request::Close { .. }
        | Request::Release { .. }
        | Request::Resume { .. }
        | Request::Trace { .. }
        | Request::ReadTrace { .. }
        | Request::Put { .. }
        | Request::Get { .. }
        | Request::ListKeys { .. }
        | Request::Preflight { .. }
        | Request::Drain
        | Request::Status { .. } => {}
    };
    vec![
        Request::hello(),
        Request::Apply { endpoint: endpoint(), reuse_preflight_of: Some(name()) },
        Request::Remove { name: name(), force: true },
        Request::HandOver { name: name(), session: session() },
        Request::Close { name: name(), session: session() },
        Request::Release { name: name(), deadline_ms: 1000, force: true },
        Request::Resume { name: name() },
        Request::Trace { session: "data-1".into(), duration_ms: 1, rate: 2 },
        Request::ReadTrace { session: "data-1".into(), after: 3 },
        Request::Put { key: "key".into(), value: Some("value".into()) },
        Request::Get { key: "key".into() },
        Request::ListKeys { prefix: "k".into() },
        Request::Preflight { source: source(), sub_path: Some("a".into()), engine: config() },
        Request::Drain,
        Request::Status { after: Some(StatusPosition { endpoint: name(), session: session() }) },
    ]
}

pub(crate) fn responses() -> Vec<Response> {
    // As above.
    let _complete = |response: &Response| match response {
        Response::Welcome { .. }
        | Response::Applied { .. }
        | Response::PreflightPassed { .. }
        | Response::Done
        | Response::HandingOver { .. }
        | Response::Closed { .. }
        | Response::Released { .. }
        | Response::Tracing { .. }
        | Response::TraceEntries(_)
        | Response::Value { .. }
        | Response::Keys { .. }
        | Response::Drained { .. }
        | Response::Status(_)
        | Response::Refused { .. }
        | Response::InvalidRequest { .. } => {}
    };
    let entry = TraceEntry {
        at_ns: 1,
        duration_ns: 2,
        unique: 3,
        node: 4,
        opcode: 5,
        errno: 6,
        queue: 1,
        path: Some("/a".into()),
        name: Some("b".into()),
        truncated: true,
    };
    vec![
        Response::Welcome { version: VERSION, pid: 1 },
        Response::Applied { preflight: preflight() },
        Response::PreflightPassed { preflight: preflight() },
        Response::Done,
        Response::HandingOver { sessions: vec![PendingHandOver { session: "data-1".into(), generation: 2 }] },
        Response::Closed { sessions: vec!["data-1".into()] },
        Response::Released { sessions: vec!["data-1".into()], until: 3 },
        Response::Tracing { until: 4 },
        Response::TraceEntries(TraceReply { entries: vec![entry], next: 5, lost: 6, rate_limited: 7, ended: true }),
        Response::Value { value: Some("value".into()) },
        Response::Keys { keys: vec!["key".into()] },
        Response::Drained { sessions: 8 },
        Response::Status(Box::new(status())),
        Response::Refused { finding: finding() },
        Response::InvalidRequest { message: "message".into() },
    ]
}

pub(crate) fn to_engine() -> Vec<ToEngine> {
    // As above.
    let _complete = |message: &ToEngine| match message {
        ToEngine::Start { .. }
        | ToEngine::Preflight { .. }
        | ToEngine::Quiesce
        | ToEngine::Resume
        | ToEngine::Kick
        | ToEngine::Describe { .. } => {}
    };
    vec![
        ToEngine::Start {
            version: OLDEST,
            newest: Some(VERSION),
            session: "data-1".into(),
            config: config(),
            predecessor: Predecessor::Killed,
        },
        ToEngine::Preflight { version: OLDEST, newest: Some(VERSION), config: config() },
        ToEngine::Quiesce,
        ToEngine::Resume,
        ToEngine::Kick,
        ToEngine::Describe { node: 1 },
    ]
}

pub(crate) fn from_engine() -> Vec<FromEngine> {
    // As above.
    let _complete = |message: &FromEngine| match message {
        FromEngine::Ready { .. }
        | FromEngine::Failed { .. }
        | FromEngine::Quiesced { .. }
        | FromEngine::Resumed
        | FromEngine::Described { .. } => {}
    };
    vec![
        FromEngine::Ready { preflight: preflight(), version: Some(VERSION) },
        FromEngine::Failed { finding: finding() },
        FromEngine::Quiesced { ring: 1 },
        FromEngine::Resumed,
        FromEngine::Described { node: 1, path: Some("/a".into()) },
    ]
}

pub(crate) fn stash_requests() -> Vec<StashRequest> {
    // As above.
    let _complete = |request: &StashRequest| match request {
        StashRequest::Stash { .. }
        | StashRequest::Fetch { .. }
        | StashRequest::Release { .. }
        | StashRequest::ReleaseAll => {}
    };
    vec![
        StashRequest::Stash { request: 1, handle: 2 },
        StashRequest::Fetch { request: 3, handle: 4 },
        StashRequest::Release { handle: 5 },
        StashRequest::ReleaseAll,
    ]
}

pub(crate) fn stash_replies() -> Vec<StashReply> {
    // As above.
    let _complete = |reply: &StashReply| match reply {
        StashReply::Stashed { .. } | StashReply::Fetched { .. } => {}
    };
    vec![StashReply::Stashed { request: 1, accepted: true }, StashReply::Fetched { request: 2, found: true }]
}
