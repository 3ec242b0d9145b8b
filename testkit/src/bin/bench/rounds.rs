//! Interleaved rounds and their medians.

use testkit::fuse::call::CallError;

use crate::cases::{Case, Unit};
use crate::contestant::Contestant;
use crate::drive::Measured;
use crate::options::Options;

/// Where the two contestants stand in one figure.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    /// Median of ours.
    pub(crate) value: f64,
    /// Median of stock.
    pub(crate) peer: f64,
    /// Median of the rounds' ratios.
    pub(crate) ratio: f64,
    /// Quartiles of the rounds' ratios.
    pub(crate) spread: (f64, f64),
}

/// Runs one figure.
pub(crate) fn run(
    case: &Case,
    ours: &mut Contestant,
    stock: &mut Contestant,
    options: &Options,
) -> anyhow::Result<Line> {
    // Once for nothing: caches, page faults of guest memory, growth of tables.
    slice(case, ours, options)?;
    slice(case, stock, options)?;
    let count = options.rounds * case.rounds;
    let mut rounds = Vec::with_capacity(count);
    for round in 0..count {
        // Who goes first changes, so that a drift of the machine favours neither.
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

fn slice(case: &Case, contestant: &mut Contestant, options: &Options) -> anyhow::Result<f64> {
    let measured: Result<Measured, CallError> = (case.slice)(contestant, options);
    let measured = measured?;
    contestant.settle()?;
    Ok(measured.per_second())
}

fn line(case: &Case, rounds: &[(f64, f64)]) -> Line {
    let ratios = sorted(rounds.iter().map(|(ours, stock)| ours / stock));
    let (unit, scale) = match case.unit {
        Unit::Operations => ("ops/s", 1.0),
        Unit::Names => ("names/s", 1.0),
        Unit::Bytes => ("MiB/s", 1.0 / (1 << 20) as f64),
    };
    Line {
        name: case.name,
        unit,
        value: quantile(&sorted(rounds.iter().map(|round| round.0)), 0.5) * scale,
        peer: quantile(&sorted(rounds.iter().map(|round| round.1)), 0.5) * scale,
        ratio: quantile(&ratios, 0.5),
        spread: (quantile(&ratios, 0.25), quantile(&ratios, 0.75)),
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Between the two values nearest to it.
fn quantile(sorted: &[f64], at: f64) -> f64 {
    let position = at * (sorted.len().saturating_sub(1)) as f64;
    let (low, high) = (position.floor() as usize, position.ceil() as usize);
    match (sorted.get(low), sorted.get(high)) {
        (Some(low), Some(high)) => low + (high - low) * position.fract(),
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_values() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0], 0.5), 1.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25), 2.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn the_ratio_is_the_median_of_the_rounds() {
        let case = &crate::cases::ALL[0];
        let line = line(case, &[(1.0, 1.0), (2.0, 4.0), (9.0, 10.0)]);
        assert_eq!((line.value, line.peer, line.ratio), (2.0, 4.0, 0.9));
    }
}
