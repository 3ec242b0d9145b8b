//! Notices of a share that do not keep it from being served: documents, sessions, rejected VMs.

use std::time::{Duration, Instant, UNIX_EPOCH};

use virtiofs_client::endpoint::share_of;
use virtiofs_client::notice::{Notice, NoticeReason};
use virtiofs_client::observation::hangs;
use virtiofs_client::report::Problem;
use virtiofs_contract::control::{EndpointStatus, SessionState, SessionStatus};
use virtiofs_contract::counters::UnreachableMemory;
use virtiofs_contract::preflight::Reason;
use virtiofs_contract::staleness::Cause;
use virtiofs_crds::changes;

use crate::model::observed::Observed;

/// How long a rejected second VM is reported.
const REJECTION_REPORTED: Duration = Duration::from_secs(300);

/// Time for which a VM whose memory was rejected is reported: its mount hangs until somebody restarts it.
const HANG_REPORTED: Duration = Duration::from_secs(60 * 60);

/// Most lost sessions that a notice names.
const MOST_NAMED: usize = 3;

/// Notices of a share that do not keep it from being served.
pub(super) fn notices(now: Instant, share: &str, problems: &[Problem], observed: &Observed) -> Vec<Notice> {
    let documents = problems.iter().filter(|problem| problem.share.as_deref() == Some(share));
    let mut notices: Vec<_> = documents
        .map(|problem| {
            let message = format!("{problem}; the last good version stays active");
            Notice::new(NoticeReason::ManifestInvalid, message, "correct the document and save it")
        })
        .collect();
    // Each notice once: there may be many sessions.
    let sessions = observed.endpoints_of(share).flat_map(|it| it.sessions.iter().map(move |session| (it, session)));
    for notice in sessions.flat_map(|(endpoint, it)| session_notice(endpoint, it).into_iter().chain(warnings(it))) {
        if !notices.contains(&notice) {
            notices.push(notice);
        }
    }
    notices.extend(rejected_vm(now, share, observed));
    notices.extend(rejected_memory(now, share, observed));
    notices.extend(lost_vms(now, share, observed));
    notices
}

/// A request that hangs, and limits that the guest is close to.
fn warnings(session: &SessionStatus) -> Vec<Notice> {
    let mut notices = Vec::new();
    if let Some(oldest) = session.oldest_request.as_ref().filter(|_| hangs(session)) {
        let message =
            format!("{}: a request has been waiting for the source for {} s", session.id, oldest.age_ms / 1000);
        let remedy = "check the source's file system or its server; this session continues when it answers, other sessions are \
                      not affected";
        notices.push(Notice::new(NoticeReason::Stale(Cause::SourceHung), message, remedy));
    }
    let near = |held: u64, most: u64| most > 0 && u128::from(held) * 10 >= u128::from(most) * 8;
    if near(session.held.inodes, session.inodes_limit) {
        let message = format!("{} holds {} of {} inodes", session.id, session.held.inodes, session.inodes_limit);
        let remedy = "raise engine.maxInodes and restart that VM, or drop caches in the guest";
        notices.push(Notice::new(NoticeReason::NearLimit, message, remedy));
    }
    let limit = session.preflight.as_ref().map_or(0, |preflight| preflight.open_files);
    if near(session.open_files, limit) {
        let message = format!("{} has {} of {limit} files open", session.id, session.open_files);
        let remedy = "make file handles work (see the manual), raise engine.openFiles, or drop caches in the guest";
        notices.push(Notice::new(NoticeReason::NearLimit, message, remedy));
    }
    notices.extend(session.unreachable_memory.map(|memory| unreachable(&session.id, memory)));
    notices
}

/// The notice of a guest that uses memory that its VMM does not share.
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
    let remedy = "let the VMM share all of the guest's memory, hot-plugged memory included (QEMU: \
                  memory-backend-memfd with share=on), and restart the VM";
    Notice::new(NoticeReason::GuestMemoryUnreachable, message, remedy)
}

/// The notice of a second VM that was rejected recently.
fn rejected_vm(now: Instant, share: &str, observed: &Observed) -> Option<Notice> {
    let at = observed.progress.iter().filter(|(name, _)| share_of(name) == share);
    let last = at.filter_map(|(_, progress)| progress.rejected_at).max()?;
    (now.saturating_duration_since(last) < REJECTION_REPORTED).then(|| {
        let remedy = "content Exclusive admits one VM at a time: end the other VM first, or declare other content";
        Notice::new(NoticeReason::ExclusiveRejected, "a VM was rejected while another uses the share", remedy)
    })
}

/// The notice of VMs whose memory engines cannot share.
fn rejected_memory(now: Instant, share: &str, observed: &Observed) -> Option<Notice> {
    let at = observed.progress.iter().filter(|(name, _)| share_of(name) == share);
    let last = at.filter_map(|(_, progress)| progress.rejected_memory_at).max()?;
    (now.saturating_duration_since(last) < HANG_REPORTED).then(|| {
        let why = observed.endpoints_of(share).filter_map(|it| it.last_rejection.as_ref()).max_by_key(|it| it.at);
        let why = why.map_or("", |it| it.message.as_str());
        let message = format!("a VM was rejected, and its mount hangs: {why}");
        let remedy = "give the VM shared memory of a memfd, or of a file on tmpfs, hugetlbfs or a disk that is mounted where \
                      the broker runs, all of it, NVDIMMs included (QEMU: share=on), and start it again";
        Notice::new(NoticeReason::GuestMemoryRejected, message, remedy)
    })
}

