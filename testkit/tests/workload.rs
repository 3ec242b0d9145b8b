//! Workloads against stock virtiofsd: shows that the model is correct.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::Stock;
use testkit::guest::{Guest, GuestConfig};
use testkit::model::RenameHow;
use testkit::processes::Holdings;
use testkit::workload::op::{Access, Fill};
use testkit::workload::{Config, Limit, Op, SharedPart, Workload};

/// The seed of the run. A failed run prints it; TESTKIT_SEED repeats the run.
fn seed() -> u64 {
    match std::env::var("TESTKIT_SEED") {
        Ok(seed) => seed.parse().expect("TESTKIT_SEED is a number"),
        Err(_) => 20_260_101,
    }
}

#[test]
fn a_random_workload_is_clean_and_leaks_nothing() {
    let mut stock = Stock::start(&[]);
    let guest = stock.guest();
    let part = SharedPart::new(seed(), 20, 100_000);
    part.create(&stock.share()).unwrap();
    let before = Holdings::of_tree(stock.server().pid()).unwrap();
    let config = Config::new(seed()).lanes(4).host(stock.share()).shared(part);
    let mut workload = Workload::start(config, &[guest.fuse()]);
    workload.run(Limit::steps(5_000));
    let report = workload.finish();
    println!("{report}");
    assert!(report.is_clean(), "{report}");
    assert_eq!(guest.violations(), []);
    let after = Holdings::of_tree(stock.server().pid()).unwrap();
    assert!(after.leaked_since(&before).is_empty(), "{:?}", after.leaked_since(&before));
}

#[test]
fn two_guests_work_on_one_share() {
    let first = Stock::start(&[]);
    let second = Stock::beside(&first);
    let part = SharedPart::new(seed(), 20, 100_000);
    part.create(&first.share()).unwrap();
    let guests = [first.guest(), second.guest()];
    let config = Config::new(seed() + 1).lanes(2).host(first.share()).shared(part);
    let mut workload = Workload::start(config, &[guests[0].fuse(), guests[1].fuse()]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            std::thread::sleep(Duration::from_millis(500));
            stop.store(true, Ordering::Relaxed);
        });
        workload.run(Limit::until(&stop));
    });
    let report = workload.finish();
    assert!(report.is_clean(), "{report}");
    assert!(report.steps > 100);
}

#[test]
fn the_same_seed_does_the_same_steps() {
    let steps = |_| {
        let stock = Stock::start(&[]);
        let guest = stock.guest();
        let config = Config::new(seed() + 2).lanes(2);
        let mut workload = Workload::start(config, &[guest.fuse()]);
        workload.run(Limit::steps(1_000));
        workload.report()
    };
    let [first, second] = [0, 1].map(steps);
    assert!(first.is_clean(), "{first}");
    assert_eq!(first, second);
}

#[test]
fn a_script_continues_over_a_pause_and_a_reboot() {
    let stock = Stock::start(&[]);
    let guest = Guest::boot(GuestConfig::new(stock.socket()).small()).unwrap();
    let mut workload = Workload::start(Config::new(0).host(stock.share()), &[guest.fuse()]);
    let data = Fill { seed: 1, len: 10_000 };
    workload.run_script(&[
        Op::Mkdir { path: "d".into(), mode: 0o755 },
        Op::Create { path: "d/f".into(), file: 0, access: Access::Append, mode: 0o644, exclusive: true },
        Op::Write { file: 0, offset: 0, data },
        Op::Unlink { path: "d/f".into() },
        Op::Write { file: 0, offset: 0, data },
        Op::Create { path: "d/g".into(), file: 1, access: Access::ReadWrite, mode: 0o644, exclusive: true },
        Op::Write { file: 1, offset: 77, data },
    ]);
    let bases = guest.pause().unwrap();
    guest.resume(bases).unwrap();
    workload.run_script(&[
        Op::Read { file: 0, offset: 0, size: 65536 },
        Op::Rename { from: "d".into(), to: "e".into(), how: RenameHow::NoReplace },
        Op::Unlink { path: "e/f".into() },
        Op::Rmdir { path: "e".into() },
    ]);
    guest.reboot().unwrap();
    workload.remount(0);
    let report = workload.finish();
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.refused, 2);
}

#[test]
fn changes_by_the_host_are_found() {
    let stock = Stock::start(&[]);
    let guest = stock.guest();
    let mut workload = Workload::start(Config::new(0).host(stock.share()), &[guest.fuse()]);
    let data = Fill { seed: 1, len: 1_000 };
    workload.run_script(&[
        Op::Create { path: "f".into(), file: 0, access: Access::ReadWrite, mode: 0o644, exclusive: true },
        Op::Write { file: 0, offset: 0, data },
    ]);
    let host = stock.share().join("lane-0-0/f");
    let mut bytes = data.bytes();
    bytes[500] ^= 1;
    std::fs::write(&host, bytes).unwrap();
    std::fs::write(stock.share().join("lane-0-0/stranger"), "").unwrap();
    let report = workload.finish();
    // Through the open file, by name, and on the host.
    assert_eq!(report.wrong_bytes, 3, "{report}");
    assert!(!report.is_clean());
}
