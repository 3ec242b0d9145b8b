//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};

/// Kills and exchanges engines under a random workload.
#[derive(Debug, clap::Parser)]
pub(crate) struct Arguments {
    /// SIGKILLs that guests have to survive.
    #[arg(long, default_value_t = 2000)]
    pub(crate) kills: u64,
    /// Hand-overs that guests have to survive.
    #[arg(long, default_value_t = 2000)]
    pub(crate) handovers: u64,
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
    pub(crate) every: u64,
    /// Where logs and the lanes' steps go.
    #[arg(long, value_name = "DIR", default_value = "target/chaos")]
    pub(crate) directory: PathBuf,
    /// Write each step of each lane to a file.
    #[arg(long)]
    pub(crate) trace: bool,
    /// Our broker; else the one beside this program.
    #[arg(long, value_name = "PATH")]
    broker: Option<PathBuf>,
}

impl Arguments {
    pub(crate) fn every(&self) -> std::ops::RangeInclusive<Duration> {
        Duration::ZERO..=Duration::from_millis(self.every)
    }

    pub(crate) fn broker(&self) -> anyhow::Result<PathBuf> {
        let beside = std::env::current_exe().context("the path of this program")?.with_file_name("virtiofs-broker");
        let broker = self.broker.clone().unwrap_or(beside);
        if !broker.is_file() {
            bail!("there is no broker at {}; make build puts it there, --broker names another", broker.display());
        }
        Ok(broker)
    }
}
