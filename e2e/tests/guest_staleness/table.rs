//! What the guest saw beside what was counted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Result, ensure};
use virtiofs_contract::control::SessionStatus;
use virtiofs_contract::staleness::StaleEvent;

use crate::cells::{Look, Loud, Mode, Quiet, would};

/// What of a cell hurts a guest: an error, or contents that are not there any more.
fn hurts(seen: &str) -> bool {
    seen == "Stale file handle" || seen == "old"
}

#[derive(Default)]
pub(crate) struct Table {
    /// By row, then by mode.
    rows: Vec<(String, Vec<String>)>,
    hits: u32,
    misses: Vec<String>,
    false_alarms: Vec<String>,
    quiet: u32,
    modes: Vec<String>,
}

impl Table {
    /// A cell in which nothing is to be counted.
    pub(crate) fn quiet(&mut self, mode: &Mode, cell: &Quiet, events: &[StaleEvent]) {
        let counted: Vec<_> = events.iter().filter(|event| event.path.starts_with(cell.directory)).collect();
        match counted.as_slice() {
            [] => self.quiet += 1,
            events => self.false_alarms.push(format!("{}, {}: {events:?}", cell.what, mode.share)),
        }
        self.note(cell.what, mode, if counted.is_empty() { "nothing".into() } else { format!("{counted:?}") });
    }

    /// A cell in which the host has done something to the guest.
    pub(crate) fn loud(&mut self, mode: &Mode, cell: &Loud, seen: &BTreeMap<String, String>, events: &[StaleEvent]) {
        let look = |what: &str| seen.get(what).map_or("?", String::as_str);
        let (directly, on_overlayfs) = match cell.look {
            Look::Merged => (None, look(cell.what)),
            Look::Direct | Look::Open => (Some(look(cell.what)), look(&would(cell))),
        };
        let causes: BTreeSet<_> = events.iter().filter(|event| cell.is_about(&event.path)).map(|it| it.cause).collect();
        match (hurts(on_overlayfs) || directly.is_some_and(hurts), causes.is_empty()) {
            (true, false) => self.hits += 1,
            (true, true) => self.misses.push(format!("{}, {}: {on_overlayfs}", cell.what, mode.share)),
            (false, false) => {
                self.false_alarms.push(format!("{}, {}: {on_overlayfs}, {causes:?}", cell.what, mode.share))
            }
            (false, true) => self.quiet += 1,
        }
        let guest = match directly {
            Some(directly) => format!("{} (overlayfs: {})", word(directly), word(on_overlayfs)),
            None => word(on_overlayfs).to_owned(),
        };
        let causes: Vec<_> = causes.iter().map(|cause| cause.name()).collect();
        self.note(
            cell.what,
            mode,
            format!("{guest}; {}", if causes.is_empty() { "-".into() } else { causes.join(", ") }),
        );
    }

    /// Each name is an event once, and every event is among the last ones.
    pub(crate) fn once(&mut self, mode: &Mode, session: &SessionStatus) -> Result<()> {
        let paths: BTreeSet<_> = session.stale_events.iter().map(|event| &event.path).collect();
        let counted: u64 = session.totals.stale.iter().map(|total| total.events).sum();
        let events = session.stale_events.len();
        ensure!(
            paths.len() == events && counted == events as u64,
            "{}: {counted} events were counted, of {} names: {:#?}",
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
    pub(crate) fn verdict(&self) -> Result<()> {
        ensure!(self.misses.is_empty(), "missed:\n{}", self.misses.join("\n"));
        ensure!(self.false_alarms.is_empty(), "false alarms:\n{}", self.false_alarms.join("\n"));
        ensure!(self.hits > 0, "the guest was never hurt: what was to be seen?");
        Ok(())
    }
}

fn word(seen: &str) -> &str {
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
            self.quiet
        )
    }
}
