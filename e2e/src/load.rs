//! Load programs in a guest, and the errors that the guest counts.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::guest::Guest;

/// Time limit for the load's current round after the request to stop.
const LAST_ROUND: Duration = Duration::from_secs(90);

/// Arguments of `guest-load`; all paths are paths in the guest.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// A tree that it walks and reads, comparing content.
    pub read: Option<String>,
    /// A file with a list of files that it reads, comparing content.
    pub list: Option<String>,
    /// Number of files of either that it reads in one round; `None` for all.
    pub most: Option<u32>,
    /// A directory in which it creates and removes files and directories.
    pub write: Option<String>,
    /// A directory in which it writes sparse files and copies them by their holes (SEEK_HOLE) before they are closed.
    pub sparse: Option<String>,
}

impl Load {
    /// A load that walks and reads.
    pub fn reading(directory: &str) -> Self {
        Self { read: Some(directory.to_owned()), ..Self::default() }
    }

    /// A load that only reads the files listed in a file of the guest.
    pub fn listed(list: &str) -> Self {
        Self { list: Some(list.to_owned()), ..Self::default() }
    }

    /// A load that creates, changes and removes files.
    pub fn writing(directory: &str) -> Self {
        Self { write: Some(directory.to_owned()), ..Self::default() }
    }

    /// A load that writes sparse files and copies them by their holes before they are closed.
    pub fn copying_by_holes(directory: &str) -> Self {
        Self { sparse: Some(directory.to_owned()), ..Self::default() }
    }

    /// Also walks and reads this directory.
    #[must_use]
    pub fn and_reading(self, directory: &str) -> Self {
        Self { read: Some(directory.to_owned()), ..self }
    }

    /// Reads at most this number of files in one round.
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

/// What the guest counted.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Summary {
    /// Rounds of the load.
    pub rounds: u64,
    /// Operations, including failed ones.
    pub operations: u64,
    /// Failed operations by errno.
    pub errors: BTreeMap<String, u64>,
    /// Wrong contents or results of operations that did not fail.
    pub wrong: u64,
    /// The first few failures as text.
    pub details: Vec<String>,
    /// The slowest operation, in microseconds.
    pub slowest_us: u64,
}

impl Summary {
    /// Number of failed operations.
    pub fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }

    /// Fails unless the guest did operations without any error or wrong result.
    ///
    /// # Errors
    /// If the guest counted an error or did nothing; the message has its first few failures.
    pub fn must_be_clean(&self) -> Result<()> {
        ensure!(self.operations > 0, "the guest did no operation");
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
    /// Runs a load for this number of rounds.
    ///
    /// # Errors
    /// If the load cannot run. Errors that the load met are in the summary.
    pub fn work(&mut self, load: &Load, rounds: u64) -> Result<Summary> {
        let line = self.must(&format!("{} --rounds {rounds}", load.command()))?;
        summary(&line)
    }

    /// Starts a load in the background.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_work(&mut self, load: &Load) -> Result<Running> {
        let number = self.next_load();
        let command = load.command();
        self.must(&format!(
            "( {command} --until /run/stop-{number} >/run/load-{number} 2>&1; touch /run/ended-{number} ) &"
        ))?;
        Ok(Running { number })
    }

    /// Stops a load after its current round, and returns what it counted.
    ///
    /// # Errors
    /// If it does not end, or ends without a summary.
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
        bail!("the load in the guest failed: {line}");
    }
    serde_json::from_str(line).with_context(|| format!("malformed summary of the guest: {line}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_becomes_a_command_line() {
        let load = Load::writing("/mnt/a").and_reading("/mnt/b").at_most(5);
        assert_eq!(load.command(), "guest-load --read /mnt/b --most 5 --write /mnt/a");
        assert_eq!(Load::listed("/run/list").command(), "guest-load --list /run/list");
    }

    #[test]
    fn errors_make_a_summary_unclean_and_are_named() {
        let line = r#"{"rounds":1,"operations":9,"errors":{"ESTALE":2},"wrong":1,"details":["read /x: ESTALE"],"slowest_us":5}"#;
        let problem = summary(line).unwrap().must_be_clean().unwrap_err().to_string();
        assert!(problem.contains("ESTALE") && problem.contains("read /x"), "{problem}");
    }

    #[test]
    fn a_failed_load_is_an_error() {
        let problem = summary("guest-load: /mnt/a: Stale file handle\n").unwrap_err().to_string();
        assert!(problem.contains("Stale file handle"), "{problem}");
    }
}
