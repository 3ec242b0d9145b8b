//! The command line of the chaos harness.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;

use crate::plan::Event;

/// Kills brokers, keepers and engines, and replaces engines, under a random workload.
#[derive(Debug, clap::Parser)]
pub(crate) struct Arguments {
    /// Number of events.
    #[arg(long, default_value_t = 4000)]
    pub(crate) events: usize,
    /// Kinds of events [default: all].
    #[arg(long, value_delimiter = ',')]
    only: Vec<Event>,
    /// Seed of all randomness.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Number of guests on the share; one run for each value.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    pub(crate) guests: Vec<usize>,
    /// Number of lanes of the workload in each guest.
    #[arg(long, default_value_t = 2)]
    pub(crate) lanes: usize,
    /// Maximum time between two events, in milliseconds.
    #[arg(long, default_value_t = 60)]
    every: u64,
    /// Directory for logs and the lanes' steps.
    #[arg(long, value_name = "DIR", default_value = "target/chaos")]
    pub(crate) directory: PathBuf,
    /// Write each step of each lane to a file.
    #[arg(long)]
    pub(crate) trace: bool,
    /// Directory of broker, keeper and engine [default: that of this program].
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
}

impl Arguments {
    pub(crate) fn pause(&self) -> std::ops::RangeInclusive<Duration> {
        Duration::ZERO..=Duration::from_millis(self.every)
    }

    pub(crate) fn kinds(&self) -> &[Event] {
        if self.only.is_empty() { Event::value_variants() } else { &self.only }
    }

    pub(crate) fn programs(&self) -> anyhow::Result<PathBuf> {
        let own = std::env::current_exe().context("locating this program")?;
        let beside = own.parent().context("locating the directory of this program")?.to_owned();
        let programs = self.programs.clone().unwrap_or(beside);
        for program in ["virtiofs-broker", "virtiofs-keeper", "virtiofs-engine"] {
            if !programs.join(program).is_file() {
                bail!(
                    "{program} is not in {}; run `make build` and use target/release, or name another directory with --programs",
                    programs.display()
                );
            }
        }
        Ok(programs)
    }
}
