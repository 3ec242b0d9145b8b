//! Metrics of staleness. A cause that never occurred counts 0, so that the first event is seen as an increase.

use std::collections::BTreeMap;

use virtiofs_contract::staleness::CAUSES;

use super::sample::Family;
use crate::report::Report;
use crate::totals::ShareTotals;

pub(super) fn families(report: &Report, totals: &BTreeMap<String, ShareTotals>) -> [Family; 4] {
    let mut events = Family::counter(
        "virtiofs_stale_events_total",
        "Stale events by cause; SourceHung is shown by the age of the oldest request.",
    );
    for (share, counts) in totals {
        for cause in CAUSES {
            events.count(&[("share", share), ("cause", cause.name())], counts.totals.stale(cause));
        }
    }
    let [info, remedies, active] = shares(report);
    [events, info, remedies, active]
}

fn shares(report: &Report) -> [Family; 3] {
    let mut info = Family::gauge("virtiofs_share_info", "What the share declares; always 1.");
    let mut remedies = Family::counter("virtiofs_remedies_total", "Remedies against staleness that ended, and how.");
    let mut active = Family::gauge("virtiofs_remedy_active", "1 while a remedy changes the configuration.");
    for (name, share) in &report.staleness {
        let share_label = ("share", name.as_str());
        let (content, access, policy) = (share.content.as_str(), share.access.as_str(), share.policy.as_str());
        info.value(&[share_label, ("content", content), ("access", access), ("staleness", policy)], 1.0);
        for outcome in &share.outcomes {
            let labels = [share_label, ("cause", outcome.cause.name()), ("outcome", outcome.outcome.as_str())];
            remedies.count(&labels, outcome.count);
        }
        for remedy in &share.active_remedies {
            active.value(&[share_label, ("cause", remedy.cause.name()), ("remedy", remedy.remedy.as_str())], 1.0);
        }
    }
    [info, remedies, active]
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;
    use virtiofs_contract::counters::Totals;
    use virtiofs_contract::staleness::{Cause, StaleTotal};

    use super::*;
    use crate::staleness::ShareStaleness;

    #[test]
    fn a_cause_without_events_counts_zero() {
        let stale = vec![StaleTotal { cause: Cause::SourceRemoved, events: 3 }];
        let counts = ShareTotals { totals: Totals { stale, ..Totals::default() }, ..ShareTotals::default() };
        let share = ShareStaleness { content: "Immutable".into(), ..ShareStaleness::default() };
        let report = Report { staleness: [("a".to_owned(), share)].into(), ..Report::default() };
        let families = families(&report, &[("a".to_owned(), counts)].into());
        let page: Vec<_> = families.into_iter().filter_map(Family::finish).collect();
        let page = TextEncoder::new().encode_to_string(&page).unwrap();
        for line in [
            "virtiofs_stale_events_total{share=\"a\",cause=\"SourceRemoved\"} 3",
            "virtiofs_stale_events_total{share=\"a\",cause=\"FdExhausted\"} 0",
            "virtiofs_share_info{share=\"a\",content=\"Immutable\",access=\"\",staleness=\"\"} 1",
        ] {
            assert!(page.lines().any(|it| it == line), "{line} in\n{page}");
        }
    }
}
