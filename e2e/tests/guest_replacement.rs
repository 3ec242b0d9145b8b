//! Replaces engines and brokers under real guests, which count no error: kills, hand-overs, another binary, a VM that is
//! paused, reset or mounts again, and the remedy for the bug report that started this project.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::guest::{Guest, GuestSpec};
use e2e::load::{Load, Running, Summary};
use e2e::node::{Declaration, Node};
use e2e::parts::Parts;
use e2e::replacement::Series;
use e2e::report::{self, FILES, LAYERS, REREAD_FILES};
use e2e::tree;
use tempfile::TempDir;
use virtiofs_contract::control::SessionState;

const SHARE: &str = "share";
const KILLS: usize = 20;
const HAND_OVERS: usize = 20;
const BROKER_KILLS: usize = 20;
const BROKER_REPLACEMENTS: usize = 20;
const KEEPER_KILLS: usize = 5;
/// Configurations of successive hand-overs; each differs from its neighbours.
const CONFIGURATIONS: [&str; 5] = [
    "{cache: Metadata}",
    "{inodeFileHandles: Never}",
    "{cache: Metadata, attrTimeout: 500ms, inodeFileHandles: Mandatory}",
    "{sandbox: Chroot, openFiles: 5000}",
    "{}",
];

/// Agent and broker, and a share with three layers for overlayfs and a directory to write to. A failure includes the
/// daemons' log.
struct Host {
    parts: Parts,
    node: Node,
    source: TempDir,
}

impl Host {
    fn run(test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        Self::run_on(Node::start, test)
    }

    fn run_on(start: impl FnOnce(&Parts) -> Result<Node>, test: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let parts = Parts::locate()?;
        let mut host = Self { node: start(&parts)?, source: tempfile::tempdir()?, parts };
        fs::create_dir(host.source().join("work"))?;
        test(&mut host).with_context(|| host.node.log_tail())?;
        host.node.stop()
    }

    fn source(&self) -> &Path {
        self.source.path()
    }

    fn plant_layers(&self) -> Result<()> {
        LAYERS.iter().try_for_each(|layer| tree::plant(&self.source().join(layer), 40))
    }

    fn declaration<'a>(&'a self, engine: &'a str) -> Declaration<'a> {
        // No remedy may interfere.
        let staleness = "{policy: Report}";
        Declaration { name: SHARE, source: self.source(), access: "ReadWrite", content: "Shared", engine, staleness }
    }

    /// Declares the share and boots a guest with it as a device.
    fn guest(&self, engine: &str) -> Result<Guest> {
        self.node.declare(&self.declaration(engine))?;
        Guest::boot(&self.parts, &GuestSpec::default().with_device(SHARE, &self.node.socket(SHARE)?))
    }
}

/// Mount points of the share and of overlayfs on its layers.
struct Mounts {
    direct: String,
    merged: String,
}

impl Mounts {
    fn of(guest: &mut Guest) -> Result<Self> {
        let direct = guest.mount(SHARE)?;
        let merged = guest.overlay("merged", &LAYERS.map(|layer| format!("{direct}/{layer}")))?;
        Ok(Self { direct, merged })
    }

    /// Unmounts both in a running guest.
    fn undo(&self, guest: &mut Guest) -> Result<()> {
        guest.must(&format!("umount {} && umount /run/merged && umount {}", self.merged, self.direct)).map(drop)
    }
}

/// Two concurrent loads: one writes to the mount itself, the other works on overlayfs.
struct Loads {
    direct: Running,
    merged: Running,
}

impl Loads {
    fn start(guest: &mut Guest, mounts: &Mounts) -> Result<Self> {
        let on_mount =
            Load::writing(&format!("{}/work", mounts.direct)).and_reading(&format!("{}/base", mounts.direct));
        let on_overlay = Load::writing(&mounts.merged).and_reading(&mounts.merged);
        Ok(Self { direct: guest.start_work(&on_mount)?, merged: guest.start_work(&on_overlay)? })
    }

    /// Stops both and fails if either counted an error.
    fn stop(self, guest: &mut Guest) -> Result<()> {
        for (place, running) in [("direct mount", self.direct), ("overlayfs", self.merged)] {
            let count = guest.stop_work(running)?;
            print(place, &count);
            count.must_be_clean().context(place)?;
        }
        Ok(())
    }
}

fn print(what: &str, count: &Summary) {
    println!(
        "{what}: {} operations in {} rounds, errors {:?}, {} wrong results, slowest operation {} ms",
        count.operations,
        count.rounds,
        count.errors,
        count.wrong,
        count.slowest_us / 1000
    );
}

/// Waits for a time that does not depend on the guest's work, sometimes so short that the standby engine is not ready
/// after the previous replacement.
fn pause(number: usize) {
    sleep(Duration::from_millis((number * 167 % 400) as u64));
}

#[test]
fn kills_and_hand_overs_under_load_cost_the_guest_no_error() -> Result<()> {
    Host::run(|host| {
        host.plant_layers()?;
        let mut guest = host.guest("{}")?;
        let mounts = Mounts::of(&mut guest)?;
        let loads = Loads::start(&mut guest, &mounts)?;

        let (mut kills, mut hand_overs) = (Series::default(), Series::default());
        let mut requests = u64::MAX;
        for (number, engine) in CONFIGURATIONS.iter().cycle().take(HAND_OVERS).enumerate() {
            pause(number);
            requests = requests.min(host.node.until_busy(SHARE)?);
            kills.add(host.node.kill_engine(SHARE)?);
            pause(number + 1);
            requests = requests.min(host.node.until_busy(SHARE)?);
            hand_overs.add(host.node.reconfigure(&host.declaration(engine))?);
        }
        pause(HAND_OVERS);
        let binary = host.node.replace_binary(SHARE)?;
        pause(HAND_OVERS + 1);
        loads.stop(&mut guest)?;
        println!("kills: {kills}\nhand-overs: {hand_overs}\nanother binary: {binary:?}");
        println!("requests answered within 5 ms before each of them: at least {requests}");
        ensure!(kills.count() == KILLS && hand_overs.count() == HAND_OVERS);
        guest.shutdown()
    })
}

