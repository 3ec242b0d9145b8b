//! `virtiofs-agent handover`: every session of a share, or one, gets a new engine, of the binary that lies there
//! now.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use virtiofs_contract::control::{PendingHandOver, ReplacementOutcome, SessionStatus, Status};

use super::target::{endpoints, session};
use crate::args::HandoverArgs;
use crate::broker::client::Client;
use crate::output::print;

/// Between two looks at how it goes.
const GLANCE: Duration = Duration::from_millis(50);

/// Has it done, and says how it went. Did every session get its engine?
pub(crate) fn handover(args: &HandoverArgs) -> Result<bool> {
    let mut client = super::broker(&args.runtime_dir)?;
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
        under_way.extend(client.exchange(name, args.session.clone())?);
    }
    if under_way.is_empty() {
        print(&format!("{}: no VM uses it; engines that start from now on are of the new binary\n", args.share))?;
        return Ok(true);
    }
    follow(&mut client, &before, under_way, args.timeout)
}

/// Waits until each session has its engine or is known not to get it.
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
                    let line = format!("{}: not done after {} s; it goes on\n", exchanging.session, within.as_secs());
                    print(&line)?;
                }
                Progress::Ended { well, said } => {
                    good &= well;
                    print(&format!("{}: {said}\n", exchanging.session))?;
                }
            }
        }
        under_way = waiting;
        if !under_way.is_empty() {
            sleep(GLANCE);
        }
    }
    Ok(good)
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    UnderWay,
    Ended { well: bool, said: String },
}

fn progress(wanted: &PendingHandOver, then: Option<&SessionStatus>, now: Option<&SessionStatus>) -> Progress {
    let ended = |well, said: String| Progress::Ended { well, said };
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
            ended(false, format!("put off, the engine serves on; {}", why.unwrap_or_else(|| "see the log".to_owned())))
        }
        _ => Progress::UnderWay,
    }
}

#[cfg(test)]
mod tests {
    use virtiofs_contract::control::LastReplacement;

    use super::*;
    use crate::report::tests::session;

    #[test]
    fn it_is_over_when_the_generation_is_reached_or_the_broker_has_put_it_off() {
        let wanted = PendingHandOver { session: "a-1".into(), generation: 2 };
        let with = |generation, last: Option<(u64, ReplacementOutcome)>| {
            let last_replacement =
                last.map(|(at, outcome)| LastReplacement { at, outcome, pause_ns: 1_500_000, finding: None });
            SessionStatus { active_generation: generation, last_replacement, engine_pid: Some(7), ..session("a-1") }
        };
        use ReplacementOutcome::{Aborted, HandedOver};
        let then = with(1, Some((5, Aborted)));
        assert_eq!(progress(&wanted, Some(&then), Some(&then)), Progress::UnderWay, "what was put off before");
        let Progress::Ended { well: true, said } =
            progress(&wanted, Some(&then), Some(&with(2, Some((9, HandedOver)))))
        else {
            panic!("done")
        };
        assert_eq!(said, "engine 7 -> 7, the guest waited 1.50 ms");
        let aborted = progress(&wanted, Some(&then), Some(&with(1, Some((9, Aborted)))));
        assert!(matches!(aborted, Progress::Ended { well: false, .. }));
        assert!(matches!(progress(&wanted, Some(&then), None), Progress::Ended { well: true, .. }));
    }
}
