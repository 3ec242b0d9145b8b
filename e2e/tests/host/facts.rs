//! Checks that the host is like users' hosts, on which the results of the other tests depend.

use anyhow::{Result, ensure};

use crate::world::World;

const FACTS: &[(&str, &str)] = &[
    ("cat /proc/1/comm", "systemd"),
    ("findmnt --noheadings --output PROPAGATION /", "shared"),
    ("stat --file-system --format %T /sys/fs/cgroup", "cgroup2fs"),
    ("cat /proc/sys/kernel/yama/ptrace_scope", "1"),
    ("cat /sys/module/apparmor/parameters/enabled", "Y"),
    ("grep -q '(enforce)' /sys/kernel/security/apparmor/profiles && echo some", "some"),
    ("systemctl is-system-running --wait", "running"),
];

pub(crate) fn the_host_is_what_users_have(world: &mut World) -> Result<()> {
    for (command, expected) in FACTS {
        let found = world.host.must(command)?;
        ensure!(found.trim() == *expected, "`{command}` prints '{}', not '{expected}'", found.trim());
    }
    println!("{}", world.host.must("uname -r; systemctl --version | head -1; systemd-analyze time | head -1")?.trim());
    Ok(())
}
