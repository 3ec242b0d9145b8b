//! Agent and broker as services, as in the manual.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::world::{PATIENCE, World};

const SHARE: &str = "source: {hostPath: {path: /srv/disk/data}}\naccess: ReadWrite\ncontent: Shared\n\
                     engine: {xattr: Enabled, limits: {cpu: 1500m, cpuWeight: 50, writeBandwidth: 64Mi}}";

impl World {
    /// Starts the services with a share `disk` on a file system of its own and with resource limits.
    pub(crate) fn serve_disk(&self) -> Result<()> {
        self.mount_disk()?;
        self.install_services()?;
        self.declare_disk()?;
        self.until_state("disk", "Ready")?;
        Ok(())
    }

    pub(crate) fn declare_disk(&self) -> Result<()> {
        self.declare("/etc/virtiofs/shares", "disk", SHARE)
    }

    /// Starts a guest that works on that share and compares everything it sees with a model. Returns its
    /// session.
    pub(crate) fn start_guest(&self) -> Result<Value> {
        self.host.must(
            "systemd-run --quiet --unit guest --remain-after-exit --property=StandardOutput=file:/run/guest.log \
             --property=StandardError=file:/run/guest.log workload --socket /run/virtiofs/shares/disk.sock \
             --host /srv/disk/data --lanes 1 --memory 128 --patience 120 --seconds 600 \
             --until /run/guest.stop",
        )?;
        self.session("the guest works", |session| {
            session["state"] == "Serving" && session["counts"]["requests"].as_u64() > Some(20)
        })
    }

    /// Stops the guest, and fails if it has seen an error or a wrong byte.
    pub(crate) fn finish_guest(&self) -> Result<()> {
        self.host.must("touch /run/guest.stop")?;
        self.host.until("the guest has ended", PATIENCE, "[ $(systemctl show guest -P SubState) != running ]")?;
        let seen = self.host.must("[ $(systemctl show guest -P ExecMainStatus) = 0 ] && cat /run/guest.log");
        print!("{}", seen.or_else(|error| Err(error.context(self.host.must("cat /run/guest.log")?)))?);
        self.host.must("systemctl stop guest; rm /run/guest.stop")?;
        Ok(())
    }

    /// Waits until `is_so` is true for the share's only session.
    pub(crate) fn session(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
        let until = std::time::Instant::now() + PATIENCE;
        loop {
            let status = self.host.must("virtiofsctl status disk -o json")?;
            let status: Value = serde_json::from_str(&status).context("status -o json")?;
            let session = &status["shares"][0]["sessions"][0];
            if is_so(session) {
                return Ok(session.clone());
            }
            ensure!(std::time::Instant::now() < until, "timed out waiting until {what}\n{status:#}");
        }
    }

    pub(crate) fn main_pid(&self, unit: &str) -> Result<String> {
        Ok(self.host.must(&format!("systemctl show {unit} -P MainPID"))?.trim().to_owned())
    }
}

/// Reads the limits of the share, and the memory charged to its session, from the kernel.
fn expect_limits(world: &World, session: &Value) -> Result<()> {
    let engine = &session["enginePid"];
    let group = world.host.must(&format!("sed s,^0::,/sys/fs/cgroup, /proc/{engine}/cgroup"))?;
    let group = group.trim();
    let disk = world.host.must("mountpoint --fs-devno /srv/disk")?;
    for (file, expected) in [
        ("cpu.max", "150000 100000".to_owned()),
        ("../cpu.weight", "50".to_owned()),
        ("io.max", format!("{} rbps=max wbps=67108864 riops=max wiops=max", disk.trim())),
    ] {
        let found = world.host.must(&format!("cat {group}/{file}"))?;
        println!("{group}/{file}: {}", found.trim());
        ensure!(found.trim() == expected, "{group}/{file} has '{}', not '{expected}'", found.trim());
    }
    let charged: u64 = world.host.must(&format!("cat {group}/../memory.current"))?.trim().parse()?;
    let reported = session["chargedMemoryBytes"].as_u64().context("no memory is charged to the session")?;
    println!("memory.current of the session: {charged}, in its status {reported}");
    ensure!(charged > 0 && reported > 0, "nothing is charged to {group}/..");
    Ok(())
}

