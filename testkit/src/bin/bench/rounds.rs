//! Interleaved rounds and their medians.

use testkit::fuse::call::CallError;

use crate::cases::{Case, Unit};
use crate::contestant::Contestant;
use crate::drive::Measured;
use crate::figure::{Aim, Figure};
use crate::options::Options;
use crate::quantiles::{quantile, sorted};

/// Where the two contestants stand in one figure.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    /// Medians of both, and of the rounds' ratios.
    pub(crate) figure: Figure,
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
    let figure = Figure {
        name: case.name.into(),
        unit,
        value: quantile(&sorted(rounds.iter().map(|round| round.0)), 0.5) * scale,
        peer: Some(quantile(&sorted(rounds.iter().map(|round| round.1)), 0.5) * scale),
        ratio: Some(quantile(&ratios, 0.5)),
        aim: Some(Aim::Ratio(case.aim)),
    };
    Line { figure, spread: (quantile(&ratios, 0.25), quantile(&ratios, 0.75)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_the_median_of_the_rounds() {
        let case = &crate::cases::ALL[0];
        let figure = line(case, &[(1.0, 1.0), (2.0, 4.0), (9.0, 10.0)]).figure;
        assert_eq!((figure.value, figure.peer, figure.ratio), (2.0, Some(4.0), Some(0.9)));
    }
}
