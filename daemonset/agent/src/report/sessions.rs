//! What is wrong around a share that may be served all the same: documents, sessions, refused VMs.

use std::time::{Duration, Instant, UNIX_EPOCH};

use virtiofs_contract::control::{EndpointStatus, SessionState, SessionStatus};
use virtiofs_contract::counters::UnreachableMemory;
use virtiofs_contract::preflight::Reason;
use virtiofs_crds::changes;

use crate::desired::Problem;
use crate::notice::{
    EXCLUSIVE_REFUSED, GUEST_MEMORY_UNREACHABLE, MANIFEST_INVALID, NEAR_LIMIT, Notice, SESSION_FAILED, SOURCE_HUNG,
};
use crate::observed::Observed;
use crate::offer::share_name;

/// A request that has been waiting for longer than this hangs.
const HUNG_AFTER: Duration = Duration::from_secs(10);

/// How long it is told that a second VM was refused.
const REFUSAL_STANDS: Duration = Duration::from_secs(300);

/// What is wrong around a share that may be served all the same.
pub(super) fn complaints(now: Instant, share: &str, problems: &[Problem], observed: &Observed) -> Vec<Notice> {
    let documents = problems.iter().filter(|problem| problem.share.as_deref() == Some(share));
    let mut notices: Vec<_> = documents
        .map(|problem| {
            let message = format!("{problem}; the last good version stays in force");
            Notice::new(MANIFEST_INVALID, message, "correct the document and save it")
        })
        .collect();
    // Each thing once: there may be many sessions.
    let sessions = sessions(observed, share);
    for notice in sessions.flat_map(|(endpoint, it)| session_notice(endpoint, it).into_iter().chain(strained(it))) {
        if !notices.contains(&notice) {
            notices.push(notice);
        }
    }
    notices.extend(refused_second(now, share, observed));
    notices
}

/// What is not wrong yet, or nobody's fault here, but worth knowing of a session before its guest is refused.
fn strained(session: &SessionStatus) -> Vec<Notice> {
    let mut notices = Vec::new();
    if let Some(oldest) = session.oldest_request.as_ref().filter(|it| it.age_ms >= HUNG_AFTER.as_millis() as u64) {
        let message =
            format!("{}: a request has been waiting for the source for {} s", session.id, oldest.age_ms / 1000);
        let remedy = "look after the source's file system or its server; other sessions go on, and so does this one \
                      when it answers";
        notices.push(Notice::new(SOURCE_HUNG, message, remedy));
    }
    let near = |held: u64, most: u64| most > 0 && u128::from(held) * 10 >= u128::from(most) * 8;
    if near(session.held.inodes, session.inodes_limit) {
        let message = format!("{} holds {} of {} inodes", session.id, session.held.inodes, session.inodes_limit);
        let remedy = "raise engine.maxInodes and have that VM connect anew, or drop caches in the guest";
        notices.push(Notice::new(NEAR_LIMIT, message, remedy));
    }
    let limit = session.preflight.as_ref().map_or(0, |preflight| preflight.open_files);
    if near(session.open_files, limit) {
        let message = format!("{} has {} of {limit} files open", session.id, session.open_files);
        let remedy = "let file handles work (see the manual), raise engine.openFiles, or drop caches in the guest";
        notices.push(Notice::new(NEAR_LIMIT, message, remedy));
    }
    notices.extend(session.unreachable_memory.map(|memory| unreachable(&session.id, memory)));
    notices
}

/// The guest uses memory that its VMM does not share.
fn unreachable(session: &str, memory: UnreachableMemory) -> Notice {
    let UnreachableMemory { start, end, requests, waiting } = memory;
    let effect = if waiting {
        "and one waits whose reply's header is there, so the guest's mount hangs"
    } else {
        "they failed with EIO"
    };
    let message = format!(
        "{session}: {requests} requests used guest memory that the VMM does not share, within guest-physical addresses \
         {start:#x} to {end:#x}; {effect}"
    );
    let remedy = "have the VMM share all of the guest's memory, hot-plugged memory included (QEMU: \
                  memory-backend-memfd with share=on), and restart the VM";
    Notice::new(GUEST_MEMORY_UNREACHABLE, message, remedy)
}