/// Reads the guest's memory that was first touched by its engine from the kernel.
fn expect_guest_memory_charged_to_its_session(world: &World, session: &Value) -> Result<()> {
    let unit = "/sys/fs/cgroup/system.slice/virtiofs-broker.service";
    let shared = |group: &str| -> Result<u64> {
        Ok(world.host.must(&format!("sed -n 's/^shmem //p' {group}/memory.stat"))?.trim().parse()?)
    };
    let (of_session, of_broker) =
        (shared(&format!("{unit}/virtiofs-session-*"))?, shared(&format!("{unit}/virtiofs-broker"))?);
    println!("shared memory charged to the session {of_session}, to the broker {of_broker}");
    let guest = session["guestMemoryBytes"].as_u64().context("guestMemoryBytes")?;
    ensure!(of_session > 0 && of_session <= guest + (64 << 20), "{of_session} of a guest of {guest} bytes");
    Ok(())
}

pub(crate) fn services_serve_shares_within_limits(world: &mut World) -> Result<()> {
    world.serve_disk()?;
    let session = world.start_guest()?;
    expect_limits(world, &session)?;
    expect_guest_memory_charged_to_its_session(world, &session)?;
    world.finish_guest()?;
    let groups = "ls -d /sys/fs/cgroup/system.slice/virtiofs-broker.service/virtiofs-session-*";
    world.host.until("the session's group is removed", PATIENCE, &format!("! {groups}"))?;
    for unit in ["virtiofs-broker", "virtiofs-agent"] {
        print!("{}", world.host.must(&format!("systemd-analyze security {unit} | tail -1"))?);
    }
    Ok(())
}

pub(crate) fn the_agent_restarts_under_a_guest(world: &mut World) -> Result<()> {
    world.serve_disk()?;
    let session = world.start_guest()?;
    let mut agent = world.main_pid("virtiofs-agent")?;
    for command in ["systemctl restart virtiofs-agent", "kill -9 $(systemctl show virtiofs-agent -P MainPID)"] {
        world.host.must(command)?;
        let script =
            format!("[ $(systemctl show virtiofs-agent -P MainPID) != {agent} ] && systemctl is-active virtiofs-agent");
        world.host.until("another agent is ready", PATIENCE, &script)?;
        agent = world.main_pid("virtiofs-agent")?;
    }
    world.declare("/etc/virtiofs/shares", "more", "source: {hostPath: {path: /srv}}\ncontent: Immutable")?;
    world.host.must("systemctl reload virtiofs-agent")?;
    ensure!(world.main_pid("virtiofs-agent")? == agent, "a reload started another agent");
    world.until_state("more", "Ready")?;
    world.host.must("virtiofsctl handover disk")?;
    let after = world.session("it still has its guest", |after| after["state"] == "Serving")?;
    ensure!(after["id"] == session["id"] && after["engines"].as_u64() > Some(1), "{session:#}\n{after:#}");
    world.finish_guest()
}

pub(crate) fn a_broker_that_was_killed_starts_again(world: &mut World) -> Result<()> {
    world.serve_disk()?;
    let session = world.start_guest()?;
    let mut broker = world.main_pid("virtiofs-broker")?;
    for command in ["kill -9 $(systemctl show virtiofs-broker -P MainPID)", "systemctl restart virtiofs-broker"] {
        world.host.must(command)?;
        let script = format!("[ $(systemctl show virtiofs-broker -P MainPID) != {broker} ] && virtiofsctl status disk");
        world.host.until("another broker answers", PATIENCE, &script)?;
        broker = world.main_pid("virtiofs-broker")?;
    }
    let after = world.session("it still has its guest", |after| after["state"] == "Serving")?;
    ensure!(after["id"] == session["id"] && after["enginePid"] == session["enginePid"], "{session:#}\n{after:#}");
    expect_limits(world, &after)?;
    world.finish_guest()?;
    let share = world.until_state("disk", "Ready")?;
    ensure!(share["active"]["preflight"]["limits"]["cpuMillis"] == 1500, "{share:#}");
    Ok(())
}

pub(crate) fn a_support_bundle_explains_the_host(world: &mut World) -> Result<()> {
    world.serve_disk()?;
    world.host.must("virtiofsctl support-bundle --output /run/bundle.tar.gz")?;
    world.host.must("tar -C /run -xzf /run/bundle.tar.gz; rm /run/bundle.tar.gz")?;
    for (file, content) in [("host.txt", "/system.slice/virtiofs-broker.service"), ("log.txt", "broker ready")] {
        world.host.must(&format!("grep -m 1 '{content}' /run/virtiofs-support/{file}"))?;
    }
    world.host.must("rm -r /run/virtiofs-support")?;
    Ok(())
}
