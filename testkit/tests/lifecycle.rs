//! Events of a VM's life and variants of guests, against stock virtiofsd.

mod common;

use std::time::Duration;

use common::Stock;
use testkit::fuse::wire::ROOT;
use testkit::guest::{Guest, GuestConfig};
use testkit::processes::descendants;
use testkit::vhost::front_end::{F_EVENT_IDX, F_INDIRECT};
use testkit::workload::{Config, Limit, Workload};

/// CONFIGURE_MEM_SLOTS.
const MEMORY_SLOTS: u64 = 1 << 15;

#[test]
fn all_variants_of_guests_work() {
    type Variant = fn(&mut GuestConfig);
    let shapes: [(&str, Variant); 10] = [
        ("plain", |_| {}),
        ("direct descriptors", |config| config.features &= !F_INDIRECT),
        ("no EVENT_IDX", |config| config.features &= !F_EVENT_IDX),
        ("one memory table", |config| config.protocol &= !MEMORY_SLOTS),
        ("two regions", |config| config.split_memory = Some(32 << 20)),
        ("two regions in one table", |config| {
            config.split_memory = Some(32 << 20);
            config.protocol &= !MEMORY_SLOTS;
        }),
        ("all acknowledged", |config| config.acknowledge_all = true),
        ("polling", |config| config.busy_poll = true),
        ("touched memory, few buffers", |config| {
            config.touch_memory = true;
            config.in_flight = 2;
        }),
        ("payload in one piece", |config| config.segment = 1 << 20),
    ];
    for (name, shape) in shapes {
        let stock = Stock::start(&[]);
        let mut config = GuestConfig::new(stock.socket()).small();
        shape(&mut config);
        let guest = Guest::boot(config).unwrap_or_else(|error| panic!("{name}: {error}"));
        let config = Config::new(7).lanes(3).host(stock.share());
        let mut workload = Workload::start(config, &[guest.fuse()]);
        workload.run(Limit::steps(300));
        let report = workload.finish();
        assert!(report.is_clean(), "{name}: {report}");
        assert_eq!(guest.violations(), [], "{name}");
    }
}

#[test]
fn requests_made_while_paused_are_served_after_resume() {
    let stock = Stock::start(&[]);
    let guest = stock.guest();
    for round in 0..5 {
        let bases = guest.pause().unwrap();
        std::thread::scope(|threads| {
            let waiting = threads.spawn(|| guest.fuse().mkdir(ROOT, format!("d{round}"), 0o755));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!stock.share().join(format!("d{round}")).exists());
            guest.resume(bases).unwrap();
            waiting.join().unwrap().unwrap();
        });
    }
    assert!(stock.share().join("d4").exists());
}

#[test]
fn a_reboot_starts_with_an_empty_session() {
    let stock = Stock::start(&[]);
    let guest = stock.guest();
    let before = guest.fuse().mkdir(ROOT, "d", 0o755).unwrap();
    guest.reboot().unwrap();
    let after = guest.fuse().lookup(ROOT, "d").unwrap();
    assert_eq!(before.attr.ino, after.attr.ino);
    guest.fuse().destroy().unwrap();
    guest.mount().unwrap();
    guest.fuse().lookup(ROOT, "d").unwrap();
}

#[test]
fn a_killed_server_disconnects_the_guest() {
    let mut stock = Stock::start(&[]);
    let guest = stock.guest();
    let pid = stock.server().pid();
    let serving = descendants(pid).unwrap();
    for pid in serving.into_iter().chain([pid]) {
        let pid = nix::unistd::Pid::from_raw(pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
    let error = guest.fuse().statfs(ROOT).unwrap_err();
    assert!(error.is_disconnected(), "{error}");
    assert!(!error.is_hung());
}

#[test]
fn another_server_resumes_at_the_used_index() {
    let (first, second) = (Stock::start(&[]), Stock::start(&[]));
    let guest = first.guest();
    guest.fuse().write_file("f", b"first").unwrap();
    drop(first);
    assert!(guest.fuse().statfs(ROOT).unwrap_err().is_disconnected());
    guest.reconnect_to(second.socket()).unwrap();
    guest.mount().unwrap();
    assert!(guest.queues()[1].ring_state().unwrap().used > 0);
    guest.fuse().write_file("f", b"second").unwrap();
    assert_eq!(std::fs::read(second.share().join("f")).unwrap(), b"second");
    assert_eq!(guest.violations(), []);
}