/// Has a second VM been refused a while ago?
fn refused_second(now: Instant, share: &str, observed: &Observed) -> Option<Notice> {
    let at = observed.efforts.iter().filter(|(name, _)| share_name(name) == share);
    let last = at.filter_map(|(_, effort)| effort.refused_at).max()?;
    (now.saturating_duration_since(last) < REFUSAL_STANDS).then(|| {
        let remedy = "content Exclusive is for one VM at a time: end the other first, or declare what is true";
        Notice::new(EXCLUSIVE_REFUSED, "a VM was refused while another uses the share", remedy)
    })
}

/// Somebody has the source released, so that the host can unmount it: whether it is there is no question now.
pub(super) fn released(observed: &Observed, share: &str) -> Option<Notice> {
    let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
    let own = endpoints.filter(|it| share_name(&it.endpoint.name) == share);
    own.filter_map(|it| it.released).map(|it| it.until).max().map(|until| {
        let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(until));
        let message = format!("the source is released until {at}; guests wait");
        Notice::new(Reason::SourceReleased.as_str(), message, format!("virtiofs-agent resume {share}"))
    })
}

/// Sessions of a share, at whatever endpoint.
fn sessions<'a>(
    observed: &'a Observed,
    share: &'a str,
) -> impl Iterator<Item = (&'a EndpointStatus, &'a SessionStatus)> {
    let endpoints = observed.endpoints.iter().flat_map(|endpoints| endpoints.values());
    let own = move |it: &&EndpointStatus| share_name(&it.endpoint.name) == share;
    endpoints.filter(own).flat_map(|it| it.sessions.iter().map(move |session| (it, session)))
}

