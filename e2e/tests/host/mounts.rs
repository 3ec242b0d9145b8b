//! The host mounts and unmounts file systems while a guest works. An engine's root directory is what its guest sees.

use anyhow::{Result, ensure};

use crate::world::World;

pub(crate) fn mounts_of_the_host_reach_a_guest(world: &mut World) -> Result<()> {
    world.serve_disk()?;
    let engine = world.start_guest()?["enginePid"].clone();
    let below = "/srv/disk/data/below";
    world.host.must(&format!("mkdir {below}; mount -t tmpfs tmpfs {below}; echo later >{below}/file"))?;
    let seen = world.host.must(&format!("cat /proc/{engine}/root/below/file"))?;
    ensure!(seen == "later\n", "the engine reads '{seen}'");
    world.host.must(&format!("umount {below}; ! ls /proc/{engine}/root/below/file; rmdir {below}"))?;
    world.finish_guest()?;

    // A guest starts with an empty directory.
    world.host.must("rm -rf /srv/disk/data/*")?;
    let engine = world.start_guest()?["enginePid"].clone();
    world.host.must("umount /srv/disk")?;
    world.host.must(&format!("ls /proc/{engine}/root/"))?;
    let gone = world.session("the session reports it", |session| session["sourceGone"].is_string())?;
    println!("{}", gone["sourceGone"]);
    Ok(())
}
