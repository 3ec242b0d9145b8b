//! What a service manager is told, by sd_notify(3). Without one, nothing is said.

use std::io;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::time::interval;

use crate::reconcile::Turn;
use crate::report::{Report, ShareState};

/// Says that the service is ready once the loop has turned, and from then on in a line how it is doing. Ends with
/// the loop.
pub(crate) async fn tell_status(mut turns: watch::Receiver<Turn>) {
    let mut said = None;
    while turns.changed().await.is_ok() {
        let status = summary(&turns.borrow_and_update().report);
        if said.is_none() {
            notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        } else if said.as_ref() != Some(&status) {
            notify(&[NotifyState::Status(&status)]);
        }
        said = Some(status);
    }
}

/// How often the service manager wants a sign of life, if it does.
pub(crate) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|every| !every.is_zero())
}

/// Gives a sign of life twice as often as it is wanted, for as long as the loop turns.
pub(crate) async fn keep_watchdog(every: Duration, turns: watch::Receiver<Turn>) {
    let mut ticks = interval(every / 2);
    loop {
        ticks.tick().await;
        if turns.borrow().is_fresh(Instant::now()) {
            notify(&[NotifyState::Watchdog]);
        } else {
            tracing::error!("the loop hangs; the service manager is given no sign of life");
        }
    }
}

/// Declarations are being read again.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// They have been.
pub(crate) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// The service is about to end.
pub(crate) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    match sd_notify::notify(states) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
            tracing::debug!(%error, "the service manager cannot be told");
        }
        _ => {}
    }
}

/// One line: what is amiss first.
fn summary(report: &Report) -> String {
    if report.silent {
        return format!("waiting for the broker, which does not answer; {} declared", shares(report.shares.len()));
    }
    let in_state = |state| report.shares.iter().filter(|share| share.state == state).count();
    let states =
        [ShareState::NotReady, ShareState::Degraded, ShareState::Draining, ShareState::Pending, ShareState::Ready];
    let counts = states.map(|state| (in_state(state), state)).into_iter().filter(|(count, _)| *count > 0);
    let counts: Vec<_> = counts.map(|(count, state)| format!("{count} {}", state.as_str())).collect();
    let refused = match report.problems.len() {
        0 => String::new(),
        count => format!("; {count} problems in documents"),
    };
    match counts.is_empty() {
        true => format!("no shares{refused}"),
        false => format!("{}: {}{refused}", shares(report.shares.len()), counts.join(", ")),
    }
}

fn shares(count: usize) -> String {
    if count == 1 { "1 share".to_owned() } else { format!("{count} shares") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ShareReport;

    fn share(state: ShareState) -> ShareReport {
        ShareReport { name: "a".into(), state, notices: Vec::new(), source: "/srv".into(), socket: "/run/s".into() }
    }

    #[test]
    fn the_line_says_what_is_amiss_first() {
        let of = |states: &[ShareState], silent: bool| {
            let shares = states.iter().map(|state| share(*state)).collect();
            summary(&Report { broker: !silent, silent, shares, ..Report::default() })
        };
        use ShareState::{Degraded, NotReady, Ready};
        assert_eq!(of(&[], false), "no shares");
        assert_eq!(of(&[Ready], false), "1 share: 1 Ready");
        assert_eq!(of(&[Ready, NotReady, Ready, Degraded], false), "4 shares: 1 NotReady, 1 Degraded, 2 Ready");
        assert_eq!(of(&[Ready], true), "waiting for the broker, which does not answer; 1 share declared");
    }
}