/// The notice of sessions that were lost recently.
fn lost_vms(now: Instant, share: &str, observed: &Observed) -> Option<Notice> {
    let lost = observed.losses.recent(now, |endpoint| share_of(endpoint) == share);
    let last = lost.last()?;
    let named = lost.iter().rev().take(MOST_NAMED).map(|it| it.session.as_str());
    let mut sessions = named.collect::<Vec<_>>().join(", ");
    if lost.len() > MOST_NAMED {
        sessions.push_str(&format!(" and {} more", lost.len() - MOST_NAMED));
    }
    let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(last.at));
    let message = format!(
        "VMs lost this share: sessions {sessions} ended with the broker and could not be restored, the last at {at}"
    );
    let remedy =
        "restart the VMs whose mounts hang; run a virtiofs-keeper beside the broker, and never stop both at once";
    Some(Notice::new(NoticeReason::SessionLost, message, remedy))
}

/// The notice of a released source. Whether the source exists does not matter then.
pub(super) fn released(observed: &Observed, share: &str) -> Option<Notice> {
    observed.endpoints_of(share).filter_map(|it| it.released).map(|it| it.until).max().map(|until| {
        let at = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(until));
        let message = format!("the source is released until {at}; guests wait");
        Notice::new(NoticeReason::Finding(Reason::SourceReleased), message, format!("virtiofsctl resume {share}"))
    })
}

