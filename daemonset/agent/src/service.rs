//! Notifications for a service manager, by sd_notify(3). Without a service manager nothing is sent.

use std::io;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::time::interval;
use virtiofs_client::report::{Report, ShareState};

use crate::model::pass::Pass;

/// Reports readiness after the first pass, and then a status line at each change. Ends with the reconcile loop.
pub(crate) async fn report_status(mut passes: watch::Receiver<Pass>) {
    let mut sent = None;
    while passes.changed().await.is_ok() {
        let status = summary(&passes.borrow_and_update().report);
        if sent.is_none() {
            notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        } else if sent.as_ref() != Some(&status) {
            notify(&[NotifyState::Status(&status)]);
        }
        sent = Some(status);
    }
}

/// The watchdog interval of the service manager, if it has one.
pub(crate) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|every| !every.is_zero())
}

/// Resets the watchdog twice in each interval while the reconcile loop is alive.
pub(crate) async fn reset_watchdog(every: Duration, passes: watch::Receiver<Pass>) {
    let mut ticks = interval(every / 2);
    loop {
        ticks.tick().await;
        if passes.borrow().is_fresh(Instant::now()) {
            notify(&[NotifyState::Watchdog]);
        } else {
            tracing::error!("the reconcile loop hangs; the watchdog is not reset");
        }
    }
}

/// Reports that declarations are being read again.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// Reports readiness.
pub(crate) fn ready() {
    notify(&[NotifyState::Ready]);
}

/// Reports that the service is ending.
pub(crate) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(states: &[NotifyState<'_>]) {
    match sd_notify::notify(states) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
            tracing::debug!(%error, "cannot notify the service manager");
        }
        _ => {}
    }
}

/// One line, problems first.
fn summary(report: &Report) -> String {
    if report.silent {
        return format!("waiting for the broker, which does not answer; {} declared", shares(report.shares.len()));
    }
    let in_state = |state| report.shares.iter().filter(|share| share.state == state).count();
    let states =
        [ShareState::NotReady, ShareState::Degraded, ShareState::Draining, ShareState::Pending, ShareState::Ready];
    let counts = states.map(|state| (in_state(state), state)).into_iter().filter(|(count, _)| *count > 0);
    let counts: Vec<_> = counts.map(|(count, state)| format!("{count} {}", state.as_str())).collect();
    let rejected = match report.problems.len() {
        0 => String::new(),
        count => format!("; {count} problems in documents"),
    };
    match counts.is_empty() {
        true => format!("no shares{rejected}"),
        false => format!("{}: {}{rejected}", shares(report.shares.len()), counts.join(", ")),
    }
}

fn shares(count: usize) -> String {
    if count == 1 { "1 share".to_owned() } else { format!("{count} shares") }
}

#[cfg(test)]
mod tests {
    use virtiofs_client::report::ShareReport;

    use super::*;

    fn share(state: ShareState) -> ShareReport {
        ShareReport { name: "a".into(), state, notices: Vec::new(), source: "/srv".into(), socket: "/run/s".into() }
    }

    #[test]
    fn the_line_starts_with_problems() {
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
