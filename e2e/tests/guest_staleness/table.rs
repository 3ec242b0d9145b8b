//! Table of what the guest saw and what the broker counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Result, ensure};
use virtiofs_contract::control::SessionStatus;
use virtiofs_contract::staleness::StaleEvent;

use crate::cells::{GuestAction, HostChange, Mode, View, on_overlayfs};

/// True if the guest sees an error or outdated content.
fn is_affected(seen: &str) -> bool {
    seen == "Stale file handle" || seen == "old"
}

#[derive(Default)]
pub(crate) struct Table {
    /// Cells of each mode, by row.
    rows: Vec<(String, Vec<String>)>,
    hits: u32,
    misses: Vec<String>,
    false_alarms: Vec<String>,
    correctly_uncounted: u32,
    modes: Vec<String>,
}

impl Table {
    /// Adds an action of the guest, for which nothing may be counted.
    pub(crate) fn add_guest_action(&mut self, mode: &Mode, cell: &GuestAction, events: &[StaleEvent]) {
        let counted: Vec<_> = events.iter().filter(|event| event.path.starts_with(cell.directory)).collect();
        match counted.as_slice() {
            [] => self.correctly_uncounted += 1,
            events => self.false_alarms.push(format!("{}, {}: {events:?}", cell.what, mode.share)),
        }
        self.note(cell.what, mode, if counted.is_empty() { "nothing".into() } else { format!("{counted:?}") });
    }

    /// Adds a change by the host.
    pub(crate) fn add_host_change(
        &mut self,
        mode: &Mode,
        cell: &HostChange,
        seen: &BTreeMap<String, String>,
        events: &[StaleEvent],
    ) {
        let seen_at = |what: &str| seen.get(what).map_or("?", String::as_str);
        let (directly, on_overlayfs) = match cell.view {
            View::Merged => (None, seen_at(cell.what)),
            View::Direct | View::Open => (Some(seen_at(cell.what)), seen_at(&on_overlayfs(cell))),
        };
        let causes: BTreeSet<_> = events.iter().filter(|event| cell.is_about(&event.path)).map(|it| it.cause).collect();
        match (is_affected(on_overlayfs) || directly.is_some_and(is_affected), causes.is_empty()) {
            (true, false) => self.hits += 1,
            (true, true) => self.misses.push(format!("{}, {}: {on_overlayfs}", cell.what, mode.share)),
            (false, false) => {
                self.false_alarms.push(format!("{}, {}: {on_overlayfs}, {causes:?}", cell.what, mode.share))
            }
            (false, true) => self.correctly_uncounted += 1,
        }
        let guest = match directly {
            Some(directly) => format!("{} (overlayfs: {})", label(directly), label(on_overlayfs)),
            None => label(on_overlayfs).to_owned(),
        };
        let causes: Vec<_> = causes.iter().map(|cause| cause.name()).collect();
        self.note(
            cell.what,
            mode,
            format!("{guest}; {}", if causes.is_empty() { "-".into() } else { causes.join(", ") }),
        );
    }

    /// Checks that each name is counted once, and that every event is among the last ones.
    pub(crate) fn check_counted_once(&mut self, mode: &Mode, session: &SessionStatus) -> Result<()> {
        let paths: BTreeSet<_> = session.stale_events.iter().map(|event| &event.path).collect();
        let counted: u64 = session.totals.stale.iter().map(|total| total.events).sum();
        let events = session.stale_events.len();
        ensure!(
            paths.len() == events && counted == events as u64,
            "{}: {counted} events were counted for {} names: {:#?}",
            mode.share,
            paths.len(),
            session.stale_events
        );
        Ok(())
    }

    fn note(&mut self, row: &str, mode: &Mode, text: String) {
        if !self.modes.contains(&mode.share) {
            self.modes.push(mode.share.clone());
        }
        match self.rows.iter_mut().find(|(known, _)| known == row) {
            Some((_, cells)) => cells.push(text),
            None => self.rows.push((row.to_owned(), vec![text])),
        }
    }

    /// Fails unless detector and guest agree in every cell.
    pub(crate) fn check(&self) -> Result<()> {
        ensure!(self.misses.is_empty(), "missed:\n{}", self.misses.join("\n"));
        ensure!(self.false_alarms.is_empty(), "false alarms:\n{}", self.false_alarms.join("\n"));
        ensure!(self.hits > 0, "no change affected the guest, so the test shows nothing");
        Ok(())
    }
}

fn label(seen: &str) -> &str {
    match seen {
        "Stale file handle" => "ESTALE",
        "old" => "old content",
        "new" => "new content",
        "No such file or directory" => "ENOENT",
        other => other,
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| | {} |\n|---{}|", self.modes.join(" | "), "|---".repeat(self.modes.len()))?;
        for (row, cells) in &self.rows {
            writeln!(f, "| {row} | {} |", cells.join(" | "))?;
        }
        write!(
            f,
            "\n{} hits, {} misses, {} false alarms, {} cells with nothing to count and nothing counted",
            self.hits,
            self.misses.len(),
            self.false_alarms.len(),
            self.correctly_uncounted
        )
    }
}
