//! Work for a guest, and the guest's own count of what went wrong with it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::guest::Guest;

/// A load runs on past the request to stop by at most one round.
const LAST_ROUND: Duration = Duration::from_secs(90);

/// What `guest-load` is to work on, by paths in the guest.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// A tree it walks and reads, comparing content.
    pub read: Option<String>,
    /// A file with paths of files that it reads, comparing content.
    pub list: Option<String>,
    /// How many files of either are read in one round; all when nothing is said.
    pub most: Option<u32>,
    /// A directory it makes and removes files and directories in.
    pub write: Option<String>,
    /// A directory it writes files with holes in, and copies them by their holes before they are closed.
    pub sparse: Option<String>,
}

impl Load {
    /// A load that walks and reads.
    pub fn reading(directory: &str) -> Self {
        Self { read: Some(directory.to_owned()), ..Self::default() }
    }

    /// A load that reads the files whose paths stand in a file of the guest's, and looks at nothing else.
    pub fn listed(list: &str) -> Self {
        Self { list: Some(list.to_owned()), ..Self::default() }
    }

    /// A load that changes things.
    pub fn writing(directory: &str) -> Self {
        Self { write: Some(directory.to_owned()), ..Self::default() }
    }

    /// A load that writes files with holes and copies them by their holes before they are closed.
    pub fn copying_by_holes(directory: &str) -> Self {
        Self { sparse: Some(directory.to_owned()), ..Self::default() }
    }

    /// The same, walking and reading this directory as well.
    #[must_use]
    pub fn and_reading(self, directory: &str) -> Self {
        Self { read: Some(directory.to_owned()), ..self }
    }

    /// The same, reading at most so many files in one round.
    #[must_use]
    pub fn at_most(self, files: u32) -> Self {
        Self { most: Some(files), ..self }
    }

    fn command(&self) -> String {
        let most = self.most.map(|files| files.to_string());
        let options = [
            ("read", &self.read),
            ("list", &self.list),
            ("most", &most),
            ("write", &self.write),
            ("sparse", &self.sparse),
        ];
        options
            .iter()
            .filter_map(|(name, value)| Some((name, value.as_ref()?)))
            .fold("guest-load".to_owned(), |command, (name, value)| format!("{command} --{name} {value}"))
    }
}

/// The guest's count.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Summary {
    /// Rounds of the load.
    pub rounds: u64,
    /// Operations done, failed ones included.
    pub operations: u64,
    /// Failed operations by errno.
    pub errors: BTreeMap<String, u64>,
    /// Contents and outcomes that were wrong although no call failed.
    pub wrong: u64,
    /// The first few failures in words.
    pub details: Vec<String>,
    /// The longest any one operation took, in microseconds.
    pub slowest_us: u64,
}

impl Summary {
    /// Failed operations of every kind.
    pub fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Fails unless the guest worked and nothing went wrong for it.
    ///
    /// # Errors
    /// With the guest's first few failures.
    pub fn must_be_clean(&self) -> Result<()> {
        ensure!(self.operations > 0, "the guest did nothing at all");
        ensure!(
            self.error_count() == 0 && self.wrong == 0,
            "the guest counted errors {:?} and {} wrong results in {} operations:\n{}",
            self.errors,
            self.wrong,
            self.operations,
            self.details.join("\n")
        );
        Ok(())
    }
}

/// A load that runs in the guest until it is stopped.
#[derive(Debug)]
pub struct Running {
    number: u32,
}

impl Guest {
    /// Runs a load for so many rounds.
    ///
    /// # Errors
    /// When the load cannot be run; errors *it* met are in the summary.
    pub fn work(&mut self, load: &Load, rounds: u64) -> Result<Summary> {
        let line = self.must(&format!("{} --rounds {rounds}", load.command()))?;
        summary(&line)
    }

    /// Starts a load in the background.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_work(&mut self, load: &Load) -> Result<Running> {
        let number = self.next_load();
        let command = load.command();
        self.must(&format!(
            "( {command} --until /run/stop-{number} >/run/load-{number} 2>&1; touch /run/ended-{number} ) &"
        ))?;
        Ok(Running { number })
    }

    /// Stops a load after the round it is in, and returns what it counted.
    ///
    /// # Errors
    /// When it does not end, or ended without a summary.
    pub fn stop_work(&mut self, running: Running) -> Result<Summary> {
        let (number, tenths) = (running.number, LAST_ROUND.as_millis() / 100);
        let line = self.must(&format!(
            "touch /run/stop-{number}; for i in $(seq {tenths}); do \
             [ -e /run/ended-{number} ] && exec cat /run/load-{number}; sleep 0.1; done; echo the load did not end >&2; exit 1"
        ))?;
        summary(&line)
    }
}

fn summary(line: &str) -> Result<Summary> {
    let line = line.trim();
    if !line.starts_with('{') {
        bail!("the load in the guest could not work: {line}");
    }
    serde_json::from_str(line).with_context(|| format!("the guest's summary is not one: {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_becomes_the_command_line_the_guest_understands() {
        let load = Load::writing("/mnt/a").and_reading("/mnt/b").at_most(5);
        assert_eq!(load.command(), "guest-load --read /mnt/b --most 5 --write /mnt/a");
        assert_eq!(Load::listed("/run/list").command(), "guest-load --list /run/list");
    }

    #[test]
    fn a_summary_with_errors_is_not_clean_and_says_which() {
        let line = r#"{"rounds":1,"operations":9,"errors":{"ESTALE":2},"wrong":1,"details":["read /x: ESTALE"],"slowest_us":5}"#;
        let problem = summary(line).unwrap().must_be_clean().unwrap_err().to_string();
        assert!(problem.contains("ESTALE") && problem.contains("read /x"), "{problem}");
    }

    #[test]
    fn a_load_that_could_not_work_is_an_error() {
        let problem = summary("guest-load: /mnt/a: Stale file handle\n").unwrap_err().to_string();
        assert!(problem.contains("Stale file handle"), "{problem}");
    }
}
