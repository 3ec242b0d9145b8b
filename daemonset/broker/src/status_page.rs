//! The status in pages, each far below the largest message. Pure.
//!
//! Guests choose names that are part of a session's status, and there may be a thousand sessions.

use std::collections::VecDeque;

use virtiofs_contract::control::{EndpointStatus, OldestRequest, SessionStatus, StatusPosition};
use virtiofs_contract::preflight::{Finding, Preflight};

/// Bytes of a page from which the next session begins another page.
const PAGE: usize = 1 << 20;

/// Most bytes of a path of a guest, and of any other text that an engine sends.
const MOST_PATH: usize = 1024;
const MOST_TEXT: usize = 4096;

/// Most findings of one preflight.
const MOST_FINDINGS: usize = 64;

/// Most mounts of one preflight.
const MOST_MOUNTS: usize = 256;

/// Adds endpoints to a page, in the order of their names, until it is full. Returns where the next page begins; none: this
/// page is the last one.
pub(crate) fn fill(
    endpoints: impl IntoIterator<Item = EndpointStatus>,
    after: Option<&StatusPosition>,
    page: &mut Vec<EndpointStatus>,
) -> Option<StatusPosition> {
    let mut bytes = 0;
    for mut endpoint in endpoints {
        let name = endpoint.endpoint.name.clone();
        let begins_inside = after.filter(|after| after.endpoint == name).and_then(|after| after.session.clone());
        if after.is_some_and(|after| name < after.endpoint || name == after.endpoint && after.session.is_none()) {
            continue;
        }
        bound_preflight(&mut endpoint.preflight);
        let sessions = std::mem::take(&mut endpoint.sessions);
        let mut left: VecDeque<_> = sessions
            .into_iter()
            .filter(|session| begins_inside.as_ref().is_none_or(|after| session.id > *after))
            .collect();
        bytes += size(&endpoint);
        if bytes > PAGE
            && let Some(before) = page.last()
        {
            return Some(StatusPosition { endpoint: before.endpoint.name.clone(), session: None });
        }
        while let Some(mut session) = left.pop_front() {
            bound(&mut session);
            bytes += size(&session);
            endpoint.sessions.push(session);
            if bytes > PAGE && !left.is_empty() {
                let session = endpoint.sessions.last().map(|session| session.id.clone());
                page.push(endpoint);
                return Some(StatusPosition { endpoint: name, session });
            }
        }
        page.push(endpoint);
    }
    None
}

fn size(part: &impl serde::Serialize) -> usize {
    serde_json::to_vec(part).map_or(0, |bytes| bytes.len())
}

/// Bounds all text that a guest or its engine has chosen.
fn bound(session: &mut SessionStatus) {
    for event in &mut session.stale_events {
        keep_end(&mut event.path, MOST_PATH);
    }
    if let Some(OldestRequest { path: Some(path), .. }) = &mut session.oldest_request {
        keep_end(path, MOST_PATH);
    }
    session.preflight.iter_mut().for_each(bound_preflight);
    let replaced = session.last_replacement.as_mut().and_then(|replacement| replacement.finding.as_mut());
    session.finding.iter_mut().chain(replaced).for_each(bound_finding);
}

fn bound_preflight(preflight: &mut Preflight) {
    preflight.findings.truncate(MOST_FINDINGS);
    preflight.mounts.truncate(MOST_MOUNTS);
    preflight.findings.iter_mut().for_each(bound_finding);
}

fn bound_finding(finding: &mut Finding) {
    keep_end(&mut finding.message, MOST_TEXT);
    keep_end(&mut finding.remedy, MOST_TEXT);
}

/// Keeps the end of a text that is too long, behind `...` and the number of bytes that are left out.
fn keep_end(text: &mut String, most: usize) {
    if text.len() <= most {
        return;
    }
    let mut from = text.len() - most;
    while !text.is_char_boundary(from) {
        from += 1;
    }
    *text = format!("...({from} bytes){}", &text[from..]);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use virtiofs_client::fixtures::{endpoint, listening, session};
    use virtiofs_contract::staleness::{Cause, EVENT_PATH, EVENTS, StaleEvent};

    use super::*;

    #[test]
    fn long_text_keeps_its_end_and_says_what_is_missing() {
        let mut text = format!("{}é/name", "x".repeat(2000));
        keep_end(&mut text, 10);
        assert_eq!(text, "...(1997 bytes)xxxé/name");
        let mut short = "name".to_owned();
        keep_end(&mut short, 10);
        assert_eq!(short, "name");
    }

    /// Endpoints with that many sessions each, whose stale events have long names.
    fn endpoints(sessions: &[usize]) -> Vec<EndpointStatus> {
        let path = "\\u{1}".repeat(EVENT_PATH);
        let event = StaleEvent { sequence: 1, at_ms: 0, cause: Cause::SourceRemoved, path };
        let of = |(number, sessions): (usize, &usize)| {
            let name = format!("e{number:02}");
            let hostile =
                |it| SessionStatus { stale_events: vec![event.clone(); EVENTS], ..session(&format!("{name}-{it:04}")) };
            EndpointStatus { sessions: (0..*sessions).map(hostile).collect(), ..listening(endpoint(&name)) }
        };
        sessions.iter().enumerate().map(of).collect()
    }

    #[test]
    fn pages_have_every_session_once_and_a_bounded_size() {
        let all = endpoints(&[0, 40, 1, 100, 0, 3]);
        let mut seen: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let (mut after, mut pages) = (None, 0);
        loop {
            let mut page = Vec::new();
            let next = fill(all.clone(), after.as_ref(), &mut page);
            assert!(!page.is_empty());
            assert!(size(&page) < 2 * PAGE, "{}", size(&page));
            for endpoint in page {
                let ids = endpoint.sessions.into_iter().map(|session| session.id);
                seen.entry(endpoint.endpoint.name).or_default().extend(ids);
            }
            pages += 1;
            match next {
                Some(_) => after = next,
                None => break,
            }
        }
        assert!(pages > 1, "one page has it all");
        for endpoint in all {
            let expected: Vec<_> = endpoint.sessions.into_iter().map(|session| session.id).collect();
            assert_eq!(seen.remove(&endpoint.endpoint.name), Some(expected));
        }
        assert_eq!(seen, BTreeMap::new());
    }
}
