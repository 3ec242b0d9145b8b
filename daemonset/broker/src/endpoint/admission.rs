//! Whether one more connection is admitted. Pure.
//!
//! Sessions cost an engine process each, and half-open connections a thread for a few seconds. Each consumer (a pod), each
//! group of consumers (a namespace) and each source has a budget of both, so that none takes what the others need.

use std::path::PathBuf;

use super::RejectReason;

/// Most sessions of one socket, of one socket for a consumer (which needs one, or two while a VM is replaced), of all
/// sockets of a consumer, of a group or a source, and of all.
const SESSIONS_OF_SOCKET: usize = 256;
const SESSIONS_OF_VOLUME: usize = 4;
const SESSIONS_OF_CONSUMER: usize = 64;
const SESSIONS_OF_GROUP: usize = 512;
const SESSIONS_OF_SOURCE: usize = 768;
const SESSIONS_OF_ALL: usize = 1024;

/// Most half-open connections of one socket or consumer, of a group or a source, and of all.
const HALF_OPEN_OF_CONSUMER: usize = 16;
const HALF_OPEN_OF_GROUP: usize = 64;
const HALF_OPEN_OF_ALL: usize = 256;

/// The sessions of one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Name of the endpoint.
    pub(crate) endpoint: String,
    /// `GROUP/NAME`.
    pub(crate) consumer: Option<String>,
    pub(crate) source: PathBuf,
    /// Sessions, half-open connections included.
    pub(crate) sessions: usize,
    pub(crate) half_open: usize,
}

impl Tally {
    /// Who is responsible for its connections: the consumer, or the endpoint itself.
    pub(crate) fn payer(&self) -> &str {
        self.consumer.as_deref().unwrap_or(&self.endpoint)
    }

    fn group(&self) -> Option<&str> {
        Some(self.consumer.as_deref()?.rsplit_once('/')?.0)
    }
}