fn session_notice(endpoint: &EndpointStatus, session: &SessionStatus) -> Option<Notice> {
    match (session.state, &session.finding) {
        (SessionState::Failed, Some(finding)) => {
            let message = format!("{}: {}", finding.reason.as_str(), finding.message);
            Some(Notice::new(NoticeReason::SessionFailed, message, &finding.remedy))
        }
        (SessionState::Failed, None) => Some(Notice::new(
            NoticeReason::SessionFailed,
            "its engine is gone",
            "another is started; see the log for why",
        )),
        (SessionState::Recovering, _) => None,
        // Reported of the share.
        (SessionState::Released, _) => None,
        (_, Some(finding)) if finding.reason == Reason::RemountRequired => {
            let waiting = changes(&session.engine, &endpoint.endpoint.engine).into_iter().filter(|it| it.at_next_mount);
            let waiting: Vec<&str> = waiting.map(|it| it.field).collect();
            let notice = Notice::from(finding);
            if waiting.is_empty() {
                return Some(notice);
            }
            let message = format!("{}: takes effect at the guest's next mount; {}", waiting.join(", "), notice.message);
            Some(Notice { message, ..notice })
        }
        (_, finding) => finding.as_ref().map(Notice::from),
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_client::fixtures::{finding, preflight, session};
    use virtiofs_client::report::ShareState;
    use virtiofs_contract::control::{LostSession, OldestRequest, Rejection};
    use virtiofs_contract::preflight::Finding;

    use super::super::tests::{of, served};
    use super::*;
    use crate::fixtures::{declared, desired, observed, present};

    /// State and reasons of a share whose endpoint was changed like this.
    fn with(change: impl FnOnce(&mut EndpointStatus)) -> (ShareState, Vec<NoticeReason>) {
        let now = Instant::now();
        let mut status = served(vec![]);
        status.sessions = vec![session("a-1")];
        change(&mut status);
        of(now, &desired([declared("a", "/srv/a")]), &observed(vec![status], vec![("a", present(now, "/srv/a"))]))
    }

    #[test]
    fn failed_sessions_are_reported_once_for_each_cause() {
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
            of(now, &desired([declared("a", "/srv/a")]), &observed(vec![status], vec![("a", present(now, "/srv/a"))]));
        assert_eq!(found, (ShareState::Degraded, vec![NoticeReason::SessionFailed; 2]));
    }

    #[test]
    fn fields_that_wait_for_a_mount_are_named() {
        let mut status = served(vec![]);
        status.sessions = vec![session("a-1")];
        status.sessions[0].finding = Some(Finding { reason: Reason::RemountRequired, ..finding() });
        let message = |status: &EndpointStatus| session_notice(status, &status.sessions[0]).unwrap().message;
        assert_eq!(message(&status), finding().message);
        (status.endpoint.engine.writeback, status.endpoint.engine.queues) = (true, 4);
        assert_eq!(
            message(&status),
            format!("writeback, queues: takes effect at the guest's next mount; {}", finding().message)
        );
    }

    #[test]
    fn a_session_near_a_limit_is_reported() {
        let old = |age_ms| Some(OldestRequest { age_ms, opcode: 15, node: 2, path: None });
        assert_eq!(with(|_| ()), (ShareState::Ready, vec![]));
        assert_eq!(with(|it| it.sessions[0].oldest_request = old(9_999)), (ShareState::Ready, vec![]));
        let hung = (ShareState::Degraded, vec![NoticeReason::Stale(Cause::SourceHung)]);
        assert_eq!(with(|it| it.sessions[0].oldest_request = old(10_000)), hung);

        let holding = |inodes, limit| {
            with(|it| {
                (it.sessions[0].held.inodes, it.sessions[0].inodes_limit) = (inodes, limit);
            })
        };
        let near = (ShareState::Degraded, vec![NoticeReason::NearLimit]);
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
        let degraded = (ShareState::Degraded, vec![NoticeReason::GuestMemoryUnreachable]);
        assert_eq!(with(|it| it.sessions[0].unreachable_memory = Some(memory)), degraded);
        let notice = unreachable("a-1", memory);
        assert!(notice.message.contains("0x140000000 to 0x180000000; they failed with EIO"), "{}", notice.message);
        let notice = unreachable("a-1", UnreachableMemory { waiting: true, ..memory });
        assert!(notice.message.contains("the guest's mount hangs"), "{}", notice.message);
    }

    #[test]
    fn lost_sessions_are_reported_for_an_hour() {
        let start = Instant::now();
        let wanted = desired([declared("a", "/srv/a")]);
        let mut known = observed(vec![], vec![("a", present(start, "/srv/a"))]);
        let mut at = |seconds, broker, lost: &[(u64, &str)]| {
            let now = start + Duration::from_secs(seconds);
            let lost: Vec<_> = lost.iter().map(|(at, name)| LostSession { at: *at, session: (*name).into() }).collect();
            let endpoint = EndpointStatus { sessions_lost: lost.len() as u64, lost, ..served(vec![]) };
            known.update_status(now, seconds, Some(&virtiofs_client::fixtures::status(broker, vec![endpoint])));
            (of(now, &wanted, &known), lost_vms(now, "a", &known).map(|notice| notice.message))
        };
        let reported = (ShareState::Degraded, vec![NoticeReason::SessionLost]);
        assert_eq!(at(1, 2, &[(1, "a-1")]).0, reported, "an agent that starts with the broker knows");
        assert_eq!(at(3600, 2, &[(1, "a-1")]).0, reported);
        assert_eq!(at(3601, 2, &[(1, "a-1")]), ((ShareState::Ready, vec![]), None));
        let (again, message) = at(3700, 3, &[(3700, "a-1")]);
        assert_eq!(again, reported, "a second loss of the same size");
        assert!(message.unwrap().contains("sessions a-1 ended with the broker"));
        let five = [(3701, "a-1"), (3701, "a-2"), (3701, "a-3"), (3702, "a-4"), (3703, "a-5")];
        let message = at(3703, 4, &five).1.unwrap();
        let expected = "sessions a-5, a-4, a-3 and 3 more ended with the broker and could not be restored, the last at \
                        1970-01-01T01:01:43Z";
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn a_vm_whose_memory_was_rejected_is_reported_with_the_reason() {
        let start = Instant::now();
        let mut observed = observed(vec![], vec![("a", present(start, "/srv/a"))]);
        let wanted = desired([declared("a", "/srv/a")]);
        let mut at = |seconds, rejected_memory| {
            let now = start + Duration::from_secs(seconds);
            let last_rejection = Some(Rejection { at: 1, message: "s1: a plain file".into() });
            let endpoint = EndpointStatus { rejected_memory, last_rejection, ..served(vec![]) };
            observed.update_status(now, 0, Some(&virtiofs_client::fixtures::status(1, vec![endpoint])));
            let notice = super::rejected_memory(now, "a", &observed);
            (of(now, &wanted, &observed), notice)
        };
        assert_eq!(at(0, 1).0, (ShareState::Ready, vec![]), "before this agent");
        let (reported, notice) = at(1, 2);
        assert_eq!(reported, (ShareState::Degraded, vec![NoticeReason::GuestMemoryRejected]));
        assert!(notice.unwrap().message.contains("s1: a plain file"));
        assert_eq!(at(3602, 2).0, (ShareState::Ready, vec![]));
    }

    #[test]
    fn a_rejected_second_vm_is_reported_for_a_while() {
        let start = Instant::now();
        let mut observed = observed(vec![], vec![("a", present(start, "/srv/a"))]);
        let wanted = desired([declared("a", "/srv/a")]);
        let mut at = |seconds, refused| {
            let now = start + Duration::from_secs(seconds);
            let endpoint = EndpointStatus { rejected_exclusive: refused, ..served(vec![]) };
            observed.update_status(now, 0, Some(&virtiofs_client::fixtures::status(1, vec![endpoint])));
            of(now, &wanted, &observed)
        };
        let reported = (ShareState::Degraded, vec![NoticeReason::ExclusiveRejected]);
        assert_eq!(at(0, 3), (ShareState::Ready, vec![]), "before this agent");
        assert_eq!(at(1, 4), reported);
        assert_eq!(at(300, 4), reported);
        assert_eq!(at(302, 4), (ShareState::Ready, vec![]));
    }
}