#[test]
fn kills_and_replacements_of_broker_and_keeper_cost_the_guest_no_error() -> Result<()> {
    Host::run_on(Node::start_services, |host| {
        host.plant_layers()?;
        let mut guest = host.guest("{}")?;
        let mounts = Mounts::of(&mut guest)?;
        let loads = Loads::start(&mut guest, &mounts)?;
        let engine = host.node.engine(SHARE)?;
        let session = host.node.session(SHARE)?.id;

        for (name, times, disrupt) in [
            ("broker killed", BROKER_KILLS, Node::kill_broker as fn(&mut Node) -> Result<()>),
            ("broker replaced", BROKER_REPLACEMENTS, Node::replace_broker),
            ("keeper killed", KEEPER_KILLS, Node::kill_keeper),
        ] {
            let begin = Instant::now();
            for number in 0..times {
                pause(number);
                host.node.until_busy(SHARE)?;
                disrupt(&mut host.node).with_context(|| format!("{name}, number {number}"))?;
            }
            println!("{name} {times} times in {:?}", begin.elapsed());
        }
        host.node.until_busy(SHARE)?;
        ensure!(host.node.engine(SHARE)? == engine, "the engine was replaced");
        ensure!(host.node.session(SHARE)?.id == session, "the session was replaced");
        host.node.kill_engine(SHARE).context("the last broker recovers an engine of the first")?;
        loads.stop(&mut guest)?;
        guest.shutdown()
    })
}

#[test]
fn an_engine_is_replaced_under_a_paused_vm() -> Result<()> {
    Host::run(|host| {
        host.plant_layers()?;
        let mut guest = host.guest("{}")?;
        let mounts = Mounts::of(&mut guest)?;
        let loads = Loads::start(&mut guest, &mounts)?;
        for engine in ["{cache: Metadata}", "{inodeFileHandles: Never}"] {
            sleep(Duration::from_millis(300));
            guest.pause()?;
            ensure!(host.node.session(SHARE)?.state == SessionState::Stopped, "the VM is paused");
            guest.resume()?;
            sleep(Duration::from_millis(300));
            guest.pause()?;
            host.node.kill_engine(SHARE)?;
            host.node.reconfigure(&host.declaration(engine))?;
            guest.resume()?;
        }
        sleep(Duration::from_millis(500));
        loads.stop(&mut guest)?;
        guest.shutdown()
    })
}

#[test]
fn a_share_survives_remount_and_reset() -> Result<()> {
    Host::run(|host| {
        host.plant_layers()?;
        let mut guest = host.guest("{}")?;
        work_through_a_kill(host, &mut guest)?.undo(&mut guest)?;
        work_through_a_kill(host, &mut guest).context("mounted again")?;

        let mounts = Mounts { direct: format!("/mnt/{SHARE}"), merged: "/mnt/merged".to_owned() };
        Loads::start(&mut guest, &mounts)?;
        sleep(Duration::from_millis(500));
        guest.reset().context("reset under load")?;
        fs::remove_dir_all(host.source().join("work"))?;
        fs::create_dir(host.source().join("work"))?;
        work_through_a_kill(host, &mut guest).context("booted again")?;
        guest.shutdown()
    })
}

/// Mounts, and works while the engine is killed.
fn work_through_a_kill(host: &Host, guest: &mut Guest) -> Result<Mounts> {
    let mounts = Mounts::of(guest)?;
    let loads = Loads::start(guest, &mounts)?;
    sleep(Duration::from_millis(300));
    host.node.until_busy(SHARE)?;
    host.node.kill_engine(SHARE)?;
    sleep(Duration::from_millis(300));
    loads.stop(guest)?;
    Ok(mounts)
}

#[test]
fn file_handles_recover_a_guest_without_open_files() -> Result<()> {
    Host::run(|host| {
        report::plant(host.source())?;
        let mut guest = host.guest("{inodeFileHandles: Never, openFiles: 2000}")?;
        let mounts = Mounts::of(&mut guest)?;
        report::copy_list(&mut guest, &mounts.direct)?;
        let (all, first) = (Load::listed("/run/list"), Load::listed("/run/list").at_most(REREAD_FILES));
        print("O_PATH descriptors, all files", &guest.work(&all, 1)?);
        print("O_PATH descriptors, the first files again", &guest.work(&first, 1)?);
        report::provoke_estale(&host.node, SHARE, &mut guest)?;
        let stale_read = guest.work(&first, 1)?;
        print("after the engine's death and other files, the first ones", &stale_read);
        let stale = stale_read.errors.get("ESTALE").copied().unwrap_or_default();
        ensure!(stale > u64::from(REREAD_FILES) * 9 / 10, "the bug report is not reproduced: {stale_read:?}");

        let pause = host.node.reconfigure(&host.declaration("{inodeFileHandles: Mandatory, openFiles: 2000}"))?;
        println!("handed over to file handles in {pause:?}");
        let recovered = guest.work(&first, 1)?;
        print("file handles, the same files", &recovered);
        recovered.must_be_clean()?;
        let whole = guest.work(&all, 1)?;
        print("file handles, every file", &whole);
        whole.must_be_clean()?;
        ensure!(whole.operations == FILES, "{} files were read", whole.operations);
        guest.shutdown()
    })
}