/// Checks whether one more connection is admitted at an endpoint. A connection may have been accepted just before its
/// endpoint was removed; its session would not be listed anywhere.
pub(super) fn admission(own: &Tally, listening: bool, exclusive: bool, all: &[Tally]) -> Result<(), RejectReason> {
    match own.sessions {
        _ if !listening => return Err(RejectReason::Removed),
        // The last place of an exclusive source is not for others to take.
        0 if exclusive => {}
        _ if exclusive => return Err(RejectReason::Exclusive),
        _ => {}
    }
    let of_socket = if own.consumer.is_some() { SESSIONS_OF_VOLUME } else { SESSIONS_OF_SOCKET };
    let source = format!("source {}", own.source.display());
    let group = own.group().map(|group| format!("namespace {}", group.rsplit(' ').next().unwrap_or(group)));
    type Belongs<'a> = Box<dyn Fn(&Tally) -> bool + 'a>;
    let same_group: Belongs<'_> = Box::new(|it| own.group().is_some() && it.group() == own.group());
    let budgets: [(String, Belongs<'_>, usize, usize); 5] = [
        ("this socket".into(), Box::new(|it| it.endpoint == own.endpoint), of_socket, HALF_OPEN_OF_CONSUMER),
        (own.payer().into(), Box::new(|it| it.payer() == own.payer()), consumer_budget(own), HALF_OPEN_OF_CONSUMER),
        (group.unwrap_or_default(), same_group, SESSIONS_OF_GROUP, HALF_OPEN_OF_GROUP),
        (source, Box::new(|it| it.source == own.source), SESSIONS_OF_SOURCE, HALF_OPEN_OF_GROUP),
        ("all sockets together".into(), Box::new(|_| true), SESSIONS_OF_ALL, HALF_OPEN_OF_ALL),
    ];
    for (of, belongs, sessions, half_open) in budgets {
        let (now, silent) = all
            .iter()
            .filter(|it| belongs(it))
            .fold((0, 0), |(sessions, half_open), it| (sessions + it.sessions, half_open + it.half_open));
        if silent >= half_open {
            return Err(RejectReason::TooManyHalfOpen { of, limit: half_open });
        }
        if now >= sessions {
            return Err(RejectReason::TooManySessions { of, limit: sessions });
        }
    }
    Ok(())
}

fn consumer_budget(own: &Tally) -> usize {
    if own.consumer.is_some() { SESSIONS_OF_CONSUMER } else { SESSIONS_OF_SOCKET }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(endpoint: &str, sessions: usize, half_open: usize) -> Tally {
        Tally { endpoint: endpoint.into(), consumer: None, source: format!("/{endpoint}").into(), sessions, half_open }
    }

    fn volume(pod: &str, number: usize, sessions: usize, half_open: usize) -> Tally {
        let consumer = Some(format!("pod {pod}"));
        Tally { consumer, source: "/images".into(), ..share(&format!("{pod}-{number}"), sessions, half_open) }
    }

    fn rejection(own: &Tally, beside: Vec<Tally>) -> Option<String> {
        let all: Vec<Tally> = beside.into_iter().chain([own.clone()]).collect();
        admission(own, true, false, &all).err().map(|reason| reason.to_string())
    }

    #[test]
    fn connection_is_admitted_or_rejected_with_a_reason() {
        for (listening, exclusive, sessions, half_open, expected) in [
            (true, true, 0, 0, None),
            (true, false, SESSIONS_OF_SOCKET - 1, HALF_OPEN_OF_CONSUMER - 1, None),
            (true, true, 1, 0, Some("exclusive")),
            (true, false, 16, 16, Some("16 connections of this socket")),
            (true, false, 256, 0, Some("256 sessions")),
            (false, false, 0, 0, Some("removed")),
        ] {
            let own = share("data", sessions, half_open);
            let rejected =
                admission(&own, listening, exclusive, std::slice::from_ref(&own)).err().map(|it| it.to_string());
            match expected {
                Some(text) => {
                    assert!(rejected.as_ref().is_some_and(|it| it.contains(text)), "{rejected:?}, not {text}")
                }
                None => assert_eq!(rejected, None),
            }
        }
    }

    #[test]
    fn pod_with_many_volumes_has_the_budget_of_one_pod() {
        let silent: Vec<Tally> = (0..4).map(|number| volume("vms/evil", number, 4, 4)).collect();
        let rejected = rejection(&volume("vms/evil", 99, 0, 0), silent.clone()).unwrap();
        assert!(rejected.contains("pod vms/evil"), "{rejected}");
        assert_eq!(rejection(&volume("vms/good", 0, 0, 0), silent.clone()), None);
        assert_eq!(rejection(&share("other", 0, 0), silent), None);
        let busy: Vec<Tally> = (0..16).map(|number| volume("vms/evil", number, 4, 0)).collect();
        let rejected = rejection(&volume("vms/evil", 99, 0, 0), busy.clone()).unwrap();
        assert!(rejected.contains("64 sessions"), "{rejected}");
        assert_eq!(rejection(&volume("vms/good", 0, 0, 0), busy), None);
    }

    #[test]
    fn namespace_with_many_pods_leaves_room_for_others() {
        let pods = |half_open| move |pod| (0..16).map(move |it| volume(&format!("evil/p{pod}"), it, 4, half_open));
        let busy: Vec<Tally> = (0..8).flat_map(pods(0)).collect();
        let rejected = rejection(&volume("evil/more", 0, 0, 0), busy.clone()).unwrap();
        assert!(rejected.contains("namespace evil"), "{rejected}");
        assert_eq!(rejection(&volume("good/vm", 0, 0, 0), busy), None);
    }

    #[test]
    fn half_open_connections_of_one_source_leave_room_for_others() {
        let silent: Vec<Tally> = (0..4).map(|pod| volume(&format!("evil/p{pod}"), 0, 16, 16)).collect();
        assert!(rejection(&volume("evil/more", 0, 0, 0), silent.clone()).is_some());
        assert_eq!(rejection(&share("other", 0, 0), silent), None);
    }
}
