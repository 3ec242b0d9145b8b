//! The system calls of each operation, ours and stock's, as strace counts them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cases::{self, Case, Unit};
use crate::material::Material;
use crate::options::{Options, Peer};
use crate::system::System;

/// How long strace may take to attach to all threads.
const PATIENCE: Duration = Duration::from_secs(20);

/// Calls for each operation, by name.
type Calls = BTreeMap<String, f64>;

/// Counts and prints them for all cases that were asked for.
pub(crate) fn print(options: &Options, material: &Material, work: &Path) -> anyhow::Result<()> {
    // One request at a time: several share the calls that wait for the guest and notify it.
    let mut options = options.clone();
    options.depth = 1;
    let options = &options;
    let mut ours = System::start(&options.ours, "ours", material, work, options)?;
    let mut stock = System::start(&Peer::Stock(options.stock.clone()), "stock", material, work, options)?;
    println!("\nsystem calls for each operation, one request at a time\n");
    for case in cases::ALL.iter().filter(|case| case.unit != Unit::Bytes && options.wants(case.name)) {
        let of = |system: &mut System| count(case, system, options, &work.join("strace"));
        let (ours, stock) = (of(&mut ours).context(case.name)?, of(&mut stock).context(case.name)?);
        print_case(case.name, &ours, &stock);
    }
    Ok(())
}

fn print_case(name: &str, ours: &Calls, stock: &Calls) {
    let total = |calls: &Calls| calls.values().sum::<f64>();
    println!("{name:<28} {:>8} {:>8}", "ours", "stock");
    let names: std::collections::BTreeSet<_> = ours.keys().chain(stock.keys()).collect();
    for call in names {
        let of = |calls: &Calls| calls.get(call).copied().unwrap_or(0.0);
        // What happens once in a while is no part of the operation.
        if of(ours) >= 0.05 || of(stock) >= 0.05 {
            println!("  {call:<26} {:>8.2} {:>8.2}", of(ours), of(stock));
        }
    }
    println!("  {:<26} {:>8.2} {:>8.2}\n", "all", total(ours), total(stock));
}

fn count(case: &Case, system: &mut System, options: &Options, to: &Path) -> anyhow::Result<Calls> {
    // Until nothing is done for the first time any more.
    for _ in 0..3 {
        (case.slice)(system, options)?;
        system.forget_all()?;
    }
    let tracer = attach(&system.serving, to)?;
    let measured = (case.slice)(system, options);
    let counted = detach(tracer, to)?;
    let amount = measured?.amount;
    system.forget_all()?;
    Ok(counted.into_iter().map(|(name, calls)| (name, calls / amount)).collect())
}

fn attach(processes: &[i32], to: &Path) -> anyhow::Result<Child> {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-c", "-U", "calls,name", "-o"]).arg(to);
    for process in processes {
        strace.arg("-p").arg(process.to_string());
    }
    let mut tracer = strace.stderr(Stdio::null()).spawn().context("starting strace; --syscalls needs it")?;
    let deadline = Instant::now() + PATIENCE;
    while !processes.iter().all(|process| is_traced(*process)) {
        if let Some(status) = tracer.try_wait()? {
            bail!("strace ended with {status} before it was attached");
        }
        if Instant::now() > deadline {
            tracer.kill()?;
            bail!("strace is not attached after {PATIENCE:?}");
        }
        sleep(Duration::from_millis(10));
    }
    Ok(tracer)
}

/// True if all threads of a process are traced.
fn is_traced(process: i32) -> bool {
    let untraced = |thread: fs::DirEntry| {
        let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() == "0"))
    };
    fs::read_dir(format!("/proc/{process}/task")).is_ok_and(|threads| !threads.flatten().any(untraced))
}

fn detach(mut tracer: Child, to: &Path) -> anyhow::Result<Calls> {
    kill(Pid::from_raw(tracer.id() as i32), Signal::SIGINT)?;
    tracer.wait()?;
    Ok(parse(&fs::read_to_string(to).context("what strace counted")?))
}

/// Lines of a number and a name; the last one is the total.
fn parse(summary: &str) -> Calls {
    let counted = summary.lines().filter_map(|line| {
        let (calls, name) = line.trim().split_once(char::is_whitespace)?;
        Some((name.trim().to_owned(), calls.parse().ok()?))
    });
    counted.filter(|(name, _)| name != "total").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_of_strace_is_read() {
        let summary = "    calls syscall\n--------- ----------------\n      420 statx\n        7 close\n\
                       --------- ----------------\n      427 total\n";
        assert_eq!(parse(summary), Calls::from([("statx".into(), 420.0), ("close".into(), 7.0)]));
    }
}
