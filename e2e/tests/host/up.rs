//! `virtiofs-agent up`, run by root and by an ordinary user.

use anyhow::{Context, Result, ensure};

use crate::world::{PATIENCE, World};

pub(crate) fn the_readme_serves_a_share_as_root(world: &mut World) -> Result<()> {
    const UP: &str = "target/release/virtiofs-agent up ";
    world.host.must("mkdir -p /srv/images; echo from the host >/srv/images/hello")?;
    world.follow("README.md", "## Use it on a host", &["make build", UP])?;
    let up = world.command("README.md", "## Use it on a host", UP)?;
    world.host.must(&format!(
        "systemd-run --quiet --unit up --working-directory=$PWD --property=StandardOutput=file:/run/up.log {up}"
    ))?;
    let share = world.until_state("images", "Ready")?;
    ensure!(share["active"]["preflight"]["sandbox"] == "Namespace", "{share:#}");
    let printed = "images: Ready, /srv/images at /run/virtiofs/shares/images.sock";
    world.host.until("it prints that it is ready", PATIENCE, &format!("grep -x '{printed}' /run/up.log"))?;
    world.host.must("systemctl stop up")?;
    world.host.must("! ls /run/virtiofs/shares/images.sock && ! pgrep virtiofs-")?;
    Ok(())
}

pub(crate) fn an_ordinary_user_serves_a_share(world: &mut World) -> Result<()> {
    world.host.must("id ann || useradd --create-home ann; install -d -o ann /home/ann/data /home/ann/shares")?;
    let spec =
        "source: {hostPath: {path: /home/ann/data}}\naccess: ReadWrite\ncontent: Shared\nengine: {xattr: Enabled}";
    world.declare("/home/ann/shares", "data", spec)?;
    // A user session with a runtime directory, like that of a login.
    world.host.must(
        "install -m 755 target/release/virtiofs* /usr/local/bin/
         systemd-run --quiet --unit up-user --uid ann --property=PAMName=login \
             --property=StandardOutput=file:/run/up-user.log \
             /usr/local/bin/virtiofs-agent up --shares /home/ann/shares",
    )?;
    let socket = "/run/user/$(id -u ann)/virtiofs/shares/data.sock";
    world.host.until("the user's share listens", PATIENCE, &format!("test -S {socket}"))?;
    // Without CAP_DAC_READ_SEARCH there are no file handles, which the share reports.
    world.host.until("its state is printed", PATIENCE, "grep '^data: Degraded' /run/up-user.log")?;
    world.host.must(&format!("runuser -u ann -- workload --socket {socket} --steps 0 --memory 128"))?;
    let status = world
        .host
        .must("runuser -u ann -- env XDG_RUNTIME_DIR=/run/user/$(id -u ann) virtiofsctl status data -o json")?;
    let status: serde_json::Value = serde_json::from_str(&status).context("status -o json")?;
    let preflight = &status["shares"][0]["active"]["preflight"];
    ensure!(preflight["sandbox"] == "Namespace" && preflight["userNamespace"] == true, "{preflight:#}");
    world.host.must("systemctl stop up-user; rm /usr/local/bin/virtiofs*")?;
    Ok(())
}

const LIMITED: &str = "source: {hostPath: {path: /srv/disk/data}}\naccess: ReadWrite\ncontent: Shared\n\
                       engine: {limits: {cpu: 1500m}}";

pub(crate) fn limits_of_up_need_a_delegated_group(world: &mut World) -> Result<()> {
    world.mount_disk()?;
    world.declare("/etc/virtiofs/shares", "disk", LIMITED)?;
    let up = "$PWD/target/release/virtiofs-agent up --shares /etc/virtiofs/shares >/run/up.log 2>&1 &";
    world.host.must(&format!("systemd-run --scope --unit up-plain {up}"))?;
    let share = world.until_state("disk", "Degraded")?;
    let notice = &share["notices"][0];
    ensure!(notice["reason"] == "LimitUnavailable", "{share:#}");
    let delegate = "systemd-run --scope --property=Delegate=yes";
    ensure!(notice["remedy"].as_str().is_some_and(|remedy| remedy.contains(delegate)), "{notice:#}");
    world.host.must("systemctl stop up-plain.scope")?;

    world.host.must(&format!("{delegate} --unit up-delegated {up}"))?;
    let share = world.until_state("disk", "Ready")?;
    ensure!(share["active"]["preflight"]["limits"]["cpuMillis"] == 1500, "{share:#}");
    world.host.must("systemctl stop up-delegated.scope")?;
    Ok(())
}
