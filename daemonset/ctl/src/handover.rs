//! `virtiofsctl handover`: replaces the engine of every session of a share, or of one, with one of the binary that is
//! installed now.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use virtiofs_client::broker::Client;
use virtiofs_client::text::print;
use virtiofs_contract::control::{PendingHandOver, ReplacementOutcome, SessionStatus, Status};

use crate::args::HandoverArgs;
use crate::target::{endpoints, session};

/// Time between two reads of the status.
const POLL_EVERY: Duration = Duration::from_millis(50);

/// Replaces the engines and prints the outcome. True if every session has its new engine.
pub(crate) fn handover(args: &HandoverArgs) -> Result<bool> {
    let mut client = crate::broker(&args.location.runtime_dir)?;
    let before = client.status()?;
    let mut under_way = Vec::new();
    let names: Vec<String> = match &args.session {
        Some(id) => {
            endpoints(&before, &args.share)?;
            vec![session(&before, id)?.0.endpoint.name.clone()]
        }
        None => endpoints(&before, &args.share)?.iter().map(|it| it.endpoint.name.clone()).collect(),
    };
    for name in &names {
        under_way.extend(client.hand_over(name, args.session.clone())?);
    }
    if under_way.is_empty() {
        print(&format!("{}: no VM uses it; new engines start from the installed binary\n", args.share))?;
        return Ok(true);
    }
    follow(&mut client, &before, under_way, args.timeout)
}

/// Waits until each session has its new engine, or its hand-over was aborted.
fn follow(client: &mut Client, before: &Status, mut under_way: Vec<PendingHandOver>, within: Duration) -> Result<bool> {
    let begun = Instant::now();
    let mut good = true;
    while !under_way.is_empty() {
        let status = client.status()?;
        let late = begun.elapsed() >= within;
        let mut waiting = Vec::new();
        for exchanging in under_way {
            let then = session(before, &exchanging.session).ok().map(|(_, it)| it);
            let now = session(&status, &exchanging.session).ok().map(|(_, it)| it);
            match progress(&exchanging, then, now) {
                Progress::UnderWay if !late => waiting.push(exchanging),
                Progress::UnderWay => {
                    good = false;
                    let line = format!(
                        "{}: not complete after {} s; it continues in the background\n",
                        exchanging.session,
                        within.as_secs()
                    );
                    print(&line)?;
                }
                Progress::Ended { done, text } => {
                    good &= done;
                    print(&format!("{}: {text}\n", exchanging.session))?;
                }
            }
        }
        under_way = waiting;
        if !under_way.is_empty() {
            sleep(POLL_EVERY);
        }
    }
    Ok(good)
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    UnderWay,
    Ended { done: bool, text: String },
}

fn progress(wanted: &PendingHandOver, then: Option<&SessionStatus>, now: Option<&SessionStatus>) -> Progress {
    let ended = |done, text: String| Progress::Ended { done, text };
    let Some(now) = now else { return ended(true, "its VM has left".to_owned()) };
    let pid = |session: Option<&SessionStatus>| {
        session.and_then(|it| it.engine_pid).map_or_else(|| "none".to_owned(), |pid| pid.to_string())
    };
    let last =
        now.last_replacement.as_ref().filter(|last| then.and_then(|it| it.last_replacement.as_ref()) != Some(last));
    if now.active_generation >= wanted.generation {
        let waited = last.filter(|last| last.pause_ns > 0);
        let waited = waited.map(|last| format!(", the guest waited {:.2} ms", last.pause_ns as f64 / 1e6));
        return ended(true, format!("engine {} -> {}{}", pid(then), pid(Some(now)), waited.unwrap_or_default()));
    }
    match last {
        Some(last) if last.outcome == ReplacementOutcome::Aborted => {
            let why =
                last.finding.as_ref().map(|it| format!("{}: {}\n    -> {}", it.reason.as_str(), it.message, it.remedy));
            ended(
                false,
                format!("aborted, the old engine serves on; {}", why.unwrap_or_else(|| "see the log".to_owned())),
            )
        }
        _ => Progress::UnderWay,
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::control::LastReplacement;

    use super::*;
    use virtiofs_client::fixtures::session;

    #[test]
    fn a_hand_over_ends_with_its_generation_or_when_it_is_aborted() {
        let wanted = PendingHandOver { session: "a-1".into(), generation: 2 };
        let with = |active_generation, last: Option<(u64, ReplacementOutcome)>| {
            let last_replacement =
                last.map(|(at, outcome)| LastReplacement { at, outcome, pause_ns: 1_500_000, finding: None });
            SessionStatus { active_generation, last_replacement, engine_pid: Some(7), ..session("a-1") }
        };
        use ReplacementOutcome::{Aborted, HandedOver};
        let then = with(1, Some((5, Aborted)));
        assert_eq!(progress(&wanted, Some(&then), Some(&then)), Progress::UnderWay, "an earlier abort");
        let Progress::Ended { done: true, text } =
            progress(&wanted, Some(&then), Some(&with(2, Some((9, HandedOver)))))
        else {
            panic!("done")
        };
        assert_eq!(text, "engine 7 -> 7, the guest waited 1.50 ms");
        let aborted = progress(&wanted, Some(&then), Some(&with(1, Some((9, Aborted)))));
        assert!(matches!(aborted, Progress::Ended { done: false, .. }));
        assert!(matches!(progress(&wanted, Some(&then), None), Progress::Ended { done: true, .. }));
    }
}
