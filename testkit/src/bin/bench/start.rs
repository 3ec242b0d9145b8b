//! `virtiofsd-live` beside stock virtiofsd, as tools start them: time until a guest can use them, and their memory.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context;
use testkit::fuse::wire::ROOT;
use testkit::guest::{Guest, GuestConfig};
use testkit::processes::proportional_memory;
use testkit::server::{Server, ServerCommand};

use crate::figure::{Figure, Target, millis};
use crate::material::Material;
use crate::options::Options;
use crate::quantiles::{quantile, sorted};
use crate::report::print_section;

/// Target: at most this multiple of stock's time and memory.
const TARGET: f64 = 1.5;
/// Time after the first answer, in which all processes of either have started.
const SETTLED: Duration = Duration::from_millis(500);

/// One start.
struct Start {
    /// Milliseconds until the socket listens.
    listens: f64,
    /// Milliseconds until a guest has mounted and its first lookup is answered.
    answers: f64,
    /// MiB of all processes; shared pages count in proportion.
    memory: f64,
}

/// The figures: medians of starts, which alternate.
pub(crate) fn measure(options: &Options, material: &Material, work: &Path) -> anyhow::Result<Vec<Figure>> {
    let once = |program: &Path, label: &str| {
        start(program, material, &work.join(format!("{label}.sock")), options).with_context(|| label.to_owned())
    };
    let rounds = options.rounds.div_ceil(2);
    let rounds = (0..rounds).map(|_| Ok((once(&options.live, "start-live")?, once(&options.stock, "start-stock")?)));
    let rounds = rounds.collect::<anyhow::Result<Vec<_>>>()?;
    let figure = |name: &str, unit, of: fn(&Start) -> f64| {
        let value = quantile(&sorted(rounds.iter().map(|round| of(&round.0))), 0.5);
        let peer = quantile(&sorted(rounds.iter().map(|round| of(&round.1))), 0.5);
        Figure::alone(name.into(), value, unit).beside(Some(peer)).with_target(Target::RatioAtMost(TARGET))
    };
    let figures = vec![
        figure("start-listens", "ms", |start| start.listens),
        figure("start-answers", "ms", |start| start.answers),
        figure("start-memory", "MiB", |start| start.memory),
    ];
    print_section(
        "virtiofsd-live: from its start to its socket and to the first answer; memory",
        "stock 1.14",
        &figures,
    );
    Ok(figures)
}

fn start(program: &Path, material: &Material, socket: &Path, options: &Options) -> anyhow::Result<Start> {
    let command = ServerCommand::stock(program, &material.share, socket).log(options.log("start"));
    let begin = Instant::now();
    let server = Server::start(&command)?;
    let listens = begin.elapsed();
    let guest = Guest::boot(GuestConfig::new(server.socket()).small())?;
    guest.fuse().lookup(ROOT, "few")?;
    let answers = begin.elapsed();
    sleep(SETTLED);
    let memory = proportional_memory(server.pid())? as f64 / f64::from(1 << 20);
    drop(guest);
    Ok(Start { listens: millis(listens), answers: millis(answers), memory })
}
