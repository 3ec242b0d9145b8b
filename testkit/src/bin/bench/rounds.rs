//! Interleaved rounds and their medians.

use testkit::fuse::call::CallError;

use crate::cases::{Case, Unit};
use crate::cpu::cpu_time;
use crate::drive::Measured;
use crate::figure::{Figure, Target};
use crate::options::Options;
use crate::quantiles::{quantile, sorted};
use crate::system::System;

/// Result of both systems in one case.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    /// Medians of both systems, and of the rounds' ratios.
    pub(crate) figure: Figure,
    /// Quartiles of the rounds' ratios.
    pub(crate) spread: (f64, f64),
    /// Processor time of the servers for one operation, or one MiB.
    pub(crate) cpu: Figure,
}

/// What one system did in one round.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Slice {
    /// Operations, or bytes, a second.
    rate: f64,
    /// Seconds of processor time for each of them.
    cpu: f64,
}

/// Runs one case.
pub(crate) fn run(case: &Case, ours: &mut System, stock: &mut System, options: &Options) -> anyhow::Result<Line> {
    // A warm-up: caches, page faults of guest memory, growth of tables.
    slice(case, ours, options)?;
    slice(case, stock, options)?;
    let count = options.rounds * case.rounds;
    let mut rounds = Vec::with_capacity(count);
    for round in 0..count {
        // The order alternates, so that a drift of the machine favours neither.
        rounds.push(if round % 2 == 0 {
            let first = slice(case, ours, options)?;
            (first, slice(case, stock, options)?)
        } else {
            let first = slice(case, stock, options)?;
            (slice(case, ours, options)?, first)
        });
    }
    Ok(line(case, &rounds))
}

fn slice(case: &Case, system: &mut System, options: &Options) -> anyhow::Result<Slice> {
    let before = cpu_time(&system.serving);
    let measured: Result<Measured, CallError> = (case.slice)(system, options);
    let measured = measured?;
    let cpu = cpu_time(&system.serving).saturating_sub(before).as_secs_f64() / measured.amount;
    system.forget_all()?;
    Ok(Slice { rate: measured.per_second(), cpu })
}

fn line(case: &Case, rounds: &[(Slice, Slice)]) -> Line {
    let ratios = sorted(rounds.iter().map(|(ours, stock)| ours.rate / stock.rate));
    let (unit, scale) = match case.unit {
        Unit::Operations => ("ops/s", 1.0),
        Unit::Names => ("names/s", 1.0),
        Unit::Bytes => ("MiB/s", 1.0 / (1 << 20) as f64),
    };
    let figure = Figure {
        name: case.name.into(),
        unit,
        value: quantile(&sorted(rounds.iter().map(|round| round.0.rate)), 0.5) * scale,
        peer: Some(quantile(&sorted(rounds.iter().map(|round| round.1.rate)), 0.5) * scale),
        ratio: Some(quantile(&ratios, 0.5)),
        target: Some(Target::Ratio(case.target)),
    };
    Line { figure, spread: (quantile(&ratios, 0.25), quantile(&ratios, 0.75)), cpu: cpu(case, rounds) }
}

fn cpu(case: &Case, rounds: &[(Slice, Slice)]) -> Figure {
    let (unit, scale) = match case.unit {
        Unit::Operations => ("us/op", 1e6),
        Unit::Names => ("us/name", 1e6),
        Unit::Bytes => ("us/MiB", 1e6 * f64::from(1 << 20)),
    };
    let median = |of: fn(&(Slice, Slice)) -> f64| quantile(&sorted(rounds.iter().map(of)), 0.5) * scale;
    Figure::alone(format!("{}-cpu", case.name), median(|round| round.0.cpu), unit)
        .beside(Some(median(|round| round.1.cpu)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_the_median_of_the_rounds() {
        let case = &crate::cases::ALL[0];
        let slice = |rate| Slice { rate, cpu: 2e-6 / rate };
        let rounds = [(1.0, 1.0), (2.0, 4.0), (9.0, 10.0)].map(|(ours, stock)| (slice(ours), slice(stock)));
        let line = line(case, &rounds);
        let figure = line.figure;
        assert_eq!((figure.value, figure.peer, figure.ratio), (2.0, Some(4.0), Some(0.9)));
        assert_eq!((line.cpu.value, line.cpu.peer, line.cpu.unit), (1.0, Some(0.5), "us/op"));
    }
}
