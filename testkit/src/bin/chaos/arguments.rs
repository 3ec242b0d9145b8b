//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;

use crate::plan::Event;

/// Kills brokers, keepers and engines, and replaces engines, under a random workload.
#[derive(Debug, clap::Parser)]
pub(crate) struct Arguments {
    /// Events that guests have to survive.
    #[arg(long, default_value_t = 4000)]
    pub(crate) events: usize,
    /// Kinds of events [default: all].
    #[arg(long, value_delimiter = ',')]
    only: Vec<Event>,
    /// Where all randomness grows from.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Guests on the one share; one run for each number.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    pub(crate) guests: Vec<usize>,
    /// Lanes of the workload in each guest.
    #[arg(long, default_value_t = 2)]
    pub(crate) lanes: usize,
    /// Most milliseconds between two events.
    #[arg(long, default_value_t = 60)]
    every: u64,
    /// Where logs and the lanes' steps go.
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
        let own = std::env::current_exe().context("the path of this program")?;
        let beside = own.parent().context("the directory of this program")?.to_owned();
        let programs = self.programs.clone().unwrap_or(beside);
        for program in ["virtiofs-broker", "virtiofs-keeper", "virtiofs-engine"] {
            if !programs.join(program).is_file() {
                bail!(
                    "{program} is not in {}; make build puts it into target/release, --programs names another directory",
                    programs.display()
                );
            }
        }
        Ok(programs)
    }
}