fn session_notice(endpoint: &EndpointStatus, session: &SessionStatus) -> Option<Notice> {
    match (session.state, &session.finding) {
        (SessionState::Failed, Some(finding)) => {
            let message = format!("{}: {}", finding.reason.as_str(), finding.message);
            Some(Notice::new(SESSION_FAILED, message, &finding.remedy))
        }
        (SessionState::Failed, None) => {
            Some(Notice::new(SESSION_FAILED, "its engine is gone", "another is started; see the log for why"))
        }
        (SessionState::Recovering, _) => None,
        // It is said of the share.
        (SessionState::Released, _) => None,
        (_, Some(finding)) if finding.reason == Reason::RemountRequired => {
            let waiting = changes(&session.engine, &endpoint.endpoint.engine).into_iter().filter(|it| it.at_next_mount);
            let waiting: Vec<&str> = waiting.map(|it| it.field).collect();
            let notice = Notice::from(finding);
            if waiting.is_empty() {
                return Some(notice);
            }
            let message = format!("{}: in force at the guest's next mount; {}", waiting.join(", "), notice.message);
            Some(Notice { message, ..notice })
        }
        (_, finding) => finding.as_ref().map(Notice::from),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use virtiofs_contract::control::OldestRequest;
    use virtiofs_contract::counters::{Held, Totals};
    use virtiofs_contract::preflight::Finding;

    use super::super::ShareState;
    use super::super::tests::{of, served};
    use super::*;
    use crate::desired::tests::{declared, desired};
    use crate::plan::tests::{finding, observed, preflight, seen};

    /// A session that serves, with nothing to complain of.
    pub(crate) fn session(id: &str) -> SessionStatus {
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
            engine: declared("a", "/srv/a").engine,
            guest_memory: 0,
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

    /// State and reasons of the one share when its endpoint is like this.
    fn with(change: impl FnOnce(&mut EndpointStatus)) -> (ShareState, Vec<String>) {
        let now = Instant::now();
        let mut status = served(vec![]);
        status.sessions = vec![session("a-1")];
        change(&mut status);
        of(now, &desired([declared("a", "/srv/a")]), &observed(vec![status], vec![("a", seen(now, "/srv/a"))]))
    }

    #[test]
    fn sessions_that_failed_show_once_for_each_cause() {
        let now = Instant::now();
        let mut status = served(vec![]);
        let failed = |id: &str, reason| {
            let finding = Some(Finding { reason, ..finding() });
            SessionStatus { state: SessionState::Failed, finding, ..session(id) }
        };
        status.sessions = vec![
            failed("a-1", Reason::EngineFailed),
            failed("a-2", Reason::EngineFailed),
            failed("a-3", Reason::SourceMissing),
        ];
        let found =
            of(now, &desired([declared("a", "/srv/a")]), &observed(vec![status], vec![("a", seen(now, "/srv/a"))]));
        assert_eq!(found, (ShareState::Degraded, vec![SESSION_FAILED.to_owned(); 2]));
    }

    #[test]
    fn what_waits_for_the_next_mount_is_named() {
        let mut status = served(vec![]);
        status.sessions = vec![session("a-1")];
        status.sessions[0].finding = Some(Finding { reason: Reason::RemountRequired, ..finding() });
        let told = |status: &EndpointStatus| session_notice(status, &status.sessions[0]).unwrap().message;
        assert_eq!(told(&status), finding().message);
        (status.endpoint.engine.writeback, status.endpoint.engine.queues) = (true, 4);
        assert_eq!(
            told(&status),
            format!("writeback, queues: in force at the guest's next mount; {}", finding().message)
        );
    }

    #[test]
    fn what_strains_a_session_is_said_before_its_guest_is_refused() {
        let old = |age_ms| Some(OldestRequest { age_ms, opcode: 15, node: 2, path: None });
        assert_eq!(with(|_| ()), (ShareState::Ready, vec![]));
        assert_eq!(with(|it| it.sessions[0].oldest_request = old(9_999)), (ShareState::Ready, vec![]));
        let hung = (ShareState::Degraded, vec![SOURCE_HUNG.to_owned()]);
        assert_eq!(with(|it| it.sessions[0].oldest_request = old(10_000)), hung);

        let holding = |inodes, limit| {
            with(|it| {
                (it.sessions[0].held.inodes, it.sessions[0].inodes_limit) = (inodes, limit);
            })
        };
        let near = (ShareState::Degraded, vec![NEAR_LIMIT.to_owned()]);
        assert_eq!(holding(799, 1000), (ShareState::Ready, vec![]));
        assert_eq!(holding(800, 1000), near);
        let opened = |files| {
            with(|it| {
                it.sessions[0].open_files = files;
                it.sessions[0].preflight = Some(preflight(vec![]));
            })
        };
        assert_eq!((opened(800), opened(1000)), ((ShareState::Ready, vec![]), near));
    }

    #[test]
    fn unreachable_guest_memory_is_named() {
        let memory = UnreachableMemory { start: 0x1_4000_0000, end: 0x1_8000_0000, requests: 3, waiting: false };
        let degraded = (ShareState::Degraded, vec![GUEST_MEMORY_UNREACHABLE.to_owned()]);
        assert_eq!(with(|it| it.sessions[0].unreachable_memory = Some(memory)), degraded);
        let notice = unreachable("a-1", memory);
        assert!(notice.message.contains("0x140000000 to 0x180000000; they failed with EIO"), "{}", notice.message);
        let notice = unreachable("a-1", UnreachableMemory { waiting: true, ..memory });
        assert!(notice.message.contains("the guest's mount hangs"), "{}", notice.message);
    }

    #[test]
    fn a_second_vm_that_was_refused_is_told_of_for_a_while() {
        let start = Instant::now();
        let mut observed = observed(vec![], vec![("a", seen(start, "/srv/a"))]);
        let wanted = desired([declared("a", "/srv/a")]);
        let mut at = |seconds, refused| {
            let now = start + Duration::from_secs(seconds);
            let endpoint = EndpointStatus { rejected_exclusive: refused, ..served(vec![]) };
            observed.hear(now, Some(&crate::plan::tests::status(1, vec![endpoint])));
            of(now, &wanted, &observed)
        };
        let told = (ShareState::Degraded, vec![EXCLUSIVE_REFUSED.to_owned()]);
        assert_eq!(at(0, 3), (ShareState::Ready, vec![]), "before this agent");
        assert_eq!(at(1, 4), told);
        assert_eq!(at(300, 4), told);
        assert_eq!(at(302, 4), (ShareState::Ready, vec![]));
    }
}
